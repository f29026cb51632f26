"""Advance: accept, stop, write out and plan the next pass, for every sequence at once, without the host.

A sequence's last `pending` tokens have no true KV yet: they are its rows of this pass, followed by masks. With s the
position of the first pending token, x its tokens, y_j and c_j the token and confidence read from its j-th row:

    trusted  t = pending - 1                                         unverified: every pending token stands
             t = number of leading j < pending - 1 with y_j = x_{s+j+1}   verified: a draft stands while the row before
                                                                     it says the same
    kept     n = 1 + number of leading i >= 1 with c_{t+i} > threshold, over the mask rows; masks count only where
             every pending token is trusted. Unverified, n = 1 as well where c_t itself is not above the threshold.
    write    x_{s+t+1+i} = y_{t+i}   for i < n, below the limit
    pending' = n                     length' = s + t + 1 + n

What is emitted now is certain: unverified all up to length', verified all up to and including y_t; the n - 1 tokens
behind it are drafts that the next pass will confirm or replace. Emission is cut behind the first stop token and at
the limit. Static(k) is the unverified form with a threshold below every confidence.

The next pass: each running sequence brings its pending tokens and up to k - 1 masks, packed one sequence behind the
other into R rows. R >= B * k always holds all pending tokens; what is left of R is dealt out as masks, evenly, the
remainder to the first. Finished sequences bring nothing; rows left over go to the trash slot C.

Shapes   see Sequences and Rows; token, confidence [R']
Traffic  a few kilobytes: pure latency
Source   arXiv 2602.06019, "Static vs. Adaptive Decoding Strategies"; verification is this project's
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RUNNING, STOPPED, LIMIT, FAULT = 0, 1, 2, 3


@dataclass(frozen=True)
class Sequences:
    """What decoding knows of B sequences, all on the device and never moved. C is the capacity.

    tokens [B, C + 1] int64 (column C is trash); length, pending, limit, passes [B] int64; status [B] int64 (RUNNING,
    STOPPED at a stop token, LIMIT reached, FAULT in the logits); blocks [B, P + 1] int64, the tokens that each pass
    emitted, one column a pass (column P is trash). `length` counts prompt and standing tokens; `limit` bounds it.
    """

    tokens: Tensor
    length: Tensor
    pending: Tensor
    limit: Tensor
    status: Tensor
    passes: Tensor
    blocks: Tensor

    @classmethod
    def allocate(cls, batch: int, capacity: int, max_passes: int, device: torch.device) -> Sequences:
        """B empty running sequences that hold up to `capacity` tokens and `max_passes` passes."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        return cls(
            tokens=zeros(batch, capacity + 1),
            length=zeros(batch),
            pending=zeros(batch),
            limit=zeros(batch),
            status=zeros(batch),
            passes=zeros(batch),
            blocks=zeros(batch, max_passes + 1),
        )


@dataclass(frozen=True)
class Rows:
    """The rows of one pass: seq, position, slot, token [R] int64, and start [B + 1] int64.

    Sequence b owns the rows start[b] .. start[b + 1] - 1. Rows from start[B] are unused: slot C, position 0, token 0.
    """

    seq: Tensor
    position: Tensor
    slot: Tensor
    token: Tensor
    start: Tensor

    @classmethod
    def allocate(cls, rows: int, batch: int, device: torch.device) -> Rows:
        """R rows, planned by the first `advance`; `start` says where the rows of the pass before stood."""
        seq, position, slot, token = torch.zeros(4, rows, dtype=torch.int64, device=device)
        return cls(seq, position, slot, token, torch.zeros(batch + 1, dtype=torch.int64, device=device))


def advance(
    sequences: Sequences,
    rows: Rows,
    token: Tensor,
    confidence: Tensor,
    threshold: Tensor,
    stop_ids: Tensor,
    *,
    k: int,
    verify: bool,
    mask_token_id: int,
) -> None:
    """Take in one pass's readout (token, confidence [R']) and plan the next, in place.

    `rows.start` tells whose row is whose in the readout; R' may differ from R (the prefill reads B * k rows).
    threshold is a 0-dim tensor, stop_ids [S] int64 (-1 matches nothing). A sequence with a faulty row in its readout
    (confidence NaN) ends with status FAULT and emits nothing of that pass.

        token, confidence = readout(logits, mask_token_id)
        advance(sequences, rows, token, confidence, threshold, stop_ids, k=8, verify=True, mask_token_id=mask_token_id)
    """
    advance_reference(
        sequences, rows, token, confidence, threshold, stop_ids, k=k, verify=verify, mask_token_id=mask_token_id
    )


def advance_reference(
    sequences: Sequences,
    rows: Rows,
    token: Tensor,
    confidence: Tensor,
    threshold: Tensor,
    stop_ids: Tensor,
    *,
    k: int,
    verify: bool,
    mask_token_id: int,
) -> None:
    """`advance` in plain torch: batched tensor operations, no host synchronisation, no loop over sequences."""
    _accept(sequences, rows.start, token, confidence, threshold, stop_ids, k=k, verify=verify)
    _plan(sequences, rows, k=k, mask_token_id=mask_token_id)


