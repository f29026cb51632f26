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

The kernel is one program, because dealing out the budget needs every sequence. Its tiles are [B, columns], and column i
of a sequence is its i-th row: row i's token belongs at position s + 1 + i whatever becomes of it, so accepting needs no
gather. Nothing that the program writes is read again by it; the next pending tokens come from the readout once more.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from mtpkern.kernels.form import takes_kernel

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

    def first(self, rows: int) -> Rows:
        """The first `rows` of these, in the same memory; all of them where there are no more."""
        if rows >= len(self.seq):
            return self
        return Rows(self.seq[:rows], self.position[:rows], self.slot[:rows], self.token[:rows], self.start)


if find_spec("triton"):
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["s_tokens", "s_blocks", "B", "R", "C", "S", "mask_token_id"])
    def _advance_kernel(
        tokens_ptr,  # [B, C + 1]
        length_ptr,  # [B], as the four below
        pending_ptr,
        limit_ptr,
        status_ptr,
        passes_ptr,
        blocks_ptr,  # [B, P + 1]
        row_seq_ptr,  # [R], as the three below
        row_position_ptr,
        row_slot_ptr,
        row_token_ptr,
        row_start_ptr,  # [B + 1]
        token_ptr,  # [R']
        confidence_ptr,  # [R']
        threshold_ptr,  # []
        stop_ids_ptr,  # [S]
        s_tokens,
        s_blocks,
        B,
        R,
        C,
        S,
        mask_token_id,
        K: tl.constexpr,
        VERIFY: tl.constexpr,
        W: tl.constexpr,  # columns, at least 2 * K - 1
        BLOCK_B: tl.constexpr,  # at least B
        BLOCK_W: tl.constexpr,
        RUNNING: tl.constexpr,
        STOPPED: tl.constexpr,
        LIMIT: tl.constexpr,
        FAULT: tl.constexpr,
    ):
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
        unsure = tl.minimum(tl.where(trusted == pending - 1, trusted + K, trusted + 1), count)
        for w in range(0, W, BLOCK_W):
            i = (w + o_w)[None, :]
            c = tl.load(confidence_ptr + row[:, None] + i, mask=i < count[:, None], other=0.0)
            candidate = i > trusted[:, None] if VERIFY else i >= trusted[:, None]
            unsure = tl.minimum(unsure, tl.min(tl.where(candidate & ~(c > threshold), i, W), 1))
        kept = tl.maximum(unsure - trusted, 1)

        # Write the kept tokens, and find the first stop token among those that are emitted.
        start = first + trusted + 1
        emitted_before = first + 1 if VERIFY else length
        end = tl.minimum(start + 1 if VERIFY else start + kept, limit)
        stop_end = tl.full([BLOCK_B], 2147483647, tl.int32)
        for w in range(0, W, BLOCK_W):
            i = (w + o_w)[None, :]
            position = first[:, None] + 1 + i
            keep = (i >= trusted[:, None]) & (i < (trusted + kept)[:, None]) & (position < limit[:, None])
            emit = (position >= emitted_before[:, None]) & (position < end[:, None])
            y = tl.load(token_ptr + row[:, None] + i, mask=running[:, None] & (keep | emit), other=0)
            tl.store(p_tokens[:, None] + position, y, mask=running[:, None] & keep)
            stop = emit & (y != y)
            for j in range(S):
                stop |= emit & (y == tl.load(stop_ids_ptr + j))
            stop_end = tl.minimum(stop_end, tl.min(tl.where(stop, position + 1, 2147483647), 1))
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
        # A faulty sequence ends where its emitted tokens end: the drafts of a verified one are dropped.
        tl.store(length_ptr + o_b, tl.where(fault, emitted_before, length_next), mask=running | fault)
        tl.store(pending_ptr + o_b, pending_next, mask=m_b)

        # Masks: the highest even level that fits, then one more each to the first that want it.
        want = tl.where(running & ~finished, tl.minimum(tl.maximum(limit - length_next - 1, 0), K - 1), 0)
        spare = R - tl.sum(pending_next, 0)
        level = -1
        used = 0
        for w in range(0, W, BLOCK_W):
            j = w + o_w
            used_at = tl.sum(tl.minimum(want[:, None], j[None, :]), 0)  # nondecreasing in j
            fits = (j < K) & (used_at <= spare)
            level += tl.sum(fits.to(tl.int32), 0)
            used = tl.maximum(used, tl.max(tl.where(fits, used_at, 0), 0))
        hungry = want > level
        extra = hungry & (tl.cumsum(hungry.to(tl.int32), 0) <= spare - used)
        rows = pending_next + tl.minimum(want, level) + extra.to(tl.int32)

        # Other threads may still be at the old row starts.
        tl.debug_barrier()
        row_end = tl.cumsum(rows, 0)
        tl.store(row_start_ptr + 1 + o_b, row_end, mask=m_b)
        for w in range(0, W, BLOCK_W):
            i = (w + o_w)[None, :]
            o_r = (row_end - rows)[:, None] + i
            m_r = i < rows[:, None]
            m_known = i < pending_next[:, None]
            known = tl.load(token_ptr + (row + trusted)[:, None] + i, mask=m_known, other=0)
            tl.store(row_seq_ptr + o_r, tl.broadcast_to(o_b[:, None], BLOCK_B, BLOCK_W), mask=m_r)
            tl.store(row_position_ptr + o_r, start[:, None] + i, mask=m_r)
            tl.store(row_slot_ptr + o_r, start[:, None] + i, mask=m_r)
            tl.store(row_token_ptr + o_r, tl.where(m_known, known, mask_token_id), mask=m_r)
        in_use = tl.sum(rows, 0)
        for r in range(0, R, BLOCK_B):
            m_r = (r + o_b >= in_use) & (r + o_b < R)
            tl.store(row_seq_ptr + r + o_b, B - 1, mask=m_r)
            tl.store(row_position_ptr + r + o_b, 0, mask=m_r)
            tl.store(row_slot_ptr + r + o_b, C, mask=m_r)
            tl.store(row_token_ptr + r + o_b, 0, mask=m_r)


