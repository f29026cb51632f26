"""Decode attention: packed rows of several sequences against their KV caches.

    o_rh = sum_j p_rhj v_j        p_rh = softmax_j over visible j of softcap(scale * q_rh . k_j)

Row r belongs to sequence row_seq_r and stands in slot row_slot_r of its cache, where its key and value are put besides:
cache[row_seq_r, :, row_slot_r] = key_r. Slot = position, so the rule of span_mask shrinks to one comparison: an empty
span and prefix_end = slot + 1.

    visible(r, j) = slot_r - window < j <= slot_r         nothing for a row in the trash slot C

Masks that stand behind other tokens than the last need the whole rule. The first `scratch` slots of each cache are
theirs, slot = scratch + position for all other rows, and every row brings row_prefix (prefix_end) and row_span
(span_start), as kernels/advance.py plans them:

    visible(r, j) = scratch <= j < prefix_r and j > at_r - window   or   span_r <= j <= slot_r and j > slot_r - window
    at_r          = prefix_r + slot_r - span_r            where the row would stand if its span followed its prefix

Query head h reads key/value head h // G. A sink is one more logit per query head that takes probability and brings no
value (gpt-oss).

Shapes   query [R, Hq, D];  key, value [R, Hkv, D];  k_cache, v_cache [B, Hkv, C + 1, D];  rows as in PackedRows, all
         int64;  sinks [Hq];  out [R, Hq, D]
Traffic  reads 2 * Hkv * D elements for every visible slot of every sequence once: bandwidth-bound up to k = 16
Faults   unused rows give 0; the trash slot may hold anything, NaN included. So may, for the kernel, other slots that no
         row sees; for the torch form they must be finite, which caches of zeros are and stay: a row with a NaN ends
         its sequence (see advance)

The kernel is split-KV: a program takes a tile of one sequence's rows under one KV head, with the G query heads of each
row packed into the tile, and one split of the keys that the tile sees. Lengths are read on the device; the number of
splits follows from shapes alone, so a captured graph stays right as sequences grow. A second launch merges the splits.
Where the batch alone fills the GPU there is one split and one launch.
Merging in the program that finishes last would save the launch, but loses: it alone would read what all splits of its
tile have left, 32 KB each at 64 entries of 128, at the pace of one processor, where the launch has all of them read.

The caches are written by programs of their own, while others attend; on AMD's GPUs by a launch before. So a key or
value of this pass is taken from `key` and `value` by whoever needs it, never from the cache: no slot is read and
written in one launch. Which row stands in a slot follows from the order of `advance`: the rows of a sequence stand in
consecutive slots, and those in scratch slots come last, in consecutive ones too. Between the lowest and the highest key
that a tile sees thus lies nothing that no row of the sequence sees. So it is with scratch slots, which are so many keys
more; with a window the tiles between them and what the window shows are left out.

A long file, because what decides the launch of its two kernels, which are half of it, has to be read beside them.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from mtpkern.kernels.form import attention_dtype, pdl_options, strides
from mtpkern.kernels.kv_write import kv_write, kv_write_triton
from mtpkern.kernels.op import op
from mtpkern.kernels.packed_rows import PackedRows
from mtpkern.kernels.scoring import Scoring

# Keys of a split in the batch-invariant mode, counted from slot 0.
CHUNK = 256

if find_spec("triton"):
    import triton
    import triton.language as tl

    from mtpkern.kernels.form import gdc_wait

    LOG2_E = tl.constexpr(1.4426950408889634)

    @triton.jit(do_not_specialize=["B", "R", "C", "n_splits", "window", "scratch"])
    def _attend_kernel(
        q_ptr,  # [R, Hq, D]
        key_ptr,  # [R, Hkv, D], as the three below with elements of a head side by side
        value_ptr,  # [R, Hkv, D_V]
        k_ptr,  # [B, Hkv, C + 1, D]
        v_ptr,  # [B, Hkv, C + 1, D_V]
        row_seq_ptr,  # [R]
        row_slot_ptr,  # [R]
        row_prefix_ptr,  # [R], as the one below, where HAS_SPANS
        row_span_ptr,
        row_start_ptr,  # [B + 1]
        sinks_ptr,  # [Hq] where HAS_SINKS
        out_ptr,  # [n_splits, R, Hq, D_V]
        lse_ptr,  # [n_splits, R, Hq], to base 2, where SPLIT
        s_q,  # the strides of each, as tuples
        s_key,
        s_value,
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
        scratch,
        G: tl.constexpr,
        D: tl.constexpr,
        D_V: tl.constexpr,
        TILES: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_V: tl.constexpr,
        CHUNK: tl.constexpr,  # keys of a split from slot 0 on; 0 divides what the tile sees among n_splits
        LEAST: tl.constexpr,  # keys of such a split, a multiple of BLOCK_N
        BLOCK_W: tl.constexpr,  # rows of a program that writes
        WRITE: tl.constexpr,  # the caches, which else hold this pass's keys and values already
        ALIGNED: tl.constexpr,  # keys and values of a slot or a row begin at multiples of 16 bytes
        SPLIT: tl.constexpr,
        HAS_SPANS: tl.constexpr,
        HAS_WINDOW: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        HAS_SINKS: tl.constexpr,
        PRECISION: tl.constexpr,
        PDL: tl.constexpr,
    ):
        gdc_wait(PDL)
        i_tile = tl.program_id(0) % TILES
        i_split = tl.program_id(0) // TILES
        h = tl.program_id(1)
        b = tl.program_id(2)
        o_m = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        o_n = tl.arange(0, BLOCK_N)
        o_d = tl.arange(0, BLOCK_D)
        o_v = tl.arange(0, BLOCK_V)
        m_d = (o_d < D)[None, :]
        m_v = (o_v < D_V)[None, :]

        # A row's offset in a large batch and a slot's in a long cache can each pass 2^31 elements: 64 bits for both.
        key_ptr += h.to(tl.int64) * s_key[1]
        value_ptr += h.to(tl.int64) * s_value[1]
        k_ptr += h.to(tl.int64) * s_k[1]
        v_ptr += h.to(tl.int64) * s_v[1]

        # The programs behind the last sequence write the caches, and where there is one split they clear the rows that
        # no sequence owns.
        if b >= B:
            w = ((b - B) * tl.num_programs(0) + tl.program_id(0)) * BLOCK_W
            o_w = (w + tl.arange(0, BLOCK_W)).to(tl.int64)
            if WRITE:
                seq = tl.load(row_seq_ptr + o_w, mask=o_w < R, other=0)
                slot = tl.load(row_slot_ptr + o_w, mask=o_w < R, other=C)
                m_w = (slot < C)[:, None]
                key = tl.load(key_ptr + (o_w * s_key[0])[:, None] + o_d[None, :], mask=m_w & m_d)
                value = tl.load(value_ptr + (o_w * s_value[0])[:, None] + o_v[None, :], mask=m_w & m_v)
                tl.store(k_ptr + (seq * s_k[0] + slot * s_k[2])[:, None] + o_d[None, :], key, mask=m_w & m_d)
                tl.store(v_ptr + (seq * s_v[0] + slot * s_v[2])[:, None] + o_v[None, :], value, mask=m_w & m_v)
            if not SPLIT:
                m_free = ((o_w >= tl.load(row_start_ptr + B)) & (o_w < R))[:, None]
                for g in range(G):
                    p_out = out_ptr + o_w[:, None] * s_out[1] + (h * G + g) * s_out[2] + o_v[None, :] * s_out[3]
                    tl.store(p_out, tl.zeros([BLOCK_W, BLOCK_V], tl.float32), mask=m_free & m_v)
            return

        # The tile's rows: entry m is query head m % G of the sequence's row m // G.
        row = tl.load(row_start_ptr + b)
        n_rows = (tl.load(row_start_ptr + b + 1) - row).to(tl.int32)
        m_row = o_m < n_rows * G
        o_r = row + o_m // G
        o_h = h * G + o_m % G
        slot = tl.load(row_slot_ptr + o_r, mask=m_row, other=C).to(tl.int32)
        m_used = slot < C
        slot = tl.where(m_used, slot, -1)
        # Without a wait for the slots: no row sees an unused one, and that sees nothing.
        p_q = q_ptr + o_r[:, None] * s_q[0] + o_h[:, None] * s_q[1] + o_d[None, :] * s_q[2]
        q = tl.load(p_q, mask=m_row[:, None] & m_d, other=0.0)
        if WRITE:
            # Keys from slot `first` on are this pass's: the pointers stand where slot 0 would have its own.
            first = tl.load(row_slot_ptr + row, mask=n_rows > 0, other=C).to(tl.int32)
        p_lse = lse_ptr + i_split.to(tl.int64) * s_lse[0] + o_r * s_lse[1] + o_h * s_lse[2]

        # They see keys in [begin, end); of those this split takes [low, high), low a multiple of BLOCK_N.
        if HAS_SPANS:
            prefix = tl.load(row_prefix_ptr + o_r, mask=m_row, other=0).to(tl.int32)
            span = tl.load(row_span_ptr + o_r, mask=m_row, other=C + 1).to(tl.int32)
            prefix = tl.where(m_used, prefix, 0)
            span = tl.where(m_used, span, C + 1)
            if WRITE:
                # So are those in scratch slots, the last of which has the last row.
                own_row = row + n_rows - 1 - tl.load(row_slot_ptr + row + n_rows - 1, mask=n_rows > 0, other=0)
            # And scratch slots in [own_begin, own_end), which take tiles of their own where a window hides what follows
            # them: from key `scratch_tiles` on all counts go without the `hidden` ones.
            m_scratch = m_used & (slot < scratch)
            own_end = tl.max(tl.where(m_scratch, slot, -1), 0) + 1
            end = tl.maximum(tl.max(prefix, 0), tl.max(slot, 0) + 1)
            begin = scratch
            own_begin = tl.min(tl.where(m_scratch, span, own_end), 0)
            low = 0
            hidden = 0
            scratch_tiles = tl.cdiv(scratch, BLOCK_N) * BLOCK_N
            if HAS_WINDOW:
                at = prefix + slot - span
                begin = tl.maximum(tl.min(tl.where(m_used, at, C), 0) - window + 1, scratch)
                own_begin = tl.maximum(own_begin, tl.min(tl.where(m_scratch, slot, C), 0) - window + 1)
                if CHUNK:
                    scratch_tiles = 0
                else:
                    hidden = tl.maximum(begin // BLOCK_N * BLOCK_N - scratch_tiles, 0)
                low = tl.where(own_end > 0, 0, begin // BLOCK_N * BLOCK_N - hidden)
            last = tl.maximum(end - hidden, own_end)
        else:
            end = tl.max(slot, 0) + 1
            begin = 0
            if HAS_WINDOW:
                begin = tl.maximum(tl.min(tl.where(m_used, slot, C), 0) - window + 1, 0)
            low = begin // BLOCK_N * BLOCK_N
            last = end
        if CHUNK:
            high = tl.minimum((i_split + 1) * CHUNK, last)
            low = tl.maximum(i_split * CHUNK, low)
            if HAS_SPANS and HAS_WINDOW:
                low = tl.where(low < own_end, low, tl.maximum(low, begin // BLOCK_N * BLOCK_N))
        else:
            # Fewer keys than LEAST would take less traffic to read than their partial sums to write and read again.
            share = tl.maximum(tl.cdiv(tl.cdiv(last - low, BLOCK_N), n_splits) * BLOCK_N, LEAST)
            low += i_split * share
            high = tl.minimum(low + share, last)
        # Where there is one split, what sees nothing is cleared by going on.
        if SPLIT and low >= high:
            tl.store(p_lse, tl.full([BLOCK_M], -float("inf"), tl.float32), mask=m_row)
            return

        if WRITE:
            new_key_ptr = key_ptr + (row - first) * s_key[0]
            new_value_ptr = value_ptr + (row - first) * s_value[0]
            if HAS_SPANS:
                key_ptr += own_row * s_key[0]
                value_ptr += own_row * s_value[0]
        k_ptr += b.to(tl.int64) * s_k[0]
        v_ptr += b.to(tl.int64) * s_v[0]
        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        for n in range(low, high, BLOCK_N):
            o_key = n + o_n
            m_key = o_key < high
            if HAS_SPANS:
                if HAS_WINDOW:
                    o_key += tl.where(n >= scratch_tiles, hidden, 0)
                m_token = (o_key >= begin) & (o_key < end)
                m_key = m_key & (m_token | ((o_key >= own_begin) & (o_key < own_end)))
                visible = m_token[None, :] & (o_key[None, :] < prefix[:, None])
                own = (o_key[None, :] >= span[:, None]) & (o_key[None, :] <= slot[:, None])
                if HAS_WINDOW:
                    visible = visible & (o_key[None, :] > at[:, None] - window)
                    own = own & (o_key[None, :] > slot[:, None] - window)
                visible = visible | own
            else:
                visible = o_key[None, :] <= slot[:, None]
                if HAS_WINDOW:
                    m_key = m_key & (o_key >= begin)
                    visible = visible & (o_key[None, :] > slot[:, None] - window)

            p_k, s_n_k, p_v, s_n_v = k_ptr, s_k[2], v_ptr, s_v[2]
            if WRITE:
                m_new = o_key >= first
                p_k, p_v = tl.where(m_new, new_key_ptr, p_k), tl.where(m_new, new_value_ptr, p_v)
                if HAS_SPANS:
                    m_own = o_key < scratch
                    m_new = m_new | m_own
                    p_k, p_v = tl.where(m_own, key_ptr, p_k), tl.where(m_own, value_ptr, p_v)
                s_n_k, s_n_v = tl.where(m_new, s_key[0], s_n_k), tl.where(m_new, s_value[0], s_n_v)
            p_k += o_key.to(tl.int64) * s_n_k
            p_v += o_key.to(tl.int64) * s_n_v
            if ALIGNED:
                # Of one of two tensors Triton forgets it from 3.8 on, and would read element by element.
                p_k, p_v = tl.multiple_of(p_k, 16), tl.multiple_of(p_v, 16)
            # What no row sees is not even loaded: 0 * NaN is NaN.
            k = tl.load(p_k[:, None] + o_d[None, :], mask=m_key[:, None] & m_d, other=0.0)
            s = tl.dot(q, k.T, input_precision=PRECISION)
            if HAS_SOFTCAP:
                # tanh(x) = 1 - 2 / (1 + exp(2 x)), right at both infinities
                s = (softcap - 2 * softcap / (1 + tl.exp2(s * (2 * LOG2_E * scale / softcap)))) * LOG2_E
            else:
                s *= scale * LOG2_E
            s = tl.where(visible, s, -float("inf"))

            # A row that has seen no key yet has a top of -inf, which must not meet itself in a difference.
            top_next = tl.maximum(top, tl.max(s, 1))
            shift = tl.where(top_next == -float("inf"), 0.0, top_next)
            decay = tl.exp2(top - shift)
            p = tl.exp2(s - shift[:, None])
            total = total * decay + tl.sum(p, 1)
            top = top_next
            v = tl.load(p_v[:, None] + o_v[None, :], mask=m_key[:, None] & m_v, other=0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)

        if SPLIT:
            # -inf where the row has seen no key, NaN where one of them is none: the merge must not leave that out.
            tl.store(p_lse, top + tl.log2(total), mask=m_row)
        elif HAS_SINKS:
            sink = tl.load(sinks_ptr + o_h, mask=m_row, other=0.0).to(tl.float32)
            total += tl.where(m_used, tl.exp2(sink * LOG2_E - top), 0.0)
        acc /= tl.where(total > 0, total, 1.0)[:, None]
        p_out = i_split.to(tl.int64) * s_out[0] + o_r[:, None] * s_out[1] + o_h[:, None] * s_out[2]
        tl.store(out_ptr + p_out + o_v[None, :] * s_out[3], acc, mask=m_row[:, None] & m_v)

    @triton.jit(do_not_specialize=["C", "n_splits"])
    def _merge_kernel(
        part_ptr,  # [n_splits, R, Hq, D_V]
        lse_ptr,  # [n_splits, R, Hq], to base 2; -inf where the split has nothing for the row
        row_slot_ptr,  # [R]
        sinks_ptr,  # [Hq] where HAS_SINKS
        out_ptr,  # [R, Hq, D_V]
        s_part,
        s_lse,
        s_out,
        C,
        n_splits,
        D_V: tl.constexpr,
        BLOCK_V: tl.constexpr,
        BLOCK_S: tl.constexpr,
        BLOCK_L: tl.constexpr,
        HAS_SINKS: tl.constexpr,
        PDL: tl.constexpr,
    ):
        gdc_wait(PDL)
        r = tl.program_id(0).to(tl.int64)
        h = tl.program_id(1)
        o_v = tl.arange(0, BLOCK_V)
        o_s = tl.arange(0, BLOCK_S)
        p_out = out_ptr + r * s_out[0] + h * s_out[1] + o_v * s_out[2]
        slot = tl.load(row_slot_ptr + r)

        # Each wait for memory is a good part of this kernel's time: all that has to be known of the splits at once.
        p_lse = lse_ptr + r * s_lse[1] + h * s_lse[2]
        o_l = tl.arange(0, BLOCK_L)
        top = -float("inf")
        last = 0
        for first in range(0, n_splits, BLOCK_L):
            lse = tl.load(p_lse + (first + o_l) * s_lse[0], mask=first + o_l < n_splits, other=-float("inf"))
            top = tl.maximum(top, tl.max(lse, 0))
            last = tl.maximum(last, tl.max(tl.where(lse != -float("inf"), first + o_l + 1, 0), 0))
        if slot >= C:
            tl.store(p_out, tl.zeros([BLOCK_V], tl.float32), mask=o_v < D_V)
            return

        total = 0.0
        if HAS_SINKS:
            total = tl.exp2(tl.load(sinks_ptr + h).to(tl.float32) * LOG2_E - top)
        acc = tl.zeros([BLOCK_V], tl.float32)
        part_ptr += r * s_part[1] + h * s_part[2]
        # In blocks of one size and in order, so that more splits behind the last of a row change no bit of it.
        for first in range(0, last, BLOCK_S):
            lse = tl.load(p_lse + (first + o_s) * s_lse[0], mask=first + o_s < n_splits, other=-float("inf"))
            weight = tl.exp2(lse - top)
            total += tl.sum(weight, 0)
            # A split that had nothing for the row wrote no part.
            m_part = (lse != -float("inf"))[:, None] & (o_v < D_V)[None, :]
            p_part = part_ptr + (first + o_s).to(tl.int64)[:, None] * s_part[0] + o_v[None, :] * s_part[3]
            acc += tl.sum(tl.load(p_part, mask=m_part, other=0.0) * weight[:, None], 0)
        tl.store(p_out, acc / total, mask=o_v < D_V)


@op(
    mutates=["k_cache", "v_cache"],
    float64=False,
    fake=lambda query, key, value, *_: query.new_empty(*query.shape[:2], value.shape[2]),
)
def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: PackedRows,
    scoring: Scoring,
    *,
    batch_invariant: bool = False,
    slots: int | None = None,
) -> Tensor:
    """Write key and value [R, Hkv, D] in place to caches [B, Hkv, C + 1, D], then attend with query [R, Hq, D].

    Returns [R, Hq, D] in the query's dtype. Rows of a sequence stand together: rows.seq is sorted over those in use.
    Of unused ones the kernel writes nothing.

    `batch_invariant` makes the kernel's splits the same 256 keys for every sequence, so that no bit of a row's output
    depends on the batch; that takes 4 (D_V + 1) bytes a row, query head and 256 slots. The torch form ignores it.
    `slots`, where the host knows that only so many hold anything, this pass's included: no more are looked at.

    The torch form spreads rows to [S, W], of the S sequences that have some (all, unless the host knows), attends as a
    padded batch does, and gathers rows back. The G heads that share
    keys stand below one another as G W rows of one: given as heads of their own, one row of each takes a CPU 3 to 17
    times as long in bfloat16, and two to nine rows up to twice as long (docs/log.md, "less around a CPU's products").
    With a softcap or sinks it computes in float32, or in float64 for float64 inputs; else as
    scaled_dot_product_attention does, of 16-bit inputs in float32 on a processor without 16-bit products.

        out = decode_attention(q, k, v, k_cache, v_cache, PackedRows(seq, slot, start, max_rows=15), Scoring(D**-0.5))
    """
    kv_write.reference(k_cache, v_cache, key, value, rows.seq, rows.slot)
    (_, Hkv, C, D), (R, Hq, _), Dv = k_cache.shape, query.shape, v_cache.shape[-1]
    C = C - 1 if slots is None else slots
    scale, softcap, sinks = scoring.scale, scoring.softcap, scoring.sinks
    wide = attention_dtype(query)
    spread = rows.spread(scoring.window, C, wide, (Hq, Hkv))
    # Of one sequence all rows are there already.
    q = query.transpose(0, 1) if spread.bring is None else query.reshape(R * Hq, D).index_select(0, spread.bring)
    S = len(spread.bias)
    q = q.reshape(S, Hkv, -1, D)
    k, v = k_cache[spread.sequences, :, :C], v_cache[spread.sequences, :, :C]
    if softcap is None and sinks is None:
        q, k, v = (x.to(wide) for x in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=spread.bias, scale=scale)
    else:
        dtype = torch.promote_types(query.dtype, torch.float32)
        q, k, v = (x.to(dtype) for x in (q, k, v))
        s = (q @ k.transpose(-1, -2)).mul_(scale)
        if softcap is not None:
            s = s.div_(softcap).tanh_().mul_(softcap)
        s = s.add_(spread.bias)
        if sinks is not None:
            sink = sinks.to(dtype).repeat_interleave(s.shape[2] * Hkv // Hq).view(1, Hkv, -1, 1)
            s = torch.cat([s, sink.expand(S, -1, -1, -1)], dim=-1)
        o = s.softmax(-1)[..., :C] @ v
    o = o.to(query.dtype)
    if spread.back is None:
        o = o.view(Hq, R, Dv).transpose(0, 1)
    else:
        o = o.reshape(-1, Dv).index_select(0, spread.back).view(R, Hq, Dv)
    if spread.unused.dtype == torch.bool:
        return o.masked_fill(spread.unused[:, None, None], 0)
    return o.index_fill_(0, spread.unused, 0)  # a sixth of masked_fill's time


@cache
def _machine(device: torch.device) -> tuple[int, int]:
    """Processors of a GPU and bytes of shared memory that a program may take; an H200's where the device is none."""
    if device.type != "cuda":
        return 132, 227 << 10
    facts = torch.cuda.get_device_properties(device)
    # ROCm has no larger limit to opt in to.
    return facts.multi_processor_count, getattr(facts, "shared_memory_per_block_optin", facts.shared_memory_per_block)