def _leading(true: Tensor) -> Tensor:
    """How many entries of each row are true before the first false one: [B, n] bool -> [B] int64."""
    return true.long().cumprod(1).sum(1)


def _accept(
    sequences: Sequences,
    row_start: Tensor,
    token: Tensor,
    confidence: Tensor,
    threshold: Tensor,
    stop_ids: Tensor,
    *,
    k: int,
    verify: bool,
) -> None:
    tokens, length, pending, limit, status = (
        sequences.tokens,
        sequences.length,
        sequences.pending,
        sequences.limit,
        sequences.status,
    )
    trash = tokens.shape[1] - 1
    o_w = torch.arange(2 * k - 1, device=tokens.device)  # a sequence brings at most 2k - 1 rows
    o_k = o_w[:k]

    count = row_start.diff()[:, None]
    o_row = (row_start[:-1, None] + o_w).clamp(max=token.shape[0] - 1)
    y, c = token[o_row], confidence[o_row]  # [B, 2k - 1]
    running = status == RUNNING
    fault = running & (c.isnan() & (o_w < count)).any(1)
    running = running & ~fault

    first = length - pending
    if verify:
        x = tokens.gather(1, (first[:, None] + 1 + o_w).clamp(max=trash))
        trusted = _leading((y == x) & (o_w < pending[:, None] - 1))
    else:
        trusted = pending - 1
    o_candidate = trusted[:, None] + o_k
    masks_count = (trusted == pending - 1)[:, None] & (o_candidate < count)
    o_candidate = o_candidate.clamp(min=0, max=2 * k - 2)  # a finished sequence has no row: trusted may be -1
    sure = (c.gather(1, o_candidate) > threshold) & masks_count
    if verify:
        kept = 1 + _leading(sure[:, 1:])
    else:
        kept = _leading(sure).clamp(min=1)

    start = first + trusted + 1
    o_new = start[:, None] + o_k
    write = running[:, None] & (o_k < kept[:, None]) & (o_new < limit[:, None])
    tokens.scatter_(1, torch.where(write, o_new, trash), y.gather(1, o_candidate))

    emitted_before = first + 1 if verify else length
    end = torch.minimum(start + 1 if verify else start + kept, limit)
    o_out = emitted_before[:, None] + o_k  # a pass emits at most k tokens, in either form
    out = tokens.gather(1, o_out.clamp(max=trash))
    stop = (out[:, :, None] == stop_ids).any(2) & (o_out < end[:, None])
    stopped = stop.any(1)
    end = torch.where(stopped, emitted_before + _leading(~stop) + 1, end)

    finished = stopped | (end >= limit)
    length_next = torch.where(finished, end, torch.minimum(start + kept, limit))
    pending_next = torch.where(finished, 0, length_next - start)
    status_next = torch.where(stopped, STOPPED, torch.where(finished, LIMIT, RUNNING))

    o_pass = torch.where(running, sequences.passes, sequences.blocks.shape[1] - 1)
    sequences.blocks.scatter_(1, o_pass[:, None], (end - emitted_before)[:, None])
    sequences.passes.add_(running)
    status.copy_(torch.where(running, status_next, torch.where(fault, FAULT, status)))
    # A faulty sequence ends where its emitted tokens end: the drafts of a verified one are dropped.
    length.copy_(torch.where(running, length_next, torch.where(fault, emitted_before, length)))
    pending.copy_(torch.where(running, pending_next, 0))


def _plan(sequences: Sequences, rows: Rows, *, k: int, mask_token_id: int) -> None:
    tokens, length, pending = sequences.tokens, sequences.length, sequences.pending
    R, trash = rows.seq.shape[0], tokens.shape[1] - 1

    # Masks that a sequence can use: with m of them a pass reaches m + 1 tokens beyond its standing length.
    running = sequences.status == RUNNING
    want = torch.where(running, (sequences.limit - length - 1).clamp(min=0, max=k - 1), 0)
    spare = R - pending.sum()
    # The highest even level that fits, then one more each to the first that want it.
    used_at = torch.minimum(want, torch.arange(k, device=tokens.device)[:, None]).sum(1)  # [k], nondecreasing
    level = (used_at <= spare).sum(0, keepdim=True) - 1
    hungry = want > level
    extra = hungry & (hungry.cumsum(0) <= spare - used_at.gather(0, level))
    masks = torch.minimum(want, level) + extra

    rows.start[1:] = (pending + masks).cumsum(0)
    o_r = torch.arange(R, device=tokens.device)
    seq = torch.searchsorted(rows.start[1:], o_r, right=True).clamp(max=length.shape[0] - 1)
    offset = o_r - rows.start[seq]
    in_use = o_r < rows.start[-1]
    position = torch.where(in_use, (length - pending)[seq] + offset, 0)
    rows.seq.copy_(seq)
    rows.position.copy_(position)
    rows.slot.copy_(torch.where(in_use, position, trash))
    known = torch.where(in_use & (offset < pending[seq]), tokens[seq, position], mask_token_id)
    rows.token.copy_(torch.where(in_use, known, 0))
