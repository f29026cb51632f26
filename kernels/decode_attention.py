"""Decode attention: packed rows of several sequences against their KV caches.

    o_rh = sum_j p_rhj v_j        p_rh = softmax_j over visible j of softcap(scale * q_rh . k_j)

Row r belongs to sequence row_seq_r and stands in slot row_slot_r of its cache. Slot = position, and this pass's own
keys are written before attention runs, so the rule of span_mask shrinks to one comparison: an empty span and
prefix_end = slot + 1.

    visible(r, j) = slot_r - window < j <= slot_r         nothing for a row in the trash slot C

Query head h reads key/value head h // G. A sink is one more logit per query head that takes probability and brings no
value (gpt-oss).

Shapes   query [R, Hq, D];  k_cache, v_cache [B, Hkv, C + 1, D];  row_seq, row_slot [R], row_start [B + 1] int64;
         sinks [Hq];  out [R, Hq, D]
Traffic  reads 2 * Hkv * D elements for every visible slot of every sequence once: bandwidth-bound up to k = 16
Faults   unused rows give 0; slots that no row sees may hold anything, NaN included

The kernel is split-KV: a program takes a tile of one sequence's rows under one KV head, with the G query heads of each
row packed into the tile, and one split of the keys that the tile sees. Lengths are read on the device; the number of
splits follows from shapes alone, so a captured graph stays right as sequences grow. A second launch merges the splits.
(Merging in the block that finishes last would save it, but is a race without a barrier that the compiler may drop.)
Where the batch alone fills the GPU there is one split and one launch. The rows of a sequence are taken to stand in
consecutive slots, as `advance` plans them: between the lowest and the highest key that a tile sees lies nothing unseen.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

# Keys of a split in the batch-invariant mode, counted from slot 0.
CHUNK = 256

if find_spec("triton"):
    import triton
    import triton.language as tl

    @triton.jit
    def _load(ptr, o_row, m_row, s_row, s_col, FIRST: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
        """A tile [rows, COLS] from column FIRST on, 0 where m_row is false or the column is not below D."""
        o_d = FIRST + tl.arange(0, COLS)
        mask = m_row[:, None]
        if FIRST + COLS > D:
            mask = mask & (o_d < D)[None, :]
        return tl.load(ptr + o_row[:, None] * s_row + o_d[None, :] * s_col, mask=mask, other=0.0)

    @triton.jit
    def _store(ptr, x, p_row, m_row, s_col, FIRST: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
        o_d = FIRST + tl.arange(0, COLS)
        tl.store(ptr + p_row[:, None] + o_d[None, :] * s_col, x, mask=m_row[:, None] & (o_d < D)[None, :])

    @triton.jit(do_not_specialize=["B", "R", "C", "n_splits", "window"])
    def _attend_kernel(  # type: ignore[no-untyped-def]
        q_ptr,  # [R, Hq, D]
        k_ptr,  # [B, Hkv, C + 1, D]
        v_ptr,  # [B, Hkv, C + 1, D]
        row_slot_ptr,  # [R]
        row_start_ptr,  # [B + 1]
        sinks_ptr,  # [Hq] where HAS_SINKS
        out_ptr,  # [n_splits, R, Hq, D]
        lse_ptr,  # [n_splits, R, Hq], to base 2, where SPLIT
        s_q,  # the strides of each, as tuples
        s_k,
        s_v,
        s_out,
        s_lse,
        B,
        R,
        C,
        n_splits,
        scale,
        softcap,
        window,
        G: tl.constexpr,
        D: tl.constexpr,
        D_0: tl.constexpr,  # D in two powers of two, so that 96 is 64 + 32 and not 128
        D_1: tl.constexpr,
        TILES: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        SPLIT: tl.constexpr,
        CHUNK: tl.constexpr,  # keys of a split from slot 0 on; 0 divides what the tile sees among n_splits
        HAS_WINDOW: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        HAS_SINKS: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        LOG2E: tl.constexpr = 1.4426950408889634
        i_tile = tl.program_id(0) % TILES
        i_split = tl.program_id(0) // TILES
        h = tl.program_id(1)
        b = tl.program_id(2)

        if not SPLIT:
            # The programs behind the last sequence clear the rows that no sequence owns.
            if b == B:
                o_g = h * G + tl.arange(0, BLOCK_M)
                m_g = o_g < (h + 1) * G
                for r in range(tl.load(row_start_ptr + B).to(tl.int32) + i_tile, R, TILES):
                    p_row = tl.full([BLOCK_M], r, tl.int64) * s_out[1] + o_g * s_out[2]
                    _store(out_ptr, tl.zeros([BLOCK_M, D_0], tl.float32), p_row, m_g, s_out[3], 0, D_0, D)
                    if D_1:
                        _store(out_ptr, tl.zeros([BLOCK_M, D_1], tl.float32), p_row, m_g, s_out[3], D_0, D_1, D)
                return

        # The tile's rows: entry m is query head m % G of the sequence's row m // G.
        row = tl.load(row_start_ptr + b)
        n_rows = (tl.load(row_start_ptr + b + 1) - row).to(tl.int32)
        o_m = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        m_row = o_m < n_rows * G
        o_r = row + o_m // G
        o_h = h * G + o_m % G
        slot = tl.load(row_slot_ptr + o_r, mask=m_row, other=C).to(tl.int32)
        m_used = slot < C
        slot = tl.where(m_used, slot, -1)
        p_out = i_split.to(tl.int64) * s_out[0] + o_r * s_out[1] + o_h * s_out[2]
        p_lse = lse_ptr + i_split.to(tl.int64) * s_lse[0] + o_r * s_lse[1] + o_h * s_lse[2]

        # The tile's rows see keys in [begin, end), this split takes [low, high) of them, from a multiple of BLOCK_N on.
        end = tl.max(slot, 0) + 1
        begin = 0
        if HAS_WINDOW:
            begin = tl.maximum(tl.min(tl.where(m_used, slot, C), 0) - window + 1, 0)
        low = begin // BLOCK_N * BLOCK_N
        if CHUNK:
            high = tl.minimum((i_split + 1) * CHUNK, end)
            low = tl.maximum(i_split * CHUNK, low)
        else:
            share = tl.cdiv(tl.cdiv(end - low, BLOCK_N), n_splits) * BLOCK_N
            low += i_split * share
            high = tl.minimum(low + share, end)
        if low >= high:
            if SPLIT:
                tl.store(p_lse, tl.full([BLOCK_M], -float("inf"), tl.float32), mask=m_row)
            return

        q_0 = _load(q_ptr + o_h[:, None] * s_q[1], o_r, m_used, s_q[0], s_q[2], 0, D_0, D)
        if D_1:
            q_1 = _load(q_ptr + o_h[:, None] * s_q[1], o_r, m_used, s_q[0], s_q[2], D_0, D_1, D)
            acc_1 = tl.zeros([BLOCK_M, D_1], tl.float32)
        acc_0 = tl.zeros([BLOCK_M, D_0], tl.float32)
        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)

        # Offsets within a tile of keys fit 32 bits; those of the tile itself may not.
        o_n = tl.arange(0, BLOCK_N)
        k_ptr += b.to(tl.int64) * s_k[0] + h.to(tl.int64) * s_k[1] + low.to(tl.int64) * s_k[2]
        v_ptr += b.to(tl.int64) * s_v[0] + h.to(tl.int64) * s_v[1] + low.to(tl.int64) * s_v[2]
        for n in range(low, high, BLOCK_N):
            o_key = n + o_n
            # What no row sees is not even loaded: 0 * NaN is NaN.
            m_key = o_key < high
            visible = o_key[None, :] <= slot[:, None]
            if HAS_WINDOW:
                m_key = m_key & (o_key >= begin)
                visible = visible & (o_key[None, :] > slot[:, None] - window)

            s = tl.dot(q_0, _load(k_ptr, o_n, m_key, s_k[2], s_k[3], 0, D_0, D).T, input_precision=PRECISION)
            if D_1:
                k_1 = _load(k_ptr, o_n, m_key, s_k[2], s_k[3], D_0, D_1, D)
                s = tl.dot(q_1, k_1.T, s, input_precision=PRECISION)
            if HAS_SOFTCAP:
                # tanh(x) = 1 - 2 / (1 + exp(2 x)), right at both infinities
                s = softcap - 2 * softcap / (1 + tl.exp2(s * (2 * LOG2E * scale / softcap)))
                s *= LOG2E
            else:
                s *= LOG2E * scale
            s = tl.where(visible, s, -float("inf"))

            # A row that has seen no key yet keeps a top of -inf, which must not meet itself in a difference.
            top_next = tl.maximum(top, tl.max(s, 1))
            shift = tl.where(top_next == -float("inf"), 0.0, top_next)
            decay = tl.exp2(top - shift)
            p = tl.exp2(s - shift[:, None])
            total = total * decay + tl.sum(p, 1)
            top = top_next
            p = p.to(v_ptr.dtype.element_ty)
            v_0 = _load(v_ptr, o_n, m_key, s_v[2], s_v[3], 0, D_0, D)
            acc_0 = tl.dot(p, v_0, acc_0 * decay[:, None], input_precision=PRECISION)
            if D_1:
                v_1 = _load(v_ptr, o_n, m_key, s_v[2], s_v[3], D_0, D_1, D)
                acc_1 = tl.dot(p, v_1, acc_1 * decay[:, None], input_precision=PRECISION)
            k_ptr += BLOCK_N * s_k[2]
            v_ptr += BLOCK_N * s_v[2]

        if SPLIT:
            tl.store(p_lse, tl.where(total > 0, top + tl.log2(total), -float("inf")), mask=m_row)
        elif HAS_SINKS:
            sink = tl.load(sinks_ptr + o_h, mask=m_row, other=0.0).to(tl.float32)
            total += tl.where(m_used, tl.exp2(sink * LOG2E - top), 0.0)
        weight = tl.where(total > 0, 1 / total, 0.0)[:, None]
        _store(out_ptr, acc_0 * weight, p_out, m_row, s_out[3], 0, D_0, D)
        if D_1:
            _store(out_ptr, acc_1 * weight, p_out, m_row, s_out[3], D_0, D_1, D)

    @triton.jit(do_not_specialize=["C", "n_splits"])
    def _merge_kernel(  # type: ignore[no-untyped-def]
        part_ptr,  # [n_splits, R, Hq, D]
        lse_ptr,  # [n_splits, R, Hq], to base 2; -inf where a split has nothing for the row, nor wrote its part
        row_slot_ptr,  # [R]
        sinks_ptr,  # [Hq] where HAS_SINKS
        out_ptr,  # [R, Hq, D]
        s_part,
        s_lse,
        s_out,
        C,
        n_splits,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_S: tl.constexpr,
        HAS_SINKS: tl.constexpr,
    ):
        LOG2E: tl.constexpr = 1.4426950408889634
        r = tl.program_id(0).to(tl.int64)
        h = tl.program_id(1)
        o_d = tl.arange(0, BLOCK_D)
        p_out = out_ptr + r * s_out[0] + h * s_out[1] + o_d * s_out[2]
        if tl.load(row_slot_ptr + r) >= C:
            tl.store(p_out, tl.zeros([BLOCK_D], tl.float32), mask=o_d < D)
            return

        o_s = tl.arange(0, BLOCK_S)
        p_lse = lse_ptr + r * s_lse[1] + h * s_lse[2]
        top = -float("inf")
        for first in range(0, n_splits, BLOCK_S):
            lse = tl.load(p_lse + (first + o_s) * s_lse[0], mask=first + o_s < n_splits, other=-float("inf"))
            top = tl.maximum(top, tl.max(lse, 0))
        total = 0.0
        if HAS_SINKS:
            total = tl.exp2(tl.load(sinks_ptr + h).to(tl.float32) * LOG2E - top)
        acc = tl.zeros([BLOCK_D], tl.float32)
        part_ptr += r * s_part[1] + h * s_part[2]
        for first in range(0, n_splits, BLOCK_S):
            lse = tl.load(p_lse + (first + o_s) * s_lse[0], mask=first + o_s < n_splits, other=-float("inf"))
            weight = tl.exp2(lse - top)
            total += tl.sum(weight, 0)
            p_part = part_ptr + (first + o_s).to(tl.int64)[:, None] * s_part[0] + o_d[None, :] * s_part[3]
            part = tl.load(p_part, mask=(lse > -float("inf"))[:, None] & (o_d < D)[None, :], other=0.0)
            acc += tl.sum(part * weight[:, None], 0)
        tl.store(p_out, acc / total, mask=o_d < D)


@cache
def _programs(device: torch.device) -> int:
    """Programs that keep a device busy: two for each of its processors, as many as an H200 has where it is no GPU."""
    return 2 * (torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132)


def decode_attention_triton(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    row_seq: Tensor,
    row_slot: Tensor,
    row_start: Tensor,
    *,
    max_rows: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    batch_invariant: bool = False,
    splits: int | None = None,
) -> Tensor:
    """`decode_attention` in two launches, or in one where there is one split; `splits` overrides their number."""
    B, Hkv, C, D = k_cache.shape[0], k_cache.shape[1], k_cache.shape[2] - 1, k_cache.shape[3]
    R, Hq, _ = query.shape
    G = Hq // Hkv
    D_0 = max(16, 1 << D.bit_length() - 1)
    D_1 = max(16, triton.next_power_of_2(D - D_0)) if D > D_0 else 0
    BLOCK_M, BLOCK_N, num_warps, num_stages = _tile(max_rows * G, D_0 + D_1, query.element_size())
    TILES = triton.cdiv(max_rows * G, BLOCK_M)

    if batch_invariant:
        splits = triton.cdiv(C, CHUNK)
    elif splits is None:
        splits = min(triton.cdiv(_programs(query.device), B * Hkv * TILES), triton.cdiv(C, BLOCK_N), 64)
    split = splits > 1
    out = query.new_empty(R, Hq, D)
    part = query.new_empty(splits, R, Hq, D, dtype=torch.float32) if split else out[None]
    lse = query.new_empty(splits, R, Hq, dtype=torch.float32) if split else part[..., 0]
    sinks_or_none = query if sinks is None else sinks
    _attend_kernel[(TILES * splits, Hkv, B if split else B + 1)](
        query,
        k_cache,
        v_cache,
        row_slot,
        row_start,
        sinks_or_none,
        part,
        lse,
        query.stride(),
        k_cache.stride(),
        v_cache.stride(),
        part.stride(),
        lse.stride(),
        B,
        R,
        C,
        splits,
        scale,
        softcap or 1.0,
        window or 0,
        G=G,
        D=D,
        D_0=D_0,
        D_1=D_1,
        TILES=TILES,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        SPLIT=split,
        CHUNK=CHUNK if batch_invariant else 0,
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
        PRECISION="tf32x3" if query.dtype == torch.float32 else None,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    if split:
        _merge_kernel[(R, Hq)](
            part,
            lse,
            row_slot,
            sinks_or_none,
            out,
            part.stride(),
            lse.stride(),
            out.stride(),
            C,
            splits,
            D=D,
            BLOCK_D=triton.next_power_of_2(D),
            BLOCK_S=16,
            HAS_SINKS=sinks is not None,
        )
    return out


def _tile(rows: int, D: int, element_size: int) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, num_warps, num_stages for a sequence's rows times G, the padded head width and the type.

    Chosen by what the compiler reports without a GPU (`python -m mtpkern.bench.aot`), not by timing.
    """
    BLOCK_M = min(max(16, triton.next_power_of_2(rows)), 128)
    return BLOCK_M, 64, 8 if BLOCK_M == 128 else 4, 3


