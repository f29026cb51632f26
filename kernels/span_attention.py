"""Span attention: the attention of training, under the visibility rule of mtpkern.kernels.span_mask.

    s_rj  = softcap(scale * q_r . k_j)    over the keys j that row r sees;    softcap(x) = c tanh(x / c), or x
    out_r = sum_j exp(s_rj - m_r) v_j / (sum_j exp(s_rj - m_r) + exp(sink - m_r)),    m_r the maximum of its terms

A row that sees nothing (padding) gives 0 and receives and passes on no gradient.

The Triton form keeps lse_r, log2 of the denominator, and in backward computes p_rj = exp2(log2(e) s_rj - lse_r) again:

    dv_j = sum_r p_rj do_r        delta_r = do_r . out_r        ds_rj = p_rj (do_r . v_j - delta_r) softcap'
    dq_r = scale sum_j ds_rj k_j  dk_j = scale sum_r ds_rj q_r  dsink = -sum_r exp2(log2(e) sink - lse_r) delta_r

What a tile of rows sees follows from its integers: tiles of keys that all its rows see run without a mask, those at the
ends of prefixes and in spans with it, all others are skipped. There is no mask tensor, nothing waits for the host, and
lengths, offsets and k are data that no kernel is compiled for. Sums run in a fixed order, without atomics: equal inputs
give equal bits. Any layout is computed rightly; spans sorted by prefix make the loops short.

Shapes   query [B, Hq, T, D];  key, value [B, Hkv, T, D];  position, prefix_end, span_start, span_end [B, T]
         sinks [Hq];  out [B, T, Hq, D];  lse, delta [B, Hq, T] float32. Queries may be the last rows alone: the keys
         in front are constants then (a prefix that another pass has read), without gradients
Traffic  forward reads q, k, v and writes out, 2 T D (Hq + Hkv) elements a sequence, backward twice that; the torch
         form builds the mask [B, T, T] and weights [B, Hq, T, T] besides
FLOPs    4 Hq D a visible pair forward, 10 Hq D backward; the Triton form computes scores and do . v twice, 14 Hq D.
         A head dimension that is no power of two is computed as the next one
Source   arXiv 2602.06019 (mask); tiles and recomputation after FlashAttention-2, arXiv 2307.08691; softcap as in
         Gemma 2, sinks as in gpt-oss

A long file, because forward and backward share rule, tiles and device functions, and are read against the lines above.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from math import e, log2
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtpkern.kernels.form import autocast_of, on_device
from mtpkern.kernels.op import operator
from mtpkern.kernels.scoring import Scoring
from mtpkern.kernels.span_mask import Rule, span_mask

if find_spec("triton"):
    import triton
    import triton.language as tl

    LOG2_E = tl.constexpr(1.4426950408889634)
    # Above every row and every tile.
    FAR = tl.constexpr(1 << 30)

    # A block is [ROWS, BD]: BD columns, a power of two, of which the first D exist.

    @triton.jit
    def _pointers(x, start, s_row, ROWS: tl.constexpr, BD: tl.constexpr):
        """Pointers of the block from row `start`; 64 bits as far as the tile, because start * s_row can pass 2^31."""
        tile = x + tl.cast(start, tl.int64) * s_row
        return tile + tl.arange(0, ROWS)[:, None] * s_row + tl.arange(0, BD)[None, :]

    @triton.jit
    def _inside(start, T, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
        """Which elements of that block exist: rows below T, columns below D."""
        return (start + tl.arange(0, ROWS) < T)[:, None] & (tl.arange(0, BD) < D)[None, :]

    @triton.jit
    def _load(x, start, s_row, T, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ALL: tl.constexpr):
        """The block from row `start`, 0 where there is none; ALL says that its rows all exist."""
        p_x = _pointers(x, start, s_row, ROWS, BD)
        if ALL and D == BD:
            return tl.load(p_x)
        else:
            return tl.load(p_x, mask=_inside(start, T, ROWS, D, BD), other=0.0)

    @triton.jit
    def _store(x, start, s_row, T, block, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
        """Write a block in the buffer's dtype."""
        block = block.to(x.dtype.element_ty)
        tl.store(_pointers(x, start, s_row, ROWS, BD), block, mask=_inside(start, T, ROWS, D, BD))

    @triton.jit
    def _outer(x, y):
        """x y^T in float32: [A, D], [B, D] -> [A, B]. "ieee" keeps float32 inputs from being cut to tf32."""
        return tl.dot(x, tl.trans(y), input_precision="ieee")

    @triton.jit
    def _accumulate(sums, p, x):
        """sums + p x, p rounded to the dtype of x: [A, D] + [A, B] [B, D]."""
        return tl.dot(p.to(x.dtype), x, sums, input_precision="ieee")

    @triton.jit
    def _rule(layout, start, o_r, T, window):
        """What rows o_r see: keys lower <= j < end of the prefix, own <= j < stop of the span; no row exists from T."""
        m_r = o_r < T
        position = tl.load(layout[0] + start + o_r, mask=m_r, other=0)
        end = tl.load(layout[1] + start + o_r, mask=m_r, other=0)
        own = tl.where(m_r, tl.load(layout[2] + start + o_r, mask=m_r, other=0), o_r + 1)
        if len(layout) == 4:
            stop = tl.load(layout[3] + start + o_r, mask=m_r, other=0)
        else:
            stop = o_r + 1
        lower = end - position + o_r - own + tl.maximum(position - window + 1, 0)
        return tl.maximum(lower, 0), end, tl.maximum(own, o_r - window + 1), stop

    @triton.jit
    def _visible(rule, o_n, AXIS: tl.constexpr):
        """span_mask of rows and keys o_n, the keys along AXIS."""
        lower, end, own, stop = rule
        o_n = tl.expand_dims(o_n, 1 - AXIS)
        prefix = (o_n >= tl.expand_dims(lower, AXIS)) & (o_n < tl.expand_dims(end, AXIS))
        return prefix | ((o_n >= tl.expand_dims(own, AXIS)) & (o_n < tl.expand_dims(stop, AXIS)))

    @triton.jit
    def _sees(rule):
        """Which rows see anything."""
        lower, end, own, stop = rule
        # The longer of prefix and span, not (lower < end) | (own < stop): where that comparison already chose the
        # tiles, using it again behind the loop crashes the compiler (triton 3.7.1, sm_90, layout conversions).
        return tl.maximum(end - lower, stop - own) > 0

    @triton.jit
    def _logits(s, scale, softcap, HAS_SOFTCAP: tl.constexpr):
        """Logits to base 2 of dot products, and the derivative of the cap, 1 - tanh^2."""
        if HAS_SOFTCAP:
            # tanh x = 1 - 2 / (1 + e^2x), right where e^2x is infinite too.
            t = 1 - 2 / (1 + tl.exp2(s * (2 * LOG2_E * scale / softcap)))
            return t * (softcap * LOG2_E), 1 - t * t
        else:
            return s * (scale * LOG2_E), 1.0

    @triton.jit
    def _key_tiles(rule, KEYS: tl.constexpr):
        """Tiles of keys that a tile of rows sees: prefix [p0, p1), of it [f0, f1) without a mask, spans [s0, s1).

        Rows that see nothing do not count for f0 and f1: what they compute is thrown away.
        """
        lower, end, own, stop = rule
        prefix = lower < end
        span = own < stop
        sees = prefix | span
        p0 = tl.min(tl.where(prefix, lower, FAR), 0) // KEYS
        p1 = tl.cdiv(tl.max(tl.where(prefix, end, 0), 0), KEYS)
        s0 = tl.min(tl.where(span, own, FAR), 0) // KEYS
        s1 = tl.cdiv(tl.max(tl.where(span, stop, 0), 0), KEYS)
        f0 = tl.cdiv(tl.max(tl.where(sees, lower, 0), 0), KEYS)
        f1 = tl.min(tl.where(sees, end, FAR), 0) // KEYS
        # Each tile once: one that holds prefix and span keys belongs to the prefix.
        p0 = tl.minimum(tl.minimum(p0, s0), p1)
        f0 = tl.minimum(tl.maximum(f0, p0), p1)
        f1 = tl.minimum(tl.maximum(f1, f0), p1)
        s0 = tl.maximum(s0, p1)
        return p0, f0, f1, p1, s0, tl.maximum(s1, s0)

    @triton.jit
    def _pick(i, a0, a1, b0, b1, c0, c1, d0):
        """The i-th tile of the intervals [a0, a1), [b0, b1), [c0, c1), [d0, ...)."""
        b = i - (a1 - a0)
        c = b - (b1 - b0)
        d = c - (c1 - c0)
        return tl.where(b < 0, a0 + i, tl.where(c < 0, b0 + b, tl.where(d < 0, c0 + c, d0 + d)))

    @triton.jit(do_not_specialize=["T", "Tq", "first", "window"])
    def _forward_kernel(
        query,  # [B, Hq, T - first, D]: the rows from `first` on
        key,  # [B, Hkv, T, D]
        value,  # [B, Hkv, T, D]
        sinks,  # [Hq]
        layout,  # position, prefix_end, span_start, perhaps span_end: each [B, T] int32
        out,  # [B, T - first, Hq, D], written
        lse,  # [B, Hq, T - first] float32, written
        s_q,  # strides of B, H, T, as all that follow
        s_k,
        s_v,
        s_o,
        T,
        Tq,
        first,
        Hq,
        G,
        scale,
        softcap,
        window,
        ROWS: tl.constexpr,
        KEYS: tl.constexpr,
        D: tl.constexpr,
        BD: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        HAS_SINKS: tl.constexpr,
    ):
        # The last rows see the longest prefixes: they start first, or one of them would be left alone at the end.
        m0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
        b = (tl.program_id(0) // Hq).to(tl.int64)
        h = (tl.program_id(0) % Hq).to(tl.int64)
        key += b * s_k[0] + h // G * s_k[1]
        value += b * s_v[0] + h // G * s_v[1]

        o_q = m0 + tl.arange(0, ROWS)
        rule = _rule(layout, b * T, first + o_q, T, window)
        p0, f0, f1, p1, s0, s1 = _key_tiles(rule, KEYS)
        q = _load(query + b * s_q[0] + h * s_q[1], m0, s_q[2], Tq, ROWS, D, BD, False)
        if HAS_SINKS:
            m = tl.zeros([ROWS], tl.float32) + tl.load(sinks + h).to(tl.float32) * LOG2_E
            l = tl.full([ROWS], 1.0, tl.float32)
        else:
            m = tl.full([ROWS], float("-inf"), tl.float32)
            l = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, BD], tl.float32)
        for MASKED in tl.static_range(2):
            for i in range((f0 - p0) + (p1 - f1) + (s1 - s0) if MASKED else f1 - f0):
                n0 = (_pick(i, p0, f0, f1, p1, s0, s1, 0) if MASKED else f0 + i) * KEYS
                k = _load(key, n0, s_k[2], T, KEYS, D, BD, not MASKED)
                s, _ = _logits(_outer(q, k), scale, softcap, HAS_SOFTCAP)
                if MASKED:
                    s = tl.where(_visible(rule, n0 + tl.arange(0, KEYS), 1), s, float("-inf"))
                m_new = tl.maximum(m, tl.max(s, 1))
                # Rows that have seen no key yet: -inf - -inf would be NaN.
                base = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
                p = tl.exp2(s - base[:, None])
                decay = tl.exp2(m - base)
                v = _load(value, n0, s_v[2], T, KEYS, D, BD, not MASKED)
                sums = _accumulate(sums * decay[:, None], p, v)
                l = l * decay + tl.sum(p, 1)
                m = m_new
        sees = _sees(rule)
        l = tl.where(sees, l, 1.0)
        sums = tl.where(sees[:, None], sums * (1 / l)[:, None], 0.0)
        _store(out + b * s_o[0] + h * s_o[1], m0, s_o[2], Tq, sums, ROWS, D, BD)
        # +inf makes the p of a row that sees nothing 0 in backward.
        b_lse = tl.where(sees, m + tl.log2(l), float("inf"))
        tl.store(lse + (b * Hq + h) * Tq + o_q, b_lse, mask=o_q < Tq)

    @triton.jit(do_not_specialize=["T", "Tq", "first", "window"])
    def _dq_kernel(
        query,  # [B, Hq, T - first, D]
        key,  # [B, Hkv, T, D]
        value,  # [B, Hkv, T, D]
        layout,  # position, prefix_end, span_start, perhaps span_end: each [B, T] int32
        out,  # [B, T - first, Hq, D]
        d_out,  # [B, T - first, Hq, D]
        lse,  # [B, Hq, T - first] float32
        delta,  # [B, Hq, T - first] float32, written
        d_query,  # [B, Hq, T - first, D], written
        s_q,  # strides of B, H, T, as all that follow
        s_k,
        s_v,
        s_o,
        s_do,
        s_dq,
        T,
        Tq,
        first,
        Hq,
        G,
        scale,
        softcap,
        window,
        ROWS: tl.constexpr,
        KEYS: tl.constexpr,
        D: tl.constexpr,
        BD: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
    ):
        m0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
        b = (tl.program_id(0) // Hq).to(tl.int64)
        h = (tl.program_id(0) % Hq).to(tl.int64)
        key += b * s_k[0] + h // G * s_k[1]
        value += b * s_v[0] + h // G * s_v[1]

        o_q = m0 + tl.arange(0, ROWS)
        rule = _rule(layout, b * T, first + o_q, T, window)
        p0, f0, f1, p1, s0, s1 = _key_tiles(rule, KEYS)
        do = _load(d_out + b * s_do[0] + h * s_do[1], m0, s_do[2], Tq, ROWS, D, BD, False)
        o = _load(out + b * s_o[0] + h * s_o[1], m0, s_o[2], Tq, ROWS, D, BD, False)
        b_delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        b_lse = tl.load(lse + (b * Hq + h) * Tq + o_q, mask=o_q < Tq, other=float("inf"))
        tl.store(delta + (b * Hq + h) * Tq + o_q, b_delta, mask=o_q < Tq)

        q = _load(query + b * s_q[0] + h * s_q[1], m0, s_q[2], Tq, ROWS, D, BD, False)
        dq = tl.zeros([ROWS, BD], tl.float32)
        for MASKED in tl.static_range(2):
            for i in range((f0 - p0) + (p1 - f1) + (s1 - s0) if MASKED else f1 - f0):
                n0 = (_pick(i, p0, f0, f1, p1, s0, s1, 0) if MASKED else f0 + i) * KEYS
                k = _load(key, n0, s_k[2], T, KEYS, D, BD, not MASKED)
                v = _load(value, n0, s_v[2], T, KEYS, D, BD, not MASKED)
                s, slope = _logits(_outer(q, k), scale, softcap, HAS_SOFTCAP)
                p = tl.exp2(s - b_lse[:, None])
                if MASKED:
                    p = tl.where(_visible(rule, n0 + tl.arange(0, KEYS), 1), p, 0.0)
                dq = _accumulate(dq, p * (_outer(do, v) - b_delta[:, None]) * slope, k)
        dq = tl.where(_sees(rule)[:, None], dq * scale, 0.0)
        _store(d_query + b * s_dq[0] + h * s_dq[1], m0, s_dq[2], Tq, dq, ROWS, D, BD)

    @triton.jit
    def _extend(a0, a1, f0, f1, o_t, member, sees_all):
        """Hull [a0, a1) of the members so far and [f0, f1), the first run of those that see all, further tiles o_t."""
        a0 = tl.minimum(a0, tl.min(tl.where(member, o_t, FAR), 0))
        a1 = tl.maximum(a1, tl.max(tl.where(member, o_t + 1, 0), 0))
        f0 = tl.minimum(f0, tl.min(tl.where(member & sees_all, o_t, FAR), 0))
        f1 = tl.minimum(f1, tl.min(tl.where(((member & sees_all) == 0) & (o_t > f0), o_t, FAR), 0))
        return a0, a1, f0, f1

    @triton.jit(do_not_specialize=["T", "Tq", "first", "window"])
    def _row_tiles_kernel(
        layout,  # position, prefix_end, span_start, perhaps span_end: each [B, T] int32
        plan,  # [B, tiles of keys, 8] int32, written
        T,
        Tq,
        first,
        window,
        ROWS: tl.constexpr,
        KEYS: tl.constexpr,
        TILES: tl.constexpr,
    ):
        """Tiles of rows that see a tile of keys: tokens [a0, a1), of them [f0, f1) all of it; spans [b0, b1), [g0, g1).

        Rows and keys are those from `first` on. Written in the order a0, f0, f1, a1, b0, g0, g1, b1. One launch for all
        heads: it reads the layout only.
        """
        b = tl.program_id(1).to(tl.int64)
        n0 = first + tl.program_id(0) * KEYS
        n1 = tl.minimum(n0 + KEYS, T)
        a0, a1, f0, f1 = FAR, 0, FAR, FAR
        b0, b1, g0, g1 = FAR, 0, FAR, FAR
        for t in range(0, tl.cdiv(Tq, ROWS), TILES):
            o_t = t + tl.arange(0, TILES)
            o_q = o_t[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
            lower, end, own, stop = _rule(layout, b * T, first + o_q, T, window)
            prefix = (lower < end) & (lower < n1) & (end > n0)
            span = (own < stop) & (own < n1) & (stop > n0)
            sees = tl.max((prefix | span).to(tl.int32), 1) > 0
            sees_all = tl.min(((lower <= n0) & (end >= n1)).to(tl.int32), 1) > 0
            spans = tl.max((own < stop).to(tl.int32), 1) > 0
            a0, a1, f0, f1 = _extend(a0, a1, f0, f1, o_t, sees & (spans == 0), sees_all)
            b0, b1, g0, g1 = _extend(b0, b1, g0, g1, o_t, sees & spans, sees_all)
        a0 = tl.minimum(a0, a1)
        b0 = tl.minimum(b0, b1)
        # Each tile once, also in a layout that mixes tokens with spans: there both intervals become one.
        mixed = (a0 < a1) & (b0 < b1) & (b0 < a1)
        a0 = tl.where(mixed, tl.minimum(a0, b0), a0)
        a1 = tl.where(mixed, tl.maximum(a1, b1), a1)
        b0 = tl.where(mixed, b1, b0)
        plan += (b * tl.num_programs(0) + tl.program_id(0)) * 8
        tl.store(plan, a0)
        tl.store(plan + 1, tl.minimum(f0, a1))
        tl.store(plan + 2, tl.minimum(f1, a1))
        tl.store(plan + 3, a1)
        tl.store(plan + 4, b0)
        tl.store(plan + 5, tl.minimum(tl.maximum(g0, b0), b1))
        tl.store(plan + 6, tl.minimum(tl.maximum(g1, b0), b1))
        tl.store(plan + 7, b1)

    @triton.jit(do_not_specialize=["T", "Tq", "first", "window"])
    def _dkdv_kernel(
        query,  # [B, Hq, T - first, D]
        key,  # [B, Hkv, T, D]
        value,  # [B, Hkv, T, D]
        layout,  # position, prefix_end, span_start, perhaps span_end: each [B, T] int32
        plan,  # [B, tiles of keys, 8] int32
        d_out,  # [B, T - first, Hq, D]
        lse,  # [B, Hq, T - first] float32
        delta,  # [B, Hq, T - first] float32
        d_key,  # [B, Hkv, T, D], written from `first` on
        d_value,  # [B, Hkv, T, D], written from `first` on
        s_q,  # strides of B, H, T, as all that follow
        s_k,
        s_v,
        s_do,
        s_dk,
        s_dv,
        T,
        Tq,
        first,
        Hkv,
        G,
        scale,
        softcap,
        window,
        ROWS: tl.constexpr,
        KEYS: tl.constexpr,
        D: tl.constexpr,
        BD: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
    ):
        # The first keys, seen by the most rows, start first.
        n0 = first + tl.program_id(1) * KEYS
        b = (tl.program_id(0) // Hkv).to(tl.int64)
        h = (tl.program_id(0) % Hkv).to(tl.int64)
        query += b * s_q[0] + h * G * s_q[1]
        d_out += b * s_do[0] + h * G * s_do[1]
        lse += (b * Hkv + h) * G * Tq
        delta += (b * Hkv + h) * G * Tq
        plan += (b * tl.num_programs(1) + tl.program_id(1)) * 8
        a0 = tl.load(plan)
        f0 = tl.load(plan + 1)
        f1 = tl.load(plan + 2)
        a1 = tl.load(plan + 3)
        b0 = tl.load(plan + 4)
        g0 = tl.load(plan + 5)
        g1 = tl.load(plan + 6)
        b1 = tl.load(plan + 7)

        o_n = n0 + tl.arange(0, KEYS)
        k = _load(key + b * s_k[0] + h * s_k[1], n0, s_k[2], T, KEYS, D, BD, False)
        v = _load(value + b * s_v[0] + h * s_v[1], n0, s_v[2], T, KEYS, D, BD, False)
        dk = tl.zeros([KEYS, BD], tl.float32)
        dv = tl.zeros([KEYS, BD], tl.float32)
        for MASKED in tl.static_range(2):
            n = (f0 - a0) + (a1 - f1) + (g0 - b0) + (b1 - g1) if MASKED else (f1 - f0) + (g1 - g0)
            # One loop over the group's query heads and their tiles, which the compiler pipelines across heads too; the
            # tile and its head are counted, as divisions would cost a tenth of the loop's instructions.
            g = tl.full([], 0, tl.int64)
            i = 0
            for _ in range(n * G):
                i_m = _pick(i, a0, f0, f1, a1, b0, g0, g1) if MASKED else _pick(i, f0, f1, g0, g1, 0, 0, 0)
                m0 = i_m * ROWS
                o_q = m0 + tl.arange(0, ROWS)
                q = _load(query + g * s_q[1], m0, s_q[2], Tq, ROWS, D, BD, not MASKED)
                do = _load(d_out + g * s_do[1], m0, s_do[2], Tq, ROWS, D, BD, not MASKED)
                if MASKED:
                    b_lse = tl.load(lse + g * Tq + o_q, mask=o_q < Tq, other=float("inf"))
                    b_delta = tl.load(delta + g * Tq + o_q, mask=o_q < Tq, other=0.0)
                else:
                    b_lse = tl.load(lse + g * Tq + o_q)
                    b_delta = tl.load(delta + g * Tq + o_q)
                # Scores stand [keys, rows], so that no product needs p transposed.
                s, slope = _logits(_outer(k, q), scale, softcap, HAS_SOFTCAP)
                p = tl.exp2(s - b_lse[None, :])
                if MASKED:
                    p = tl.where(_visible(_rule(layout, b * T, first + o_q, T, window), o_n, 0), p, 0.0)
                dv = _accumulate(dv, p, do)
                dk = _accumulate(dk, p * (_outer(v, do) - b_delta[None, :]) * slope, q)
                i += 1
                g += tl.where(i == n, 1, 0)
                i = tl.where(i == n, 0, i)
        _store(d_key + b * s_dk[0] + h * s_dk[1], n0, s_dk[2], T, dk * scale, KEYS, D, BD)
        _store(d_value + b * s_dv[0] + h * s_dv[1], n0, s_dv[2], T, dv, KEYS, D, BD)


class Tiles(NamedTuple):
    """Rows and keys of a tile, warps, stages of the software pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


# By kernel and bytes of an element, up to a head dimension; mtpkern.bench.aot holds what they cost. Float32 runs
# without tensor cores, exactly: for tests and small models.
TILES = {
    ("forward", 2): {128: Tiles(128, 64, 8, 3), 256: Tiles(64, 32, 8, 3)},
    ("dq", 2): {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 2), 256: Tiles(64, 32, 8, 2)},
    ("dkdv", 2): {64: Tiles(64, 128, 8, 2), 128: Tiles(32, 128, 8, 2), 256: Tiles(32, 64, 8, 2)},
    ("forward", 4): {64: Tiles(32, 32, 8, 1), 128: Tiles(16, 32, 8, 1), 256: Tiles(16, 16, 8, 1)},
    ("dq", 4): {64: Tiles(32, 32, 8, 1), 256: Tiles(16, 16, 8, 1)},
    ("dkdv", 4): {64: Tiles(32, 32, 8, 1), 256: Tiles(16, 16, 8, 1)},
}
# AMD's warps of 64 threads have 512 registers a thread only up to 4 warps, and little shared memory.
AMD_TILES = TILES | {
    ("forward", 2): {128: Tiles(128, 64, 8, 1), 256: Tiles(64, 32, 4, 1)},
    ("dq", 2): {64: Tiles(64, 64, 4, 1), 128: Tiles(64, 64, 4, 1), 256: Tiles(32, 32, 4, 1)},
    ("dkdv", 2): {64: Tiles(32, 64, 4, 1), 128: Tiles(32, 64, 4, 1), 256: Tiles(32, 32, 4, 1)},
    ("dq", 4): {64: Tiles(32, 32, 8, 1), 256: Tiles(16, 16, 4, 1)},
    ("dkdv", 4): {64: Tiles(32, 32, 4, 1), 256: Tiles(16, 16, 4, 1)},
}
MAX_HEAD_DIM = 256


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take."""
    if device.type != "cuda":
        return 1 << 30
    properties = torch.cuda.get_device_properties(device)
    # NVIDIA's limit on request is above the default; elsewhere it is missing or 0.
    return max(properties.shared_memory_per_block, getattr(properties, "shared_memory_per_block_optin", 0))


def _tiles(kernel: str, query: Tensor) -> Tiles:
    """The table's tiles, with fewer stages where the device has not the memory, and smaller where not for two."""
    columns, size = _columns(query), query.element_size()
    table = AMD_TILES if torch.version.hip else TILES
    tiles = next(tiles for limit, tiles in table[kernel, size].items() if columns <= limit)
    # Blocks that stay (q; q and do; k and v) and blocks of every stage (k and v; q and do).
    stay = {"forward": tiles.rows, "dq": 2 * tiles.rows, "dkdv": 2 * tiles.keys}[kernel]
    passing = 2 * (tiles.rows if kernel == "dkdv" else tiles.keys)
    # 2 KiB for lse, delta and what reductions need.
    room = (_shared_memory(query.device) - 2048) // (columns * size) - stay
    if tiles.stages > 1 and room < 2 * passing:
        tiles = tiles._replace(rows=tiles.rows // 2) if kernel == "dkdv" else tiles._replace(keys=tiles.keys // 2)
        passing //= 2
    return tiles._replace(stages=max(1, min(tiles.stages, room // passing)))


def _columns(query: Tensor) -> int:
    """Columns of a block: a power of two, and at least 16, the least of a dot."""
    return max(1 << (query.shape[-1] - 1).bit_length(), 16)


def _numbers(scoring: Scoring) -> tuple[float, float, int]:
    """Scale, soft cap and window as kernels take them."""
    # A window no row reaches the end of, instead of a second kernel without one.
    return scoring.scale, scoring.softcap or 0.0, 1 << 30 if scoring.window is None else scoring.window


def _options(kernel: str, query: Tensor, scoring: Scoring) -> dict[str, Any]:
    """What all kernels with matrix products are compiled for."""
    rows, keys, warps, stages = _tiles(kernel, query)
    sizes = {"ROWS": rows, "KEYS": keys, "D": query.shape[-1], "BD": _columns(query)}
    return sizes | {"HAS_SOFTCAP": scoring.softcap is not None, "num_warps": warps, "num_stages": stages}


def _addressable(x: Tensor) -> Tensor:
    """A tensor whose columns are adjacent, and whose offsets inside a tile stay below 2^31."""
    return x if x.stride(-1) == 1 and x.stride(-2) < 1 << 24 else x.contiguous()


def _strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    """Strides of B, H, T of each [B, H, T, D]."""
    return [x.stride()[:3] for x in tensors]


def _extent(query: Tensor, key: Tensor) -> tuple[int, int, int]:
    """Rows, queries, and the first row that has one. All three, since a kernel's arguments take it no register."""
    return key.shape[2], query.shape[2], key.shape[2] - query.shape[2]


def _like(x: Tensor) -> Tensor:
    """A new tensor of the shape [B, H, T, D], heads inside rows as models hand them over."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


@operator("span_attention")
def _forward(
    query: Tensor, key: Tensor, value: Tensor, layout: Sequence[Tensor], scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """`out` [B, T, Hq, D] and `lse`: one op to torch.compile, which looks no further."""
    query, key, value = qkv = [_addressable(x) for x in (query, key, value)]
    batch, heads, rows, _ = query.shape
    out, lse = _forward_fake(query)
    options = _options("forward", query, scoring)
    with on_device(query):
        _forward_kernel[batch * heads, triton.cdiv(rows, options["ROWS"])](
            *(*qkv, scoring.sinks, tuple(layout), out, lse),
            *_strides(*qkv, out.transpose(1, 2)),
            *(*_extent(query, key), heads, heads // key.shape[1], *_numbers(scoring)),
            **options,
            HAS_SINKS=scoring.sinks is not None,
        )
    return out, lse


@_forward.fake
def _forward_fake(query, *_):
    batch, heads, rows, dim = query.shape
    return query.new_empty(batch, rows, heads, dim), query.new_empty(batch, heads, rows, dtype=torch.float32)


@operator("span_attention_backward")
def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    layout: Sequence[Tensor],
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, and `delta`."""
    d_query, d_key, d_value, delta = _backward_fake(query, key, value, out, lse)
    extent = _extent(query, key)
    for x in (d_key, d_value):
        x[:, :, : extent[-1]] = 0
    out, d_out = out.transpose(1, 2), _addressable(d_out.transpose(1, 2))
    query, key, value = qkv = [_addressable(x) for x in (query, key, value)]
    (batch, heads, rows, _), kv_heads = query.shape, key.shape[1]
    layout = tuple(layout)
    tail = heads // kv_heads, *_numbers(scoring)
    for_dq, for_dkdv = (_options(kernel, query, scoring) for kernel in ("dq", "dkdv"))
    sizes = {name: for_dkdv[name] for name in ("ROWS", "KEYS")}
    tiles = triton.cdiv(rows, sizes["KEYS"])
    plan = lse.new_empty(batch, tiles, 8, dtype=torch.int32)
    with on_device(query):
        _dq_kernel[batch * heads, triton.cdiv(rows, for_dq["ROWS"])](
            *(*qkv, layout, out, d_out, lse, delta, d_query),
            *_strides(*qkv, out, d_out, d_query),
            *(*extent, heads, *tail),
            **for_dq,
        )
        _row_tiles_kernel[tiles, batch](layout, plan, *extent, tail[-1], **sizes, TILES=1024 // sizes["ROWS"])
        _dkdv_kernel[batch * kv_heads, tiles](
            *(*qkv, layout, plan, d_out, lse, delta, d_key, d_value),
            *_strides(*qkv, d_out, d_key, d_value),
            *(*extent, kv_heads, *tail),
            **for_dkdv,
        )
    return d_query, d_key, d_value, delta


@_backward.fake
def _backward_fake(query, key, value, out, lse, *_):
    return _like(query), _like(key), _like(value), torch.empty_like(lse)


def _remember(ctx, inputs, output) -> None:
    query, key, value, layout, *ctx.options, sinks = inputs
    ctx.save_for_backward(query, key, value, *output, sinks, *layout)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_out, _):
    query, key, value, out, lse, sinks, *layout = ctx.saved_tensors
    *gradients, delta = _backward(query, key, value, out, lse, d_out, layout, Scoring(*ctx.options))
    d_sinks = None
    if sinks is not None:
        weight = torch.exp2(sinks.float()[:, None] * log2(e) - lse)
        d_sinks = -(weight * delta).sum((0, 2)).to(sinks.dtype)
    return *gradients, [None] * len(layout), None, None, None, d_sinks


_forward.registered.register_autograd(_differentiate, setup_context=_remember)


def span_attention_triton(query: Tensor, key: Tensor, value: Tensor, rule: Rule, scoring: Scoring) -> Tensor:
    """`span_attention` by the kernels above: float16, bfloat16 or float32, D up to 256."""
    query, key, value = _as_autocast(query, key, value)
    layout = [x.to(torch.int32).contiguous() for x in rule if x is not None]
    return _forward(query, key, value, layout, scoring)[0]


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on; else as they are."""
    dtype = autocast_of(tensors[0].device)
    return tensors if dtype is None else tuple(x.to(dtype) for x in tensors)


def span_attention(
    query: Tensor, key: Tensor, value: Tensor, rule: Rule, scoring: Scoring, *, mask: Tensor | None = None
) -> Tensor:
    """Attend under the span rule: [B, Tq, Hq, D], differentiable in query, key, value and the sinks.

    query, key, value   [B, Hq, Tq, D] and twice [B, Hkv, T, D]; Hkv divides Hq. Queries are the last Tq of the T rows,
                        usually all: with fewer, the keys in front of them come from another pass, are constants, and
                        get no gradient
    rule                what each of the T rows sees, four tensors [B, T] (mtpkern.kernels.span_mask)
    scoring             scale, window, softcap and sinks (mtpkern.kernels.scoring)
    mask                the last Tq rows of span_mask of the rule with this window, where the caller has them already

    Raises ValueError for shapes that do not fit and a window below 1. Source: arXiv 2602.06019.

        out = span_attention(q, k, v, layout.rule, Scoring(q.shape[-1] ** -0.5))
    """
    (batch, heads, queries, dim), rows = query.shape, key.shape[2]
    fits = key.shape[0] == batch and key.shape[3] == dim and queries <= rows and heads % key.shape[1] == 0
    if key.shape != value.shape or not fits:
        raise ValueError(
            "key and value must be [B, Hkv, T, D] beside query [B, Hq, Tq, D], Hkv dividing Hq and Tq at most T; got "
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    if any(x is not None and x.shape != (batch, rows) for x in rule):
        got = [None if x is None else tuple(x.shape) for x in rule]
        raise ValueError(f"each tensor of the rule must be [B, T] = {(batch, rows)}; got {got}")
    if scoring.sinks is not None and scoring.sinks.shape != (heads,):
        raise ValueError(f"sinks must be [Hq] = [{heads}]; got {list(scoring.sinks.shape)}")
    if query.is_cuda and dim <= MAX_HEAD_DIM and query.dtype != torch.float64:
        return span_attention_triton(query, key, value, rule, scoring)
    return span_attention_reference(query, key, value, rule, scoring, mask=mask)


def span_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, rule: Rule, scoring: Scoring, *, mask: Tensor | None = None
) -> Tensor:
    """`span_attention` in plain torch, in the dtype of its inputs (float64 too) or in autocast's.

    Written out with softmax and batched products of [T, T] weights: on a CPU in bfloat16 forward and backward take a
    third of the time of scaled_dot_product_attention with this mask.
    """
    batch, heads, rows, dim = query.shape
    before = key.shape[2] - rows
    scale, softcap, sinks = scoring.scale, scoring.softcap, scoring.sinks
    if mask is None:
        mask = span_mask(*rule, window=scoring.window)[:, before:]
    query, key, value = _as_autocast(query, key, value)
    kv_heads = key.shape[1]
    # Half the lowest finite number, not -inf: a row without keys must give 0, not 0 / 0, and no sum may reach -inf.
    hidden = torch.finfo(query.dtype).min / 2
    bias = query.new_zeros(mask.shape).masked_fill_(~mask, hidden).unsqueeze(1).expand(-1, heads, -1, -1)
    if sinks is not None:
        # A sink is one more key, 0 like its value, with the sink for its bias.
        column = sinks.to(query.dtype).view(1, heads, 1, 1).expand(batch, -1, rows, -1)
        bias = torch.cat([bias, column], dim=-1)
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
    # The query heads that share a key/value head are further rows of it.
    q = query.reshape(batch * kv_heads, -1, dim)
    bias = bias.reshape(len(q), -1, key.shape[2])
    # Constants apart from keys that get a gradient, which would else be computed for both.
    sizes = [before, key.shape[2] - before] if before else [key.shape[2]]
    keys, values, biases = (
        x.split(sizes, dim) for x, dim in ((key.flatten(0, 1), 1), (value.flatten(0, 1), 1), (bias, -1))
    )
    if before:
        keys, values = ((x[0].detach(), x[1]) for x in (keys, values))
    score = []
    for k, here in zip(keys, biases):
        if softcap is None:
            score.append(torch.baddbmm(here, q, k.mT, alpha=scale))
        else:
            score.append(here + softcap * torch.tanh(torch.bmm(q, k.mT) * (scale / softcap)))
    weights = (score[0] if len(score) == 1 else torch.cat(score, dim=-1)).softmax(-1).split(sizes, dim=-1)
    out = torch.bmm(weights[0], values[0])
    if before:
        out = torch.baddbmm(out, weights[1], values[1])
    out = out.view(batch, heads, rows, dim).transpose(1, 2)
    return out.masked_fill(~mask.any(-1)[..., None, None], 0.0)