def _tile(entries: int, D: int, element_size: int, shared_memory: int) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, num_warps, num_stages for a sequence's rows times G, the padded head width and the element.

    Chosen by what the compiler reports (python -m mtpkern.bench.aot), not by timing.
    """
    large = shared_memory >= 200 << 10  # where wgmma and tcgen05 take operands, or sums, off the registers
    # Most rows of a tile, and the elements up to which it takes 4 warps.
    if element_size == 4:
        # Three products in TF32 take three parts of the queries' tile, all of them in registers.
        most, light = 2048 // D, 2048
    else:
        # The queries' tile stays in shared memory.
        most, light = (64 << 10 if large else 32 << 10) // (D * element_size), 8192 if large else 2048
    # With more than 64 entries a program would have a processor's shared memory to itself, where `_splits` counts on
    # two; heads of 256 fill it in any case, and read the keys once for 128.
    BLOCK_M = max(16, min(triton.next_power_of_2(entries), most, 64 if D <= 128 else 128))
    BLOCK_N = max(16, min(128, 16384 // D) // element_size)
    num_warps = 8 if BLOCK_M == 128 or light < BLOCK_M * D else 4
    return BLOCK_M, BLOCK_N, num_warps, 3 if shared_memory >= 160 << 10 else 2


def _least(BLOCK_M: int, BLOCK_N: int) -> int:
    """Keys that a split takes at least: twice the tile's entries, in whole blocks."""
    return triton.cdiv(2 * BLOCK_M, BLOCK_N) * BLOCK_N


