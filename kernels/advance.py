"""Advance: accept, stop, write out and plan the next pass, for every sequence at once, without the host.

A sequence's last `pending` tokens have no true KV yet: they are its rows of this pass, followed by masks. With s the
position of the first pending token, x its tokens, y_j and c_j the token and confidence read from its j-th row:

    trusted  t = pending - 1                                         unverified: every pending token stands
             t = number of leading j < pending - 1 with y_j = x_{s+j+1}   verified: a draft stands while the row before
                                                                     it says the same
    kept     n = 1 + number of leading i >= 1 with c_{t+i} > threshold, over the mask rows; masks count only where
             every pending token is trusted. Unverified, n = 1 as well where c_t itself is not above the threshold.
             Verified, as far as the product of c_{t+1} ... c_{t+i} is at least the price, and no further than the
             first stop token: what stands behind it is never emitted.
    write    x_{s+t+1+i} = y_{t+i}   for i < n, below the limit
    pending' = n                     length' = s + t + 1 + n

What is emitted now is certain: unverified all up to length', verified all up to and including y_t; the n - 1 tokens
behind it are drafts that the next pass will confirm or replace. Emission is cut behind the first stop token and at
the limit. Static(k) is the unverified form with a threshold below every confidence.

The next pass: each running sequence brings its pending tokens and up to k - 1 masks, packed one sequence behind the
other into R rows, as far as they are worth their price (kernels/worth.py; the price is 0 unless verified); none stands
behind a draft that is a stop token, as nothing would come of it. R >= B * k always holds all pending tokens; with less,
down to B, verified sequences drop drafts: each keeps at most as many pending tokens as fit for all alike. The rest of R
is dealt out as masks, evenly, the remainder to the first. Finished sequences bring nothing; rows left over go to the
trash slot. Where there is a `budget`, that many of the R rows are dealt out.

A refuted draft (t < pending - 1) leaves nothing but its replacement: masks count only behind the last pending token.
Verified, a sequence may bring up to `masks` more, in groups of up to k - 1 behind other pending tokens; the group
behind token t then proposes in place of those behind the last. Groups go where the draft that follows is least sure
(kernels/groups.py). Such a mask stands in one of `masks` scratch slots before the first token's:

    slot         masks + position; of a mask behind another token than the last: 0 .. masks - 1
    prefix_end   a row sees the tokens' slots below it: those up to the pending token that it is, or stands behind
    span_start   it sees the masks of its own group, from this slot to its own; slot + 1 for a token: an empty span

Shapes   see Sequences, Rows and Terms (kernels/state.py); token, confidence [R']
Traffic  a few kilobytes: pure latency
Source   arXiv 2602.06019, "Static vs. Adaptive Decoding Strategies"; verification is this project's

The kernel is one program, because dealing out the budget needs every sequence. Its tiles are [B, columns], and column i
of a sequence is its i-th row: row i's token belongs at position s + 1 + i whatever becomes of it, so accepting needs no
gather. Nothing that the program writes is read again by it; the next pending tokens come from the readout once more.
Few sequences on a CPU are done one after the other in plain Python (kernels/advance_on_host.py).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import fields
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from mtpkern.kernels.advance_on_host import advance_on_host, takes_host
from mtpkern.kernels.form import pdl_options
from mtpkern.kernels.op import op
from mtpkern.kernels.plan import plan
from mtpkern.kernels.state import FAULT, LIMIT, RUNNING, STOPPED, Rows, Sequences, Terms
from mtpkern.kernels.worth import FORGOTTEN, FORGOTTEN_IDLE, PRIOR_CHAINS, PRIOR_HITS, UNIT, remembered

_CONSTANTS = {"RUNNING": RUNNING, "STOPPED": STOPPED, "LIMIT": LIMIT, "FAULT": FAULT, "UNIT": UNIT}
_CONSTANTS |= {"PRIOR_HITS": PRIOR_HITS, "PRIOR_CHAINS": PRIOR_CHAINS}
_CONSTANTS |= {"FORGOTTEN": FORGOTTEN, "FORGOTTEN_IDLE": FORGOTTEN_IDLE}

if find_spec("triton"):
    import triton
    import triton.language as tl

    from mtpkern.kernels.form import gdc_wait
    from mtpkern.kernels.groups import chance_of, deal_masks, masks_wanted
    from mtpkern.kernels.worth import odds_of, worth

    @triton.jit(do_not_specialize=["s_tokens", "s_blocks", "B", "R", "C", "S", "mask_token_id"])
    def _advance_kernel(
        tokens_ptr,  # [B, C + 1]
        length_ptr,  # [B], as the six below
        pending_ptr,
        limit_ptr,
        status_ptr,
        passes_ptr,
        hits_ptr,
        chains_ptr,
        blocks_ptr,  # [B, P + 1]
        row_seq_ptr,  # [R], as the three below
        row_position_ptr,
        row_slot_ptr,
        row_token_ptr,
        row_prefix_ptr,  # [R], as the one below, where MASKS
        row_span_ptr,
        row_start_ptr,  # [B + 1]
        row_behind_ptr,  # [B, K] where MASKS
        token_ptr,  # [R']
        confidence_ptr,  # [R']
        threshold_ptr,  # []
        stop_ids_ptr,  # [B, S]
        price_ptr,  # []
        budget_ptr,  # [] or None
        s_tokens,
        s_blocks,
        B,
        R,
        C,
        S,
        mask_token_id,
        K: tl.constexpr,
        VERIFY: tl.constexpr,
        MASKS: tl.constexpr,
        W: tl.constexpr,  # columns, at least 2 * K - 1 + MASKS
        BLOCK_B: tl.constexpr,  # at least B
        BLOCK_W: tl.constexpr,
        RUNNING: tl.constexpr,
        STOPPED: tl.constexpr,
        LIMIT: tl.constexpr,
        FAULT: tl.constexpr,
        UNIT: tl.constexpr,
        PRIOR_HITS: tl.constexpr,
        PRIOR_CHAINS: tl.constexpr,
        FORGOTTEN: tl.constexpr,
        FORGOTTEN_IDLE: tl.constexpr,
        PDL: tl.constexpr,
    ):
        gdc_wait(PDL)
        o_b = tl.arange(0, BLOCK_B)
        m_b = o_b < B
        o_w = tl.arange(0, BLOCK_W)
        row = tl.load(row_start_ptr + o_b, mask=m_b, other=0)
        count = (tl.load(row_start_ptr + o_b + 1, mask=m_b, other=0) - row).to(tl.int32)
        length = tl.load(length_ptr + o_b, mask=m_b, other=0).to(tl.int32)
        pending = tl.load(pending_ptr + o_b, mask=m_b, other=0).to(tl.int32)
        limit = tl.load(limit_ptr + o_b, mask=m_b, other=0).to(tl.int32)
        status = tl.load(status_ptr + o_b, mask=m_b, other=STOPPED).to(tl.int32)
        threshold = tl.load(threshold_ptr).to(confidence_ptr.dtype.element_ty)
        p_tokens = tokens_ptr + o_b.to(tl.int64) * s_tokens
        first = length - pending
        budget = R

        # Faults, and how many drafts the rows before them confirm: the lowest column that fails.
        fault = tl.zeros([BLOCK_B], tl.int32)
        trusted = pending - 1
        for w in range(0, W, BLOCK_W):
            i = (w + o_w)[None, :]
            p_row = row[:, None] + i
            m_row = i < count[:, None]
            c = tl.load(confidence_ptr + p_row, mask=m_row, other=0.0)
            fault = tl.maximum(fault, tl.max((c != c).to(tl.int32), 1))
            if VERIFY:
                m_draft = i < pending[:, None] - 1
                y = tl.load(token_ptr + p_row, mask=m_draft, other=0)
                x = tl.load(p_tokens[:, None] + first[:, None] + 1 + i, mask=m_draft, other=0)
                trusted = tl.minimum(trusted, tl.min(tl.where(m_draft & (y != x), i, W), 1))
        running = (status == RUNNING) & (fault == 0)
        fault = (status == RUNNING) & (fault != 0)

        # The lowest column behind the trusted ones that is not above the threshold, or is no row, or saw a false draft.
        # The masks that count take the columns behind the trusted ones, wherever they stand: `shift` columns further.
        shift = tl.zeros([BLOCK_B], tl.int32)
        if MASKS:
            unsure = trusted + 1
            for w in range(0, K, BLOCK_W):
                i = (w + o_w)[None, :]
                behind = tl.load(row_behind_ptr + o_b[:, None] * K + i, mask=i < pending[:, None], other=0).to(tl.int32)
                unsure += tl.sum(tl.where(i == trusted[:, None], behind, 0), 1)
                passed = (i < trusted[:, None]) | (i == pending[:, None] - 1)
                shift += tl.sum(tl.where(passed, behind, 0), 1)
            shift = tl.where(trusted < pending - 1, shift + pending - 1 - trusted, 0)
        else:
            unsure = tl.minimum(tl.where(trusted == pending - 1, trusted + K, trusted + 1), count)
        for w in range(0, W, BLOCK_W):
            i = (w + o_w)[None, :]
            at = i + shift[:, None] if MASKS else i
            c = tl.load(confidence_ptr + row[:, None] + at, mask=at < count[:, None], other=0.0)
            candidate = i > trusted[:, None] if VERIFY else i >= trusted[:, None]
            unsure = tl.minimum(unsure, tl.min(tl.where(candidate & ~(c > threshold), i, W), 1))
        kept = tl.maximum(unsure - trusted, 1)

        if VERIFY:
            # What this pass has shown of its sequence, and which of the sure drafts are worth a row.
            hits = tl.load(hits_ptr + o_b, mask=m_b, other=0)
            chains = tl.load(chains_ptr + o_b, mask=m_b, other=0)
            tried = count > 1
            hits_next = hits - (hits >> FORGOTTEN) + trusted.to(tl.int64) * UNIT
            # A chain of all K - 1 drafts was cut, and tells of no end.
            chains_next = chains - (chains >> FORGOTTEN) + tl.where(trusted < K - 1, UNIT, 0)
            hits_next = tl.where(tried, hits_next, hits - (hits >> FORGOTTEN_IDLE))
            chains_next = tl.where(tried, chains_next, chains - (chains >> FORGOTTEN_IDLE))
            hits = tl.where(running, hits_next, hits)
            chains = tl.where(running, chains_next, chains)
            odds = odds_of(hits, chains, PRIOR_HITS, PRIOR_CHAINS)
            price = tl.load(price_ptr)
            p_sure = confidence_ptr + row + trusted + 1 + shift
            drafts = kept - 1
            kept = tl.full([BLOCK_B], 1, tl.int32)
            reached = tl.full([BLOCK_B], 1.0, tl.float64)
            for d in range(K - 1):
                reached *= tl.load(p_sure + d, mask=d < drafts, other=0.0).to(tl.float64)
                kept += ((d < drafts) & (reached >= price)).to(tl.int32)

        # Write the kept tokens, and find the first stop token among those that are emitted.
        start = first + trusted + 1
        emitted_before = first + 1 if VERIFY else length
        end = tl.minimum(start + 1 if VERIFY else start + kept, limit)
        stop_end = tl.full([BLOCK_B], 2147483647, tl.int32)
        if VERIFY:
            stop_kept = kept
        for w in range(0, W, BLOCK_W):
            i = (w + o_w)[None, :]
            position = first[:, None] + 1 + i
            keep = (i >= trusted[:, None]) & (i < (trusted + kept)[:, None]) & (position < limit[:, None])
            emit = (position >= emitted_before[:, None]) & (position < end[:, None])
            at = i + tl.where(i > trusted[:, None], shift[:, None], 0) if MASKS else i
            y = tl.load(token_ptr + row[:, None] + at, mask=running[:, None] & (keep | emit), other=0)
            tl.store(p_tokens[:, None] + position, y, mask=running[:, None] & keep)
            stop = (keep | emit) & (y != y)
            for j in range(S):
                stop |= (keep | emit) & (y == tl.load(stop_ids_ptr + o_b * S + j, mask=m_b, other=-1)[:, None])
            stop_end = tl.minimum(stop_end, tl.min(tl.where(emit & stop, position + 1, 2147483647), 1))
            if VERIFY:
                # A draft that is a stop token is the last one: nothing behind it is ever emitted.
                stop_kept = tl.minimum(stop_kept, tl.min(tl.where(stop & ~emit, i + 1 - trusted[:, None], K), 1))
        if VERIFY:
            kept = stop_kept
        stopped = stop_end <= end
        end = tl.minimum(end, stop_end)

        finished = stopped | (end >= limit)
        length_next = tl.where(finished, end, tl.minimum(start + kept, limit))
        pending_next = tl.where(running & ~finished, length_next - start, 0)
        status_next = tl.where(stopped, STOPPED, tl.where(finished, LIMIT, RUNNING))
        passes = tl.load(passes_ptr + o_b, mask=m_b, other=0)
        tl.store(blocks_ptr + o_b.to(tl.int64) * s_blocks + passes, end - emitted_before, mask=running)
        tl.store(passes_ptr + o_b, passes + 1, mask=running)
        tl.store(status_ptr + o_b, tl.where(fault, FAULT, status_next), mask=running | fault)
        if VERIFY:
            # Drafts that the next pass has no rows for are dropped: the highest even level that fits.
            if budget_ptr is not None:
                budget = tl.minimum(tl.load(budget_ptr).to(tl.int32), R)
            level = 1
            for w in range(0, W, BLOCK_W):
                j = w + o_w
                fits = (j <= K) & (tl.sum(tl.minimum(pending_next[:, None], j[None, :]), 0) <= budget)
                level = tl.maximum(level, tl.max(tl.where(fits, j, 1), 0))
            pending_next = tl.minimum(pending_next, level)
            length_next = tl.where(running & ~finished, start + pending_next, length_next)
        # A faulty sequence ends where its emitted tokens end: the drafts of a verified one are dropped.
        tl.store(length_ptr + o_b, tl.where(fault, emitted_before, length_next), mask=running | fault)
        tl.store(pending_ptr + o_b, pending_next, mask=m_b)

        # Masks: the highest even level that fits, then one more each to the first that want it.
        want = tl.where(running & ~finished, tl.minimum(tl.maximum(limit - length_next - 1, 0), K - 1), 0)
        if VERIFY:
            chance = tl.full([BLOCK_B], 1.0, tl.float64)
            for d in range(K - 1):
                chance *= tl.load(p_sure + d, mask=d < pending_next - 1, other=1.0).to(tl.float64)
            want = tl.minimum(want, worth(chance, odds, price, K))
            p_last = token_ptr + row + trusted + shift + pending_next - 1
            last = tl.load(p_last, mask=pending_next > 1, other=0)
            for e in range(S):
                # Not masked: that would keep two numbers more (python -m mtpkern.bench.aot).
                stop_id = tl.load(stop_ids_ptr + tl.minimum(o_b, B - 1) * S + e)
                want = tl.where((pending_next > 1) & (last == stop_id), 0, want)
        want_last = want
        if MASKS:
            groups = tl.zeros([BLOCK_B], tl.int32)
            for w in range(0, K - 1, BLOCK_W):
                i = w + o_w
                of_use = masks_wanted(start[:, None], pending_next[:, None], limit[:, None], i[None, :], K)
                of_worth = worth(chance_of(p_sure, pending_next, i, K), odds[:, None], price, K)
                groups += tl.sum(tl.minimum(of_use, of_worth), 1)
            want += tl.minimum(groups, MASKS)
        spare = budget - tl.sum(pending_next, 0)
        level = -1
        used = 0
        for w in range(0, W, BLOCK_W):
            j = w + o_w
            used_at = tl.sum(tl.minimum(want[:, None], j[None, :]), 0)  # nondecreasing in j
            fits = (j < K + MASKS) & (used_at <= spare)
            level += tl.sum(fits.to(tl.int32), 0)
            used = tl.maximum(used, tl.max(tl.where(fits, used_at, 0), 0))
        hungry = want > level
        extra = hungry & (tl.cumsum(hungry.to(tl.int32), 0) <= spare - used)
        masks = tl.minimum(want, level) + extra.to(tl.int32)
        rows = pending_next + masks
        if MASKS:
            behind_last = tl.minimum(masks, want_last)

        # Other threads may still be at the old row starts, hits and chains: each has loaded all that it needs.
        tl.debug_barrier()
        if VERIFY:
            tl.store(hits_ptr + o_b, hits, mask=m_b)
            tl.store(chains_ptr + o_b, chains, mask=m_b)
        row_end = tl.cumsum(rows, 0)
        tl.store(row_start_ptr + 1 + o_b, row_end, mask=m_b)
        for w in range(0, W, BLOCK_W):
            i = (w + o_w)[None, :]
            o_r = (row_end - rows)[:, None] + i
            m_r = i < ((pending_next + behind_last) if MASKS else rows)[:, None]
            m_known = i < pending_next[:, None]
            at = i + tl.where(i > 0, shift[:, None], 0) if MASKS else i
            known = tl.load(token_ptr + (row + trusted)[:, None] + at, mask=m_known, other=0)
            tl.store(row_seq_ptr + o_r, tl.broadcast_to(o_b[:, None], BLOCK_B, BLOCK_W), mask=m_r)
            tl.store(row_position_ptr + o_r, start[:, None] + i, mask=m_r)
            tl.store(row_slot_ptr + o_r, MASKS + start[:, None] + i, mask=m_r)
            tl.store(row_token_ptr + o_r, tl.where(m_known, known, mask_token_id), mask=m_r)
            if MASKS:
                step = tl.maximum(i + 1 - pending_next[:, None], 0)
                tl.store(row_prefix_ptr + o_r, MASKS + 1 + start[:, None] + i - step, mask=m_r)
                tl.store(row_span_ptr + o_r, MASKS + 1 + start[:, None] + i - step, mask=m_r)
        if MASKS:
            dealt_before = tl.zeros([BLOCK_B], tl.int32)
            for w in range(0, K, BLOCK_W):
                i = w + o_w
                dealt = deal_masks(p_sure, start, pending_next, limit, odds, price, masks - behind_last, i, K)
                behind = tl.where(i[None, :] == pending_next[:, None] - 1, behind_last[:, None], dealt)
                tl.store(row_behind_ptr + o_b[:, None] * K + i[None, :], behind, mask=m_b[:, None] & (i < K)[None, :])
                own_slot = dealt_before[:, None] + tl.cumsum(dealt, 1) - dealt
                dealt_before += tl.sum(dealt, 1)
                behind_at = start[:, None] + i[None, :]
                for j in range(K - 1):
                    o_r = (row_end - rows + pending_next + behind_last)[:, None] + own_slot + j
                    m_r = j < dealt
                    tl.store(row_seq_ptr + o_r, tl.broadcast_to(o_b[:, None], BLOCK_B, BLOCK_W), mask=m_r)
                    tl.store(row_position_ptr + o_r, behind_at + 1 + j, mask=m_r)
                    tl.store(row_slot_ptr + o_r, own_slot + j, mask=m_r)
                    tl.store(row_token_ptr + o_r, tl.full([BLOCK_B, BLOCK_W], mask_token_id, tl.int64), mask=m_r)
                    tl.store(row_prefix_ptr + o_r, MASKS + 1 + behind_at, mask=m_r)
                    tl.store(row_span_ptr + o_r, own_slot, mask=m_r)
        in_use = tl.sum(rows, 0)
        for r in range(0, R, BLOCK_B):
            m_r = (r + o_b >= in_use) & (r + o_b < R)
            tl.store(row_seq_ptr + r + o_b, B - 1, mask=m_r)
            tl.store(row_position_ptr + r + o_b, 0, mask=m_r)
            tl.store(row_slot_ptr + r + o_b, C + MASKS, mask=m_r)
            tl.store(row_token_ptr + r + o_b, 0, mask=m_r)
            if MASKS:
                tl.store(row_prefix_ptr + r + o_b, 0, mask=m_r)
                tl.store(row_span_ptr + r + o_b, C + MASKS + 1, mask=m_r)


@op(
    mutates=[f"sequences_{f.name}" for f in fields(Sequences) if f.name != "limit"]
    + [f"rows_{f.name}" for f in fields(Rows)]
)
def advance(
    sequences: Sequences,
    rows: Rows,
    terms: Terms,
    token: Tensor,
    confidence: Tensor,
    *,
    k: int,
    verify: bool,
    mask_token_id: int,
    masks: int = 0,
) -> None:
    """Take in one pass's readout (token, confidence [R']) and plan the next, in place.

    `rows.start` tells whose row is whose in the readout; R' may differ from R (the prefill reads B * k rows). `masks`,
    with verification only: how many masks a sequence may bring behind other pending tokens than the last; `rows.behind`
    then tells which of the rows read out stand behind which token (see `Rows.expect_prefill`). A sequence with a faulty
    row in its readout (confidence NaN) ends with status FAULT and emits nothing of that pass.

        token, confidence = readout(logits, mask_token_id)
        advance(sequences, rows, terms, token, confidence, k=8, verify=True, mask_token_id=mask_token_id)
    """
    on_host = takes_host(sequences, rows, terms, k, masks)
    form = advance_on_host if on_host else partial(advance_at_once, masks=masks)
    form(sequences, rows, terms, token, confidence, k=k, verify=verify, mask_token_id=mask_token_id)


def advance_at_once(
    sequences: Sequences,
    rows: Rows,
    terms: Terms,
    token: Tensor,
    confidence: Tensor,
    *,
    k: int,
    verify: bool,
    mask_token_id: int,
    masks: int = 0,
) -> None:
    """`advance` in plain torch, of all sequences at once."""
    # Everything is [B, 1] or [B, 2k - 1 + masks], a column a row, as in the kernel.
    tokens = sequences.tokens
    columns = ("length", "pending", "limit", "status", "passes", "hits", "chains")
    length, pending, limit, status, passes, hits, chains = (getattr(sequences, name)[:, None] for name in columns)
    trash = tokens.shape[1] - 1
    o_w = torch.arange(2 * k - 1 + masks, device=tokens.device)
    o_row = rows.start[:-1, None] + o_w
    no_row = o_row >= rows.start[1:, None]
    o_row = o_row.clamp(max=token.shape[0] - 1)
    y = token[o_row]
    c = confidence[o_row].masked_fill_(no_row, -torch.inf)
    fault = c.isnan().any(1, keepdim=True)

    # How many columns stand from the left: drafts that are confirmed, the last pending row, masks above the threshold.
    first, last = length - pending, pending - 1
    position = first + 1 + o_w
    if verify:
        same = y == tokens.gather(1, position.clamp(max=trash))
        trusted = torch.minimum(same.long().cumprod(1).sum(1, keepdim=True), last)
        if masks:
            # The masks that count take the columns behind the trusted ones, wherever they stand.
            o_k = torch.arange(k, device=tokens.device)
            count = trusted + 1 + (rows.behind * (o_k == trusted)).sum(1, keepdim=True)
            passed = (rows.behind * ((o_k < trusted) | (o_k == last))).sum(1, keepdim=True)
            shift = torch.where(trusted < last, last - trusted + passed, 0)
            taken = torch.where(o_w > trusted, o_w + shift, o_w).clamp(max=2 * k - 2 + masks)
            o_w, position = o_w[: 2 * k - 1], position[:, : 2 * k - 1]
            y, c = (x.gather(1, taken[:, : 2 * k - 1]) for x in (y, c))
        else:
            count = torch.where(trusted == last, 2 * k - 1, trusted + 1)
        stands = ((c > terms.threshold) & (o_w < count)) | (o_w <= trusted)
    else:
        trusted = last
        stands = (c > terms.threshold) | (o_w < last)
    # The columns from `trusted` up to here are kept.
    reach = torch.maximum(stands.long().cumprod(1).sum(1, keepdim=True), trusted + 1)

    active = status == RUNNING
    running = active & ~fault
    is_stop = (y[:, :, None] == terms.stop_ids[:, None]).any(2)
    sure = None
    if verify:
        # What this pass has shown of its sequence, and which of the sure drafts are worth a row.
        tried = rows.start.diff()[:, None] > 1
        hits.copy_(torch.where(running, remembered(hits, trusted, tried), hits))
        chains.copy_(torch.where(running, remembered(chains, (trusted < k - 1).long(), tried), chains))
        o_j = torch.arange(k - 1, device=tokens.device)
        sure = c.gather(1, trusted + 1 + o_j)
        is_draft = o_j < reach - trusted - 1
        reached = torch.where(is_draft, sure.double(), 0).cumprod(1)
        reach = trusted + 1 + (is_draft & (reached >= terms.price)).sum(1, keepdim=True)
        # Nothing behind a stop token is ever emitted.
        stops = is_stop & (o_w > trusted) & (o_w < reach)
        reach = torch.where(stops, o_w + 1, reach).amin(1, keepdim=True)
    keep = (o_w >= trusted) & (o_w < reach) & (position < limit) & running
    tokens.scatter_(1, torch.where(keep, position, trash), y)

    start = first + trusted + 1
    emitted_before = first + 1 if verify else length
    end = torch.minimum(start + 1 if verify else first + 1 + reach, limit)
    stop = is_stop & (position >= emitted_before)
    stop_end = torch.where(stop, position + 1, trash + 1).amin(1, keepdim=True)
    stopped = stop_end <= end
    # A faulty sequence ends where its emitted tokens end: the drafts of a verified one are dropped.
    end = torch.where(fault, emitted_before, torch.minimum(end, stop_end))

    finished = stopped | fault | (end >= limit)
    length_next = torch.where(finished, end, torch.minimum(first + 1 + reach, limit))
    ending = torch.where(fault, FAULT, torch.where(stopped, STOPPED, LIMIT))
    sequences.blocks.scatter_(1, torch.where(running, passes, sequences.blocks.shape[1] - 1), end - emitted_before)
    passes.add_(running)
    pending.copy_((length_next - start) * (active & ~finished))
    length.copy_(torch.where(active, length_next, length))
    status.copy_(torch.where(active & finished, ending, status))
    plan(sequences, rows, terms, k=k, verify=verify, mask_token_id=mask_token_id, masks=masks, sure=sure)


@advance.kernel
def advance_triton(sequences, rows, terms, token, confidence, *, k, verify, mask_token_id, masks=0):
    """`advance` in one launch of one program; the same decisions as the torch form, bit for bit."""
    B, W = sequences.length.shape[0], triton.next_power_of_2(2 * k - 1 + masks)
    BLOCK_B = triton.next_power_of_2(B)
    # At most 2,048 elements a tile, so that the tiles stay in registers.
    BLOCK_W = min(W, max(1, 2048 // BLOCK_B))
    # In the order of the kernel's arguments, and of the fields.
    state = *vars(sequences).values(), *vars(rows).values(), token, confidence, *vars(terms).values()
    strides = sequences.tokens.stride(0), sequences.blocks.stride(0)
    numbers = B, rows.seq.shape[0], sequences.tokens.shape[1] - 1, terms.stop_ids.shape[1], mask_token_id
    sizes = {"K": k, "VERIFY": verify, "MASKS": masks, "W": W, "BLOCK_B": BLOCK_B, "BLOCK_W": BLOCK_W}
    sizes["num_warps"] = 4 if BLOCK_B * BLOCK_W <= 1024 else 16
    _advance_kernel[(1,)](*state, *strides, *numbers, **sizes, **_CONSTANTS, **pdl_options(token.device))
