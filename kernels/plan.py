"""Plan: which rows the next pass has, in plain torch. The rules stand in kernels/advance.py, whose kernel has its own.

Shapes   see Sequences, Rows and Terms (kernels/state.py); sure [B, k - 1]
Source   this project's
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtpkern.kernels.groups import chance_of_reference, deal_masks_reference, masks_wanted_reference
from mtpkern.kernels.state import RUNNING, Rows, Sequences, Terms
from mtpkern.kernels.worth import odds_of_reference, worth_reference


def plan(
    sequences: Sequences,
    rows: Rows,
    terms: Terms,
    *,
    k: int,
    verify: bool,
    mask_token_id: int,
    masks: int = 0,
    sure: Tensor | None = None,
) -> None:
    """Plan the next pass, in place: what `advance` ends with, or anew where sequences have been put in or taken out.

    One that is RUNNING and has pending tokens, the last of its `length`, is planned as if `advance` had left it so.
    sure [B, k - 1], with verification: the confidences of the pending tokens behind the first. Where they are no longer
    known they count as 1, which may deal masks out otherwise and changes nothing that verification emits. Plain torch
    operations on any device, none of which waits for it.

        sequences.length[b], sequences.pending[b], sequences.status[b] = 9, 1, RUNNING    # a prompt of nine tokens
        plan(sequences, rows, terms, k=8, verify=True, mask_token_id=mask_token_id)
    """
    tokens, length, pending, limit = sequences.tokens, sequences.length, sequences.pending, sequences.limit
    B, R, trash = length.shape[0], rows.seq.shape[0], masks + tokens.shape[1] - 1
    first = length - pending
    capped = verify and terms.budget is not None
    budget = terms.budget.clamp(max=R) if verify and terms.budget is not None else R
    if verify and (capped or B * k > R):
        # Drafts that the next pass has no rows for are dropped: the highest even level that fits.
        level = torch.arange(1, k + 1, device=tokens.device)[:, None]
        level = (torch.minimum(pending, level).sum(1) <= budget).sum().clamp(min=1)
        pending.copy_(torch.minimum(pending, level))
        length.copy_(torch.where(pending > 0, first + pending, length))

    # Masks that a sequence can use: with m of them a pass reaches m + 1 tokens beyond its standing length.
    want = (limit - length - 1).clamp(min=0, max=k - 1) * (sequences.status == RUNNING)
    if verify:
        odds = odds_of_reference(sequences.hits, sequences.chains)
        sure = torch.ones(B, k - 1, dtype=torch.float32, device=tokens.device) if sure is None else sure
        is_draft = torch.arange(k - 1, device=tokens.device) < pending[:, None] - 1
        # From the left, as the kernel; `prod` has an order of its own.
        chance = F.pad(torch.where(is_draft, sure.double(), 1), (1, 0), value=1.0).cumprod(1)[:, -1:]
        want = torch.minimum(want, worth_reference(chance, odds, terms.price, k)[:, 0])
        # Whatever becomes of a draft that is a stop token, nothing behind it is ever emitted.
        last = tokens.gather(1, (length - 1).clamp(min=0)[:, None])
        want = want.masked_fill((pending > 1) & (last == terms.stop_ids).any(1), 0)
    want_last = want
    if masks:
        assert sure is not None  # masks behind drafts come with verification
        chance = chance_of_reference(sure)
        groups = masks_wanted_reference(first, pending, limit, k)
        groups = torch.minimum(groups, worth_reference(chance, odds, terms.price, k))
        want = want_last + groups.sum(1).clamp(max=masks)
    dealt = want
    if capped or B * (2 * k - 1 + masks) > R:
        # The highest even level that fits, then one more each to the first that want it.
        spare = budget - pending.sum()
        used_at = torch.minimum(want, torch.arange(k + masks, device=tokens.device)[:, None]).sum(1)  # nondecreasing
        level = (used_at <= spare).sum(0, keepdim=True) - 1
        hungry = want > level
        extra = hungry & (hungry.cumsum(0) <= spare - used_at.gather(0, level))
        dealt = torch.minimum(want, level) + extra

    rows.start[1:] = (pending + dealt).cumsum(0)
    o_r = torch.arange(R, device=tokens.device)
    unused = o_r >= rows.start[-1]
    seq = torch.searchsorted(rows.start[1:], o_r, right=True).clamp_(max=B - 1)
    # A row's place among those of its sequence; `behind`, the pending token that it is or stands behind, and how far.
    place = o_r - rows.start[:-1][seq]
    behind = torch.minimum(place, pending[seq] - 1)
    slot = masks + first[seq] + place
    if masks:
        behind_last = torch.minimum(dealt, want_last)
        groups = deal_masks_reference(groups, chance, dealt - behind_last)
        o_k = torch.arange(k, device=tokens.device)
        rows.behind.copy_(torch.where(o_k == pending[:, None] - 1, behind_last[:, None], F.pad(groups, (0, 1))))
        end = groups.cumsum(1)
        scratch = place - (pending + behind_last)[seq]
        group = (end[seq] <= scratch[:, None]).sum(1).clamp(max=k - 2)
        step = scratch + 1 - (end - groups)[seq, group]
        in_scratch = scratch >= 0
        behind, slot = torch.where(in_scratch, group, behind), torch.where(in_scratch, scratch, slot)
        step = torch.where(in_scratch, step, place - behind)
        rows.prefix_end.copy_((masks + 1 + first[seq] + behind).masked_fill_(unused, 0))
        rows.span_start.copy_((slot + 1 - step).masked_fill_(unused, trash + 1))
    else:
        step = place - behind
    position = (first[seq] + behind + step).masked_fill_(unused, 0)
    known = torch.where(step == 0, tokens[seq, position], mask_token_id)
    rows.seq.copy_(seq)
    rows.position.copy_(position)
    rows.slot.copy_(slot.masked_fill_(unused, trash))
    rows.token.copy_(known.masked_fill_(unused, 0))
