"""Advance on the host: the few sequences of a run on a CPU, one after the other in plain Python.

The rules stand in kernels/advance.py, and the decisions are the same, bit for bit. Some 190 operations of torch on a
handful of numbers take half a millisecond in a run; this takes a fifth of that for one sequence, a third for eight.

Shapes   see Sequences, Rows and Terms (kernels/state.py); token, confidence [R']
Source   this project's
"""

from __future__ import annotations

from torch import Tensor

from mtpkern.kernels.state import FAULT, LIMIT, RUNNING, STOPPED, Rows, Sequences, Terms
from mtpkern.kernels.worth import FORGOTTEN, FORGOTTEN_IDLE, PRIOR_CHAINS, PRIOR_HITS, UNIT

# Of so many this takes 0.42 ms where torch takes 0.54; of twice as many 0.82 and 0.68.
FEW = 64


def takes_host(sequences: Sequences, rows: Rows, terms: Terms, k: int, masks: int) -> bool:
    """Whether `advance_on_host` can do it: few sequences, of which each has rows for all that it may bring."""
    B = len(sequences.length)
    few = sequences.length.device.type == "cpu" and B <= FEW
    return few and not masks and terms.budget is None and len(rows.seq) >= B * (2 * k - 1)


def advance_on_host(
    sequences: Sequences,
    rows: Rows,
    terms: Terms,
    token: Tensor,
    confidence: Tensor,
    *,
    k: int,
    verify: bool,
    mask_token_id: int,
) -> None:
    """`advance`, where `takes_host` says so.

    advance_on_host(sequences, rows, terms, token, confidence, k=8, verify=True, mask_token_id=mask_token_id)
    """
    threshold, price, stops_of = terms.threshold.item(), terms.price.item(), terms.stop_ids.tolist()
    y_of, c_of, row_starts = token.tolist(), confidence.tolist(), rows.start.tolist()
    # Views, through which the state is written; what is read of it are Python's own numbers, which take a tenth.
    tokens, *columns, blocks = (x.numpy() for x in vars(sequences).values())
    at_length, at_pending, _, at_status, at_passes, at_hits, at_chains = columns
    state = zip(*(x.tolist() for x in columns))
    starts, seq, position, row_token = [0], list[int](), list[int](), list[int]()
    for b, (length, pending, limit, status, passes, hits, chains) in enumerate(state):
        news: list[int] = []
        if status == RUNNING:
            y, c = y_of[row_starts[b] : row_starts[b + 1]], c_of[row_starts[b] : row_starts[b + 1]]
            first, last, stops = length - pending, pending - 1, stops_of[b]
            emitted_before = first + 1 if verify else length
            if any(x != x for x in c):
                at_length[b], at_pending[b], at_status[b] = emitted_before, 0, FAULT
                starts.append(starts[-1])
                continue
            trusted = last
            if verify and last:
                drafts = tokens[b, first + 1 : length].tolist()
                trusted = next((i for i, x in enumerate(drafts) if y[i] != x), last)
            # The columns from `trusted` up to `reach` are kept: masks count behind the last pending token alone.
            reach = trusted + 1
            if trusted == last and (verify or c[last] > threshold):
                while reach < len(c) and c[reach] > threshold:
                    reach += 1
            odds = 0.0
            if verify:
                # What this pass has shown of its sequence, and which of the sure drafts are worth a row.
                if len(c) > 1:
                    hits += trusted * UNIT - (hits >> FORGOTTEN)
                    chains += (trusted < k - 1) * UNIT - (chains >> FORGOTTEN)
                else:
                    hits, chains = hits - (hits >> FORGOTTEN_IDLE), chains - (chains >> FORGOTTEN_IDLE)
                at_hits[b], at_chains[b] = hits, chains
                odds = ((hits + PRIOR_HITS << 16) // (hits + chains + PRIOR_HITS + PRIOR_CHAINS)) / 65536
                # Nothing behind a stop token is ever emitted.
                reached, sure, reach = 1.0, reach, trusted + 1
                while reach < sure and (reached := reached * c[reach]) >= price:
                    reach += 1
                    if y[reach - 1] in stops:
                        break

            start = first + trusted + 1
            length_next = min(first + 1 + reach, limit)
            tokens[b, start:length_next] = y[trusted : length_next - first - 1]
            end = min(start + 1, limit) if verify else length_next
            stop_end = next((p + 1 for p in range(emitted_before, end) if y[p - first - 1] in stops), None)
            end = stop_end or end
            blocks[b, passes], at_passes[b] = end - emitted_before, passes + 1
            if stop_end or end >= limit:
                at_length[b], at_pending[b], at_status[b] = end, 0, STOPPED if stop_end else LIMIT
            else:
                news = y[trusted : trusted + length_next - start]
                at_length[b], at_pending[b] = length_next, len(news)
                masks = min(limit - length_next - 1, k - 1)
                if verify and len(news) > 1 and news[-1] in stops:
                    masks = 0
                elif verify and price > 0:
                    chance = 1.0
                    for x in c[trusted + 1 : trusted + len(news)]:
                        chance *= x
                    masks = _worth(chance, odds, price, masks)
                news += [mask_token_id] * masks
                row_token += news
                position += range(start, start + len(news))
                seq += [b] * len(news)
        else:
            at_pending[b] = 0
        starts.append(starts[-1] + len(news))
    # Unused rows are the last sequence's, in the slot that is trash.
    unused = len(at_length) - 1, 0, tokens.shape[1] - 1, 0
    rows.start.numpy()[:] = starts
    n = starts[-1]
    for x, used, rest in zip(
        (rows.seq, rows.position, rows.slot, rows.token), (seq, position, position, row_token), unused
    ):
        there = x.numpy()
        there[:n], there[n:] = used, rest


def _worth(chance: float, odds: float, price: float, most: int) -> int:
    """How many masks, of at most so many, are worth the price behind the last draft."""
    power, masks = odds, 0
    while masks < most and chance * power >= price:
        power *= odds
        masks += 1
    return masks