def decode_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    row_seq: Tensor,
    row_slot: Tensor,
    row_start: Tensor,
    *,
    max_rows: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Attend with query [R, Hq, D] to caches [B, Hkv, C + 1, D]; returns [R, Hq, D] in the query's dtype.

    Rows of a sequence stand together: row_seq is sorted over the rows in use, and sequence b owns the rows
    row_start[b] .. row_start[b + 1] - 1, at most `max_rows` of them (2k - 1 in decoding). Rows in slot C are unused.

        out = decode_attention(q, k_cache, v_cache, plan.seq, plan.slot, plan.start, max_rows=15, scale=D**-0.5)
    """
    if query.is_cuda and query.dtype != torch.float64:
        return decode_attention_triton(
            query,
            k_cache,
            v_cache,
            row_seq,
            row_slot,
            row_start,
            max_rows=max_rows,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            batch_invariant=batch_invariant,
        )
    return decode_attention_reference(
        query,
        k_cache,
        v_cache,
        row_seq,
        row_slot,
        row_start,
        max_rows=max_rows,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )


def decode_attention_reference(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    row_seq: Tensor,
    row_slot: Tensor,
    row_start: Tensor,
    *,
    max_rows: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`decode_attention` in plain torch: rows spread to [B, W], one matmul a side, rows gathered back.

    Computes in float32, or in float64 for float64 inputs.
    """
    B, Hkv, C, D = k_cache.shape[0], k_cache.shape[1], k_cache.shape[2] - 1, k_cache.shape[3]
    R, Hq, _ = query.shape
    G = Hq // Hkv
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, slot = query.to(dtype), torch.where(row_slot < C, row_slot, -1)
    if B == 1:  # one sequence's packed rows need no spreading
        W = R
    else:
        # Place of each packed row in [B, W]; unused rows share one more place behind the end.
        W = max_rows
        place = row_seq * W + torch.arange(R, device=query.device) - row_start[row_seq]
        place = torch.where(row_slot < C, place, B * W)
        q = q.new_zeros(B * W + 1, Hq, D).index_copy_(0, place, q)[:-1]
        slot = slot.new_full((B * W + 1,), -1).index_copy_(0, place, slot)[:-1]

    slot = slot.view(B, W, 1)
    o_c = torch.arange(C, device=query.device)
    visible = o_c <= slot  # [B, W, C]
    if window is not None:
        visible &= o_c > slot - window
    # 0 * NaN is NaN, so what no row of the sequence sees must not even meet its zero weight.
    v = v_cache[:, :, :C].to(dtype).masked_fill(~visible.any(1)[:, None, :, None], 0)

    q = q.view(B, W, Hkv, G, D).transpose(1, 2).reshape(B, Hkv, W * G, D)
    s = (q @ k_cache[:, :, :C].to(dtype).transpose(-1, -2)).mul_(scale).view(B, Hkv, W, G, C)
    if softcap is not None:
        s = s.div_(softcap).tanh_().mul_(softcap)
    s = s.masked_fill_(~visible[:, None, :, None], torch.finfo(dtype).min)
    if sinks is not None:
        s = torch.cat([s, sinks.to(dtype).view(1, Hkv, 1, G, 1).expand(B, -1, W, -1, -1)], dim=-1)
    p = s.softmax(-1)[..., :C]
    o = (p.reshape(B, Hkv, W * G, C) @ v).view(B, Hkv, W, G, D).transpose(1, 2).reshape(B * W, Hq, D)
    if B > 1:
        o = torch.cat([o, o.new_zeros(1, Hq, D)])[place]
    return o.masked_fill((row_slot >= C)[:, None, None], 0).to(query.dtype)