def _splits(heads: int, C: int, least: int, processors: int) -> int:
    """How many splits of C slots, of so many keys or more, give a processor two programs; heads: B * Hkv * tiles."""
    return max(1, min(triton.cdiv(2 * processors, heads), C // least, 64))


def _is_aligned(x: Tensor) -> bool:
    """Whether all lines of elements side by side begin at multiples of 16 bytes."""
    return x.data_ptr() % 16 == 0 and all(n * x.element_size() % 16 == 0 for n in x.stride()[:-1])


@decode_attention.kernel
def decode_attention_triton(
    query, key, value, k_cache, v_cache, rows, scoring, *, batch_invariant=False, slots=None, splits=None
):
    """Two launches, or one where there is one split; `splits` sets their number.

    On AMD's GPUs one more: their compiler takes no pointers into two tensors, and to load from both costs registers.
    """
    (B, Hkv, C, D), (R, Hq, _), D_V = k_cache.shape, query.shape, v_cache.shape[3]
    C, G = C - 1, Hq // Hkv
    max_rows, spans, sinks = rows.max_rows, rows.prefix_end is not None, scoring.sinks
    # Padded in the registers only: a head width that is no power of two costs arithmetic, which is not what bounds us.
    BLOCK_D, BLOCK_V = (max(16, triton.next_power_of_2(width)) for width in (D, D_V))
    processors, shared_memory = _machine(query.device)
    # A tile may follow from R, but not in the batch-invariant mode: R depends on what else is in the batch.
    entries = G * (max_rows if batch_invariant else max(1, min(max_rows, R)))
    BLOCK_M, BLOCK_N, num_warps, num_stages = _tile(entries, max(BLOCK_D, BLOCK_V), query.element_size(), shared_memory)
    TILES, least = triton.cdiv(entries, BLOCK_M), _least(BLOCK_M, BLOCK_N)
    held = C if slots is None else slots
    if batch_invariant:
        splits = triton.cdiv(held, CHUNK)
    elif splits is None:
        splits = _splits(B * Hkv * TILES, held, least, processors)

    # One pass of TF32 would lose half of float32's digits, three keep nearly all, but their parts of the widest heads
    # fit no register file. AMD multiplies float32 as it is.
    precision = None
    if query.dtype == torch.float32:
        precision = "ieee" if torch.version.hip or BLOCK_D > 128 else "tf32x3"
    # As every projection leaves them. Pointers into two tensors are aligned as the worse of them: where rows lie beside
    # an adapter's few columns (mtpkern/products.py), the cache, too, would be read element by element.
    key, value = (x if x.stride(-1) == 1 and x.stride(0) % 16 == 0 else x.contiguous() for x in (key, value))
    assert k_cache.stride(-1) == v_cache.stride(-1) == 1
    aligned = all(map(_is_aligned, (key, value, k_cache, v_cache)))
    write, split = torch.version.hip is None, splits > 1
    if not write:
        kv_write_triton(k_cache, v_cache, key, value, rows.seq, rows.slot)
    out = query.new_empty(R, Hq, D_V)
    part = query.new_empty(splits, R, Hq, D_V, dtype=torch.float32) if split else out[None]
    lse = query.new_empty(splits, R, Hq, dtype=torch.float32)
    # The kernel takes some pointer where there are no sinks, or no spans, and does not read it.
    sink = query if sinks is None else sinks
    of_rows = rows.seq, rows.slot, *((rows.prefix_end, rows.span_start) if spans else [rows.slot] * 2), rows.start
    # Enough programs that none writes more rows than it has in flight at once: one after the other they would take as
    # long as the attention of a large batch.
    BLOCK_W = 16
    writers = triton.cdiv(R, BLOCK_W * TILES * splits) if write or not split else 0
    tensors = query, key, value, k_cache, v_cache
    numbers = B, R, C, splits, scoring.scale, scoring.softcap or 0.0, scoring.window or 0, rows.scratch
    sizes = {"G": G, "D": D, "D_V": D_V, "BLOCK_D": BLOCK_D, "BLOCK_V": BLOCK_V, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
    sizes |= {"TILES": TILES, "BLOCK_W": BLOCK_W, "CHUNK": CHUNK if batch_invariant else 0, "LEAST": least}
    has = {"HAS_SPANS": spans, "HAS_WINDOW": scoring.window is not None, "HAS_SOFTCAP": scoring.softcap is not None}
    has_sinks, pdl = {"HAS_SINKS": sinks is not None}, pdl_options(query.device)
    _attend_kernel[(TILES * splits, Hkv, B + writers)](
        *(*tensors, *of_rows, sink, part, lse),
        *strides(*tensors, part, lse),
        *numbers,
        WRITE=write,
        ALIGNED=aligned,
        SPLIT=split,
        PRECISION=precision,
        num_warps=num_warps,
        num_stages=num_stages,
        **(sizes | has | has_sinks | pdl),
    )
    if split:
        _merge_kernel[(R, Hq)](
            *(part, lse, rows.slot, sink, out, *strides(part, lse, out), C, splits),
            D_V=D_V,
            BLOCK_V=BLOCK_V,
            BLOCK_S=16,
            BLOCK_L=64,
            # A row of a part fills a warp, so that no sum crosses warps.
            num_warps=max(1, BLOCK_V // 128),
            **(has_sinks | pdl),
        )
    return out
