"""Span attention: the attention of training, under the visibility rule of mtpkern.kernels.span_mask.

    s_rj  = softcap(scale * q_r . k_j)    over the keys j that row r sees;    softcap(x) = c tanh(x / c), or x
    out_r = sum_j exp(s_rj - m_r) v_j / (sum_j exp(s_rj - m_r) + exp(sink - m_r)),    m_r the maximum of its terms

A row that sees nothing (padding) gives 0 and receives and passes on no gradient.

The Triton form keeps lse_r, log2 of the denominator, and in backward computes p_rj = exp2(log2(e) s_rj - lse_r) again:

    dv_j = sum_r p_rj do_r        delta_r = do_r . out_r        ds_rj = p_rj (do_r . v_j - delta_r) softcap'
    dq_r = scale sum_j ds_rj k_j  dk_j = scale sum_r ds_rj q_r  dsink = -sum_r exp2(log2(e) sink - lse_r) delta_r

What a tile of rows sees follows from its three integers a row: tiles of keys that all its rows see run without a mask,
those at the ends of prefixes and in spans with it, all others are skipped. There is no mask tensor, nothing waits for
the host, and lengths, offsets and k are data that no kernel is compiled for. Sums run in a fixed order, without
atomics: equal inputs give equal bits. Any layout is computed rightly; spans sorted by prefix make the loops short.

Shapes   query [B, Hq, T, D];  key, value [B, Hkv, T, D];  position, prefix_end, span_start [B, T];  sinks [Hq]
         out [B, T, Hq, D];  lse, delta [B, Hq, T] float32
Traffic  forward reads q, k, v and writes out, 2 T D (Hq + Hkv) elements a sequence, backward twice that; the torch
         form builds the boolean mask [B, T, T] besides
FLOPs    4 Hq D a visible pair forward, 10 Hq D backward; the Triton form computes scores and do . v twice, 14 Hq D
Source   arXiv 2602.06019 (mask); tiles and recomputation after FlashAttention-2, arXiv 2307.08691; softcap as in
         Gemma 2, sinks as in gpt-oss
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtpkern.kernels.span_mask import span_mask

if find_spec("triton"):
    import triton
    import triton.language as tl

    LOG2_E = tl.constexpr(1.4426950408889634)
    # Above every row and every tile.
    FAR = tl.constexpr(1 << 30)

    # A block [rows, D] is a tuple of one or two blocks of columns, D0 and D1 wide, powers of two: 96 is 64 + 32.

    @triton.jit
    def _pointers(x, start, s_row, ROWS: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr):
        """Pointers [ROWS, COLUMNS]; 64 bits as far as the tile, because start * s_row can pass 2^31."""
        o_d = FIRST + tl.arange(0, COLUMNS)
        return x + tl.cast(start, tl.int64) * s_row + tl.arange(0, ROWS)[:, None] * s_row + o_d[None, :]

    @triton.jit
    def _inside(start, T, D: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr):
        """Which elements of those exist: rows below T, columns below D."""
        return (start + tl.arange(0, ROWS) < T)[:, None] & (FIRST + tl.arange(0, COLUMNS) < D)[None, :]

    @triton.jit
    def _load(
        x, start, s_row, T, ROWS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALL: tl.constexpr
    ):
        """The block of rows from `start`, 0 where there is none; ALL says that its rows all exist."""
        if ALL and D == D0 + D1:
            x0 = tl.load(_pointers(x, start, s_row, ROWS, 0, D0))
        else:
            x0 = tl.load(_pointers(x, start, s_row, ROWS, 0, D0), mask=_inside(start, T, D, ROWS, 0, D0), other=0.0)
        if D1 == 0:
            return (x0,)
        else:
            p_1 = _pointers(x, start, s_row, ROWS, D0, D1)
            if ALL and D == D0 + D1:
                return x0, tl.load(p_1)
            else:
                return x0, tl.load(p_1, mask=_inside(start, T, D, ROWS, D0, D1), other=0.0)

    @triton.jit
    def _store(x, start, s_row, T, block, ROWS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
        """Write a block in the buffer's dtype."""
        b_0 = block[0].to(x.dtype.element_ty)
        tl.store(_pointers(x, start, s_row, ROWS, 0, D0), b_0, mask=_inside(start, T, D, ROWS, 0, D0))
        if D1 > 0:
            b_1 = block[1].to(x.dtype.element_ty)
            tl.store(_pointers(x, start, s_row, ROWS, D0, D1), b_1, mask=_inside(start, T, D, ROWS, D0, D1))

    @triton.jit
    def _zeros(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
        if D1 == 0:
            return (tl.zeros([ROWS, D0], tl.float32),)
        else:
            return tl.zeros([ROWS, D0], tl.float32), tl.zeros([ROWS, D1], tl.float32)

    @triton.jit
    def _scaled(x, factor):
        """x * factor, a scalar or a column [rows, 1]."""
        if len(x) == 1:
            return (x[0] * factor,)
        else:
            return x[0] * factor, x[1] * factor

    @triton.jit
    def _kept(x, rows):
        """x with 0 in all other rows."""
        if len(x) == 1:
            return (tl.where(rows[:, None], x[0], 0.0),)
        else:
            return tl.where(rows[:, None], x[0], 0.0), tl.where(rows[:, None], x[1], 0.0)

    @triton.jit
    def _row_dot(x, y):
        """x_r . y_r in float32: [rows]."""
        s = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), 1)
        for c in tl.static_range(1, len(x)):
            s += tl.sum(x[c].to(tl.float32) * y[c].to(tl.float32), 1)
        return s

    @triton.jit
    def _outer(x, y):
        """x y^T in float32: [A, D], [B, D] -> [A, B]. "ieee" keeps float32 inputs from being cut to tf32."""
        s = tl.dot(x[0], tl.trans(y[0]), input_precision="ieee")
        for c in tl.static_range(1, len(x)):
            s = tl.dot(x[c], tl.trans(y[c]), s, input_precision="ieee")
        return s

    @triton.jit
    def _accumulate(sums, p, x):
        """sums + p x, p rounded to the dtype of x: [A, D] + [A, B] [B, D]."""
        p = p.to(x[0].dtype)
        if len(x) == 1:
            return (tl.dot(p, x[0], sums[0], input_precision="ieee"),)
        else:
            s0 = tl.dot(p, x[0], sums[0], input_precision="ieee")
            return s0, tl.dot(p, x[1], sums[1], input_precision="ieee")

    @triton.jit
    def _rule(layout, first, o_r, T, window):
        """What rows o_r see: keys lower <= j < end of the prefix, own <= j <= o_r of the span; no row exists from T."""
        m_r = o_r < T
        position = tl.load(layout[0] + first + o_r, mask=m_r, other=0)
        end = tl.load(layout[1] + first + o_r, mask=m_r, other=0)
        own = tl.where(m_r, tl.load(layout[2] + first + o_r, mask=m_r, other=0), o_r + 1)
        lower = end - position + o_r - own + tl.maximum(position - window + 1, 0)
        return tl.maximum(lower, 0), end, tl.maximum(own, o_r - window + 1)

    @triton.jit
    def _visible(lower, end, own, o_r, o_n):
        """span_mask of rows along one axis and keys along the other."""
        return ((o_n >= lower) & (o_n < end)) | ((o_n >= own) & (o_n <= o_r))

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
    def _sees(rule, o_r):
        """Which rows see anything."""
        lower, end, own = rule
        # The longer of prefix and span, not (lower < end) | (own <= o_r): where that comparison already chose the
        # tiles, using it again behind the loop crashes the compiler (triton 3.7.1, sm_90, layout conversions).
        return tl.maximum(end - lower, o_r + 1 - own) > 0

    @triton.jit
    def _key_tiles(rule, o_r, KEYS: tl.constexpr):
        """Tiles of keys that a tile of rows sees: prefix [p0, p1), of it [f0, f1) without a mask, spans [s0, s1).

        Rows that see nothing do not count for f0 and f1: what they compute is thrown away.
        """
        lower, end, own = rule
        prefix = lower < end
        span = own <= o_r
        sees = prefix | span
        p0 = tl.min(tl.where(prefix, lower, FAR), 0) // KEYS
        p1 = tl.cdiv(tl.max(tl.where(prefix, end, 0), 0), KEYS)
        s0 = tl.min(tl.where(span, own, FAR), 0) // KEYS
        s1 = tl.cdiv(tl.max(tl.where(span, o_r + 1, 0), 0), KEYS)
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

    @triton.jit
    def _forward_tile(
        state,
        q,
        key,
        value,
        s_k,
        s_v,
        i_n,
        rule,
        o_r,
        T,
        scale,
        softcap,
        KEYS: tl.constexpr,
        D: tl.constexpr,
        D0: tl.constexpr,
        D1: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        MASKED: tl.constexpr,
    ):
        """Take one tile of keys into (output, maximum, sum) of a tile of rows."""
        out, m, l = state
        n0 = i_n * KEYS
        k = _load(key, n0, s_k[2], T, KEYS, D, D0, D1, not MASKED)
        s, _ = _logits(_outer(q, k), scale, softcap, HAS_SOFTCAP)
        if MASKED:
            o_n = n0 + tl.arange(0, KEYS)
            lower, end, own = rule
            seen = _visible(lower[:, None], end[:, None], own[:, None], o_r[:, None], o_n[None, :])
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        # Rows that have seen no key yet: -inf - -inf would be NaN.
        base = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
        p = tl.exp2(s - base[:, None])
        decay = tl.exp2(m - base)
        v = _load(value, n0, s_v[2], T, KEYS, D, D0, D1, not MASKED)
        out = _accumulate(_scaled(out, decay[:, None]), p, v)
        return out, m_new, l * decay + tl.sum(p, 1)

    @triton.jit(do_not_specialize=["T", "window"])
    def _forward_kernel(
        query,  # [B, Hq, T, D]
        key,  # [B, Hkv, T, D]
        value,  # [B, Hkv, T, D]
        sinks,  # [Hq]
        layout,  # position, prefix_end, span_start: each [B, T] int32
        out,  # [B, T, Hq, D], written
        lse,  # [B, Hq, T] float32, written
        s_q,  # strides of B, H, T, as all that follow
        s_k,
        s_v,
        s_o,
        T,
        Hq,
        G,
        scale,
        softcap,
        window,
        ROWS: tl.constexpr,
        KEYS: tl.constexpr,
        D: tl.constexpr,
        D0: tl.constexpr,
        D1: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        HAS_SINKS: tl.constexpr,
    ):
        # The last rows see the longest prefixes: they start first, or one of them would be left alone at the end.
        m0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
        b = (tl.program_id(0) // Hq).to(tl.int64)
        h = (tl.program_id(0) % Hq).to(tl.int64)
        key += b * s_k[0] + h // G * s_k[1]
        value += b * s_v[0] + h // G * s_v[1]

        o_r = m0 + tl.arange(0, ROWS)
        rule = _rule(layout, b * T, o_r, T, window)
        p0, f0, f1, p1, s0, s1 = _key_tiles(rule, o_r, KEYS)
        q = _load(query + b * s_q[0] + h * s_q[1], m0, s_q[2], T, ROWS, D, D0, D1, False)
        if HAS_SINKS:
            m = tl.zeros([ROWS], tl.float32) + tl.load(sinks + h).to(tl.float32) * LOG2_E
            l = tl.full([ROWS], 1.0, tl.float32)
        else:
            m = tl.full([ROWS], float("-inf"), tl.float32)
            l = tl.zeros([ROWS], tl.float32)
        state = _zeros(ROWS, D0, D1), m, l
        for i_n in range(f0, f1):
            state = _forward_tile(
                state, q, key, value, s_k, s_v, i_n, rule, o_r, T, scale, softcap, KEYS, D, D0, D1, HAS_SOFTCAP, False
            )
        for i in range((f0 - p0) + (p1 - f1) + (s1 - s0)):
            i_n = _pick(i, p0, f0, f1, p1, s0, s1, 0)
            state = _forward_tile(
                state, q, key, value, s_k, s_v, i_n, rule, o_r, T, scale, softcap, KEYS, D, D0, D1, HAS_SOFTCAP, True
            )
        b_out, m, l = state
        sees = _sees(rule, o_r)
        l = tl.where(sees, l, 1.0)
        b_out = _kept(_scaled(b_out, 1 / l[:, None]), sees)
        _store(out + b * s_o[0] + h * s_o[1], m0, s_o[2], T, b_out, ROWS, D, D0, D1)
        # +inf makes the p of a row that sees nothing 0 in backward.
        b_lse = tl.where(sees, m + tl.log2(l), float("inf"))
        tl.store(lse + (b * Hq + h) * T + o_r, b_lse, mask=o_r < T)

    @triton.jit
    def _dq_tile(
        dq,
        rows,
        key,
        value,
        s_k,
        s_v,
        i_n,
        rule,
        o_r,
        T,
        scale,
        softcap,
        KEYS: tl.constexpr,
        D: tl.constexpr,
        D0: tl.constexpr,
        D1: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        MASKED: tl.constexpr,
    ):
        """Add one tile of keys to dq / scale of a tile of rows."""
        q, do, lse, delta = rows
        n0 = i_n * KEYS
        k = _load(key, n0, s_k[2], T, KEYS, D, D0, D1, not MASKED)
        v = _load(value, n0, s_v[2], T, KEYS, D, D0, D1, not MASKED)
        s, slope = _logits(_outer(q, k), scale, softcap, HAS_SOFTCAP)
        p = tl.exp2(s - lse[:, None])
        if MASKED:
            o_n = n0 + tl.arange(0, KEYS)
            lower, end, own = rule
            p = tl.where(_visible(lower[:, None], end[:, None], own[:, None], o_r[:, None], o_n[None, :]), p, 0.0)
        return _accumulate(dq, p * (_outer(do, v) - delta[:, None]) * slope, k)

    @triton.jit(do_not_specialize=["T", "window"])
    def _dq_kernel(
        query,  # [B, Hq, T, D]
        key,  # [B, Hkv, T, D]
        value,  # [B, Hkv, T, D]
        layout,  # position, prefix_end, span_start: each [B, T] int32
        out,  # [B, T, Hq, D]
        d_out,  # [B, T, Hq, D]
        lse,  # [B, Hq, T] float32
        delta,  # [B, Hq, T] float32, written
        d_query,  # [B, Hq, T, D], written
        s_q,  # strides of B, H, T, as all that follow
        s_k,
        s_v,
        s_o,
        s_do,
        s_dq,
        T,
        Hq,
        G,
        scale,
        softcap,
        window,
        ROWS: tl.constexpr,
        KEYS: tl.constexpr,
        D: tl.constexpr,
        D0: tl.constexpr,
        D1: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
    ):
        m0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
        b = (tl.program_id(0) // Hq).to(tl.int64)
        h = (tl.program_id(0) % Hq).to(tl.int64)
        key += b * s_k[0] + h // G * s_k[1]
        value += b * s_v[0] + h // G * s_v[1]

        o_r = m0 + tl.arange(0, ROWS)
        rule = _rule(layout, b * T, o_r, T, window)
        p0, f0, f1, p1, s0, s1 = _key_tiles(rule, o_r, KEYS)
        do = _load(d_out + b * s_do[0] + h * s_do[1], m0, s_do[2], T, ROWS, D, D0, D1, False)
        b_delta = _row_dot(do, _load(out + b * s_o[0] + h * s_o[1], m0, s_o[2], T, ROWS, D, D0, D1, False))
        b_lse = tl.load(lse + (b * Hq + h) * T + o_r, mask=o_r < T, other=float("inf"))
        tl.store(delta + (b * Hq + h) * T + o_r, b_delta, mask=o_r < T)

        q = _load(query + b * s_q[0] + h * s_q[1], m0, s_q[2], T, ROWS, D, D0, D1, False)
        rows = q, do, b_lse, b_delta
        dq = _zeros(ROWS, D0, D1)
        for i_n in range(f0, f1):
            dq = _dq_tile(
                dq, rows, key, value, s_k, s_v, i_n, rule, o_r, T, scale, softcap, KEYS, D, D0, D1, HAS_SOFTCAP, False
            )
        for i in range((f0 - p0) + (p1 - f1) + (s1 - s0)):
            i_n = _pick(i, p0, f0, f1, p1, s0, s1, 0)
            dq = _dq_tile(
                dq, rows, key, value, s_k, s_v, i_n, rule, o_r, T, scale, softcap, KEYS, D, D0, D1, HAS_SOFTCAP, True
            )
        dq = _kept(_scaled(dq, scale), _sees(rule, o_r))
        _store(d_query + b * s_dq[0] + h * s_dq[1], m0, s_dq[2], T, dq, ROWS, D, D0, D1)

    @triton.jit(do_not_specialize=["T", "window"])
    def _row_tiles_kernel(
        layout,  # position, prefix_end, span_start: each [B, T] int32
        plan,  # [B, tiles of keys, 8] int32, written
        T,
        window,
        ROWS: tl.constexpr,
        KEYS: tl.constexpr,
        TILES: tl.constexpr,
    ):
        """Tiles of rows that see a tile of keys: tokens [a0, a1), of them [f0, f1) all of it; spans [b0, b1), [g0, g1).

        Written in the order a0, f0, f1, a1, b0, g0, g1, b1. One launch for all heads: it reads the layout only.
        """
        b = tl.program_id(1).to(tl.int64)
        n0 = tl.program_id(0) * KEYS
        n1 = tl.minimum(n0 + KEYS, T)
        a0, a1, f0, f1 = FAR, 0, FAR, FAR
        b0, b1, g0, g1 = FAR, 0, FAR, FAR
        for t in range(0, tl.cdiv(T, ROWS), TILES):
            o_t = t + tl.arange(0, TILES)
            o_r = o_t[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
            lower, end, own = _rule(layout, b * T, o_r, T, window)
            prefix = (lower < end) & (lower < n1) & (end > n0)
            span = (own <= o_r) & (own < n1) & (o_r >= n0)
            sees = tl.max((prefix | span).to(tl.int32), 1) > 0
            sees_all = tl.min(((lower <= n0) & (end >= n1)).to(tl.int32), 1) > 0
            spans = tl.max((own <= o_r).to(tl.int32), 1) > 0
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

    @triton.jit
    def _extend(a0, a1, f0, f1, o_t, member, sees_all):
        """Hull [a0, a1) of the members so far and [f0, f1), the first run of those that see all, further tiles o_t."""
        a0 = tl.minimum(a0, tl.min(tl.where(member, o_t, FAR), 0))
        a1 = tl.maximum(a1, tl.max(tl.where(member, o_t + 1, 0), 0))
        f0 = tl.minimum(f0, tl.min(tl.where(member & sees_all, o_t, FAR), 0))
        f1 = tl.minimum(f1, tl.min(tl.where(((member & sees_all) == 0) & (o_t > f0), o_t, FAR), 0))
        return a0, a1, f0, f1

    @triton.jit
    def _dkdv_tile(
        sums,
        k,
        v,
        query,
        d_out,
        lse,
        delta,
        layout,
        first,
        s_q,
        s_do,
        i_m,
        o_n,
        T,
        scale,
        softcap,
        window,
        ROWS: tl.constexpr,
        D: tl.constexpr,
        D0: tl.constexpr,
        D1: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        MASKED: tl.constexpr,
    ):
        """Add one tile of rows of one query head to (dk / scale, dv) of a tile of keys; scores stand [keys, rows]."""
        dk, dv = sums
        m0 = i_m * ROWS
        o_r = m0 + tl.arange(0, ROWS)
        q = _load(query, m0, s_q[2], T, ROWS, D, D0, D1, not MASKED)
        do = _load(d_out, m0, s_do[2], T, ROWS, D, D0, D1, not MASKED)
        if MASKED:
            b_lse = tl.load(lse + o_r, mask=o_r < T, other=float("inf"))
            b_delta = tl.load(delta + o_r, mask=o_r < T, other=0.0)
        else:
            b_lse = tl.load(lse + o_r)
            b_delta = tl.load(delta + o_r)
        s, slope = _logits(_outer(k, q), scale, softcap, HAS_SOFTCAP)
        p = tl.exp2(s - b_lse[None, :])
        if MASKED:
            lower, end, own = _rule(layout, first, o_r, T, window)
            p = tl.where(_visible(lower[None, :], end[None, :], own[None, :], o_r[None, :], o_n[:, None]), p, 0.0)
        dv = _accumulate(dv, p, do)
        return _accumulate(dk, p * (_outer(v, do) - b_delta[None, :]) * slope, q), dv

    @triton.jit(do_not_specialize=["T", "window"])
    def _dkdv_kernel(
        query,  # [B, Hq, T, D]
        key,  # [B, Hkv, T, D]
        value,  # [B, Hkv, T, D]
        layout,  # position, prefix_end, span_start: each [B, T] int32
        plan,  # [B, tiles of keys, 8] int32
        d_out,  # [B, T, Hq, D]
        lse,  # [B, Hq, T] float32
        delta,  # [B, Hq, T] float32
        d_key,  # [B, Hkv, T, D], written
        d_value,  # [B, Hkv, T, D], written
        s_q,  # strides of B, H, T, as all that follow
        s_k,
        s_v,
        s_do,
        s_dk,
        s_dv,
        T,
        Hkv,
        G,
        scale,
        softcap,
        window,
        ROWS: tl.constexpr,
        KEYS: tl.constexpr,
        D: tl.constexpr,
        D0: tl.constexpr,
        D1: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
    ):
        # The first keys, seen by the most rows, start first.
        n0 = tl.program_id(1) * KEYS
        b = (tl.program_id(0) // Hkv).to(tl.int64)
        h = (tl.program_id(0) % Hkv).to(tl.int64)
        query += b * s_q[0] + h * G * s_q[1]
        d_out += b * s_do[0] + h * G * s_do[1]
        lse += (b * Hkv + h) * G * T
        delta += (b * Hkv + h) * G * T
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
        k = _load(key + b * s_k[0] + h * s_k[1], n0, s_k[2], T, KEYS, D, D0, D1, False)
        v = _load(value + b * s_v[0] + h * s_v[1], n0, s_v[2], T, KEYS, D, D0, D1, False)
        sums = _zeros(KEYS, D0, D1), _zeros(KEYS, D0, D1)
        # One loop over the group's query heads and their tiles, which the compiler pipelines across heads too.
        n = (f1 - f0) + (g1 - g0)
        for i in range(n * G):
            g = (i // n).to(tl.int64)
            i_m = _pick(i % n, f0, f1, g0, g1, 0, 0, 0)
            sums = _dkdv_tile(
                sums, k, v, query + g * s_q[1], d_out + g * s_do[1], lse + g * T, delta + g * T, layout, b * T, s_q,
                s_do, i_m, o_n, T, scale, softcap, window, ROWS, D, D0, D1, HAS_SOFTCAP, False
            )  # fmt: skip
        n = (f0 - a0) + (a1 - f1) + (g0 - b0) + (b1 - g1)
        for i in range(n * G):
            g = (i // n).to(tl.int64)
            i_m = _pick(i % n, a0, f0, f1, a1, b0, g0, g1)
            sums = _dkdv_tile(
                sums, k, v, query + g * s_q[1], d_out + g * s_do[1], lse + g * T, delta + g * T, layout, b * T, s_q,
                s_do, i_m, o_n, T, scale, softcap, window, ROWS, D, D0, D1, HAS_SOFTCAP, True
            )  # fmt: skip
        dk, dv = sums
        dk = _scaled(dk, scale)
        _store(d_key + b * s_dk[0] + h * s_dk[1], n0, s_dk[2], T, dk, KEYS, D, D0, D1)
        _store(d_value + b * s_dv[0] + h * s_dv[1], n0, s_dv[2], T, dv, KEYS, D, D0, D1)


class Tiles(NamedTuple):
    """Rows and keys of a tile, warps, stages of the software pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


# By kernel and bytes of an element, up to a head dimension; tests/test_aot_span.py holds what they cost. Float32 runs
# without tensor cores, exactly: for tests and small models.
TILES = {
    ("forward", 2): {64: Tiles(128, 64, 4, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(128, 64, 8, 2)},
    ("dq", 2): {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(64, 64, 8, 2)},
    ("dkdv", 2): {64: Tiles(64, 128, 8, 2), 128: Tiles(64, 128, 8, 2), 256: Tiles(32, 64, 8, 2)},
    ("forward", 4): {64: Tiles(64, 32, 8, 2), 128: Tiles(32, 32, 8, 2), 256: Tiles(32, 16, 8, 2)},
    ("dq", 4): {64: Tiles(32, 32, 4, 2), 128: Tiles(32, 32, 4, 2), 256: Tiles(16, 16, 4, 1)},
    ("dkdv", 4): {64: Tiles(32, 32, 8, 2), 128: Tiles(32, 32, 8, 2), 256: Tiles(16, 16, 4, 1)},
}
# AMD's warps of 64 threads have 512 registers a thread only up to 4 warps, and little shared memory.
AMD_TILES = TILES | {
    ("forward", 2): {128: Tiles(128, 64, 8, 1), 256: Tiles(64, 32, 4, 1)},
    ("dq", 2): {64: Tiles(64, 64, 4, 1), 128: Tiles(64, 64, 4, 1), 256: Tiles(32, 32, 4, 1)},
    ("dkdv", 2): {64: Tiles(32, 64, 4, 1), 128: Tiles(32, 64, 4, 1), 256: Tiles(32, 32, 4, 1)},
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
    """The table's tiles, with fewer stages where the device has not the memory for all of them."""
    dim, size = query.shape[-1], query.element_size()
    table = AMD_TILES if torch.version.hip else TILES
    tiles = next(tiles for limit, tiles in table[kernel, size].items() if dim <= limit)
    # Blocks that stay (q; q and do; k and v) and blocks of every stage (k and v; q and do).
    stay = {"forward": tiles.rows, "dq": 2 * tiles.rows, "dkdv": 2 * tiles.keys}[kernel]
    passing = 2 * (tiles.rows if kernel == "dkdv" else tiles.keys)
    # 2 KiB for lse, delta and what reductions need.
    room = (_shared_memory(query.device) - 2048) // (dim * size) - stay
    return tiles._replace(stages=max(1, min(tiles.stages, room // passing)))


def _columns(dim: int) -> tuple[int, int]:
    """A head dimension as two powers of two: (64, 32) for 96, (128, 0) for 128; at least 16, the least of a dot."""
    first = max(1 << dim.bit_length() - 1, 16)
    return first, max(triton.next_power_of_2(dim - first), 16) if dim > first else 0


def _addressable(x: Tensor) -> Tensor:
    """A tensor whose columns are adjacent, and whose offsets inside a tile stay below 2^31."""
    return x if x.stride(-1) == 1 and x.stride(-2) < 1 << 24 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of B, H, T of [B, H, T, D]."""
    return x.stride(0), x.stride(1), x.stride(2)


class _SpanAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        layout: tuple[Tensor, Tensor, Tensor],
        scale: float,
        window: int,
        softcap: float | None,
    ) -> Tensor:
        batch, heads, rows, dim = query.shape
        out = query.new_empty(batch, rows, heads, dim)
        lse = query.new_empty(batch, heads, rows, dtype=torch.float32)
        tiles = _tiles("forward", query)
        d0, d1 = _columns(dim)
        _forward_kernel[batch * heads, triton.cdiv(rows, tiles.rows)](
            query,
            key,
            value,
            sinks,
            layout,
            out,
            lse,
            _strides(query),
            _strides(key),
            _strides(value),
            _strides(out.transpose(1, 2)),
            rows,
            heads,
            heads // key.shape[1],
            scale,
            softcap or 0.0,
            window,
            ROWS=tiles.rows,
            KEYS=tiles.keys,
            D=dim,
            D0=d0,
            D1=d1,
            HAS_SOFTCAP=softcap is not None,
            HAS_SINKS=sinks is not None,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        ctx.save_for_backward(query, key, value, sinks, *layout, out, lse)
        ctx.options = scale, window, softcap
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, position, prefix_end, span_start, out, lse = ctx.saved_tensors
        scale, window, softcap = ctx.options
        layout = position, prefix_end, span_start
        batch, heads, rows, dim = query.shape
        kv_heads = key.shape[1]
        groups = heads // kv_heads
        d_out = _addressable(d_out.transpose(1, 2)).transpose(1, 2)
        d_query, d_key, d_value = (torch.empty_like(x) for x in (query, key, value))
        delta = torch.empty_like(lse)
        d0, d1 = _columns(dim)
        columns = {"D": dim, "D0": d0, "D1": d1, "HAS_SOFTCAP": softcap is not None}
        tail = scale, softcap or 0.0, window

        tiles = _tiles("dq", query)
        _dq_kernel[batch * heads, triton.cdiv(rows, tiles.rows)](
            query,
            key,
            value,
            layout,
            out,
            d_out,
            lse,
            delta,
            d_query,
            *(_strides(x) for x in (query, key, value, out.transpose(1, 2), d_out.transpose(1, 2), d_query)),
            rows,
            heads,
            groups,
            *tail,
            ROWS=tiles.rows,
            KEYS=tiles.keys,
            **columns,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        tiles = _tiles("dkdv", query)
        key_tiles = triton.cdiv(rows, tiles.keys)
        plan = lse.new_empty(batch, key_tiles, 8, dtype=torch.int32)
        _row_tiles_kernel[key_tiles, batch](
            layout, plan, rows, window, ROWS=tiles.rows, KEYS=tiles.keys, TILES=1024 // tiles.rows
        )
        _dkdv_kernel[batch * kv_heads, key_tiles](
            query,
            key,
            value,
            layout,
            plan,
            d_out,
            lse,
            delta,
            d_key,
            d_value,
            *(_strides(x) for x in (query, key, value, d_out.transpose(1, 2), d_key, d_value)),
            rows,
            kv_heads,
            groups,
            *tail,
            ROWS=tiles.rows,
            KEYS=tiles.keys,
            **columns,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        d_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            weight = torch.exp2(sinks.float()[:, None] * 1.4426950408889634 - lse)
            d_sinks = -(weight * delta).sum((0, 2)).to(sinks.dtype)
        return d_query, d_key, d_value, d_sinks, *([None] * 4)


def span_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    prefix_end: Tensor,
    span_start: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`span_attention` by the kernels above: float16, bfloat16 or float32, D up to 256."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    layout = tuple(x.to(torch.int32).contiguous() for x in (position, prefix_end, span_start))
    # A window no row reaches the end of, instead of a second kernel without one.
    far = 1 << 30 if window is None else window
    query, key, value = (_addressable(x) for x in (query, key, value))
    return _SpanAttention.apply(query, key, value, sinks, layout, scale, far, softcap)


def span_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    prefix_end: Tensor,
    span_start: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attend under the span rule: [B, T, Hq, D], differentiable in query, key, value and sinks.

    query, key, value                  [B, Hq, T, D] and twice [B, Hkv, T, D]; Hkv divides Hq
    position, prefix_end, span_start   [B, T] integers (mtpkern.kernels.span_mask)
    scale                              factor on the dot products, usually D ** -0.5
    window, softcap, sinks             sliding window in positions; logit cap; one extra logit [Hq] a head
    mask                               span_mask of the three with this window, where the caller has it already

    Raises ValueError for shapes that do not fit. Source: arXiv 2602.06019.

        out = span_attention(q, k, v, layout.position, layout.prefix_end, layout.span_start, scale=q.shape[-1] ** -0.5)
    """
    batch, heads, rows, dim = query.shape
    if key.shape != value.shape or key.shape[0] != batch or key.shape[2:] != (rows, dim) or heads % key.shape[1]:
        raise ValueError(
            "key and value must be [B, Hkv, T, D] beside query [B, Hq, T, D], Hkv dividing Hq; got "
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    if position.shape != (batch, rows):
        raise ValueError(f"position must be [B, T] = {(batch, rows)}; got {tuple(position.shape)}")
    if query.is_cuda and dim <= MAX_HEAD_DIM and query.dtype != torch.float64:
        return span_attention_triton(
            query,
            key,
            value,
            position,
            prefix_end,
            span_start,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
        )
    return span_attention_reference(
        query,
        key,
        value,
        position,
        prefix_end,
        span_start,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        mask=mask,
    )


def span_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    prefix_end: Tensor,
    span_start: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`span_attention` in plain torch, in the dtype of its inputs (float64 too) or in autocast's.

    Written out with softmax and batched products of [T, T] weights: on a CPU in bfloat16 forward and backward take a
    third of the time of scaled_dot_product_attention with this mask.
    """
    if mask is None:
        mask = span_mask(position, prefix_end, span_start, window)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    batch, heads, rows, dim = query.shape
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
    k, v = key.flatten(0, 1), value.flatten(0, 1)
    bias = bias.reshape(len(q), -1, k.shape[1])
    if softcap is None:
        score = torch.baddbmm(bias, q, k.mT, alpha=scale)
    else:
        score = bias + softcap * torch.tanh(torch.bmm(q, k.mT) * (scale / softcap))
    out = torch.bmm(score.softmax(-1), v).view(batch, heads, rows, dim).transpose(1, 2)
    return out.masked_fill(~mask.any(-1)[..., None, None], 0.0)