def advance_triton(
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
    """`advance` in one launch of one program; the same decisions as the torch form, bit for bit."""
    B, W = sequences.length.shape[0], triton.next_power_of_2(2 * k - 1)
    BLOCK_B = triton.next_power_of_2(B)
    # At most 2,048 elements a tile, so that the tiles stay in registers.
    BLOCK_W = min(W, max(1, 2048 // BLOCK_B))
    _advance_kernel[(1,)](
        sequences.tokens,
        sequences.length,
        sequences.pending,
        sequences.limit,
        sequences.status,
        sequences.passes,
        sequences.blocks,
        rows.seq,
        rows.position,
        rows.slot,
        rows.token,
        rows.start,
        token,
        confidence,
        threshold,
        stop_ids,
        sequences.tokens.stride(0),
        sequences.blocks.stride(0),
        B,
        rows.seq.shape[0],
        sequences.tokens.shape[1] - 1,
        stop_ids.shape[0],
        mask_token_id,
        K=k,
        VERIFY=verify,
        W=W,
        BLOCK_B=BLOCK_B,
        BLOCK_W=BLOCK_W,
        RUNNING=RUNNING,
        STOPPED=STOPPED,
        LIMIT=LIMIT,
        FAULT=FAULT,
        num_warps=4 if BLOCK_B * BLOCK_W <= 1024 else 16,
    )


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
    if torch.compiler.is_compiling():
        state = *vars(sequences).values(), *vars(rows).values()
        _advance_op(*state, token, confidence, threshold, stop_ids, k, verify, mask_token_id)
        return
    form = advance_triton if takes_kernel(token) else advance_reference
    form(sequences, rows, token, confidence, threshold, stop_ids, k=k, verify=verify, mask_token_id=mask_token_id)


@torch.library.custom_op(
    "mtpkern::advance",
    mutates_args=(
        *("tokens", "length", "pending", "status", "passes", "blocks"),
        *("row_seq", "row_position", "row_slot", "row_token", "row_start"),
    ),
)
def _advance_op(
    tokens: Tensor,
    length: Tensor,
    pending: Tensor,
    limit: Tensor,
    status: Tensor,
    passes: Tensor,
    blocks: Tensor,
    row_seq: Tensor,
    row_position: Tensor,
    row_slot: Tensor,
    row_token: Tensor,
    row_start: Tensor,
    token: Tensor,
    confidence: Tensor,
    threshold: Tensor,
    stop_ids: Tensor,
    k: int,
    verify: bool,
    mask_token_id: int,
) -> None:
    sequences = Sequences(tokens, length, pending, limit, status, passes, blocks)
    rows = Rows(row_seq, row_position, row_slot, row_token, row_start)
    advance(sequences, rows, token, confidence, threshold, stop_ids, k=k, verify=verify, mask_token_id=mask_token_id)


@_advance_op.register_fake
def _(*args: object) -> None:
    pass


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
    # Everything is [B, 1] or [B, 2k - 1], a column a row, as in the kernel.
    tokens = sequences.tokens
    length, pending, limit, status, passes = (
        x[:, None] for x in (sequences.length, sequences.pending, sequences.limit, sequences.status, sequences.passes)
    )
    trash = tokens.shape[1] - 1
    o_w = torch.arange(2 * k - 1, device=tokens.device)
    o_row = row_start[:-1, None] + o_w
    no_row = o_row >= row_start[1:, None]
    o_row = o_row.clamp(max=token.shape[0] - 1)
    y = token[o_row]
    c = confidence[o_row].masked_fill_(no_row, -torch.inf)
    fault = c.isnan().any(1, keepdim=True)

    # How many columns stand from the left: drafts that are confirmed, the last pending row, masks above the threshold.
    first, last = length - pending, pending - 1
    position = first + 1 + o_w
    sure = c > threshold
    if verify:
        same = y == tokens.gather(1, position.clamp(max=trash))
        stands = torch.where(o_w < last, same, sure | (o_w == last))
        leading = stands.long().cumprod(1).sum(1, keepdim=True)
        trusted = torch.minimum(leading, last)
    else:
        leading = (sure | (o_w < last)).long().cumprod(1).sum(1, keepdim=True)
        trusted = last
    reach = torch.maximum(leading, trusted + 1)  # the columns from `trusted` up to here are kept

    active = status == RUNNING
    running = active & ~fault
    keep = (o_w >= trusted) & (o_w < reach) & (position < limit) & running
    tokens.scatter_(1, torch.where(keep, position, trash), y)

    start = first + trusted + 1
    emitted_before = first + 1 if verify else length
    end = torch.minimum(start + 1 if verify else first + 1 + reach, limit)
    stop = (y[:, :, None] == stop_ids).any(2) & (position >= emitted_before)
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


def _plan(sequences: Sequences, rows: Rows, *, k: int, mask_token_id: int) -> None:
    tokens, length, pending = sequences.tokens, sequences.length, sequences.pending
    B, R, trash = length.shape[0], rows.seq.shape[0], tokens.shape[1] - 1

    # Masks that a sequence can use: with m of them a pass reaches m + 1 tokens beyond its standing length.
    masks = (sequences.limit - length - 1).clamp(min=0, max=k - 1) * (sequences.status == RUNNING)
    if B * (2 * k - 1) > R:
        # The highest even level that fits, then one more each to the first that want it.
        spare = R - pending.sum()
        used_at = torch.minimum(masks, torch.arange(k, device=tokens.device)[:, None]).sum(1)  # [k], nondecreasing
        level = (used_at <= spare).sum(0, keepdim=True) - 1
        hungry = masks > level
        extra = hungry & (hungry.cumsum(0) <= spare - used_at.gather(0, level))
        masks = torch.minimum(masks, level) + extra

    rows.start[1:] = (pending + masks).cumsum(0)
    o_r = torch.arange(R, device=tokens.device)
    unused = o_r >= rows.start[-1]
    seq = torch.searchsorted(rows.start[1:], o_r, right=True).clamp_(max=B - 1)
    position = (o_r + (length - pending - rows.start[:-1])[seq]).masked_fill_(unused, 0)
    known = torch.where(position < length[seq], tokens[seq, position], mask_token_id)
    rows.seq.copy_(seq)
    rows.position.copy_(position)
    rows.slot.copy_(position.masked_fill(unused, trash))
    rows.token.copy_(known.masked_fill_(unused, 0))
