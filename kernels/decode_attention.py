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
"""

from __future__ import annotations

import torch
from torch import Tensor


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
) -> Tensor:
    """Attend with query [R, Hq, D] to caches [B, Hkv, C + 1, D]; returns [R, Hq, D] in the query's dtype.

    Rows of a sequence stand together: row_seq is sorted over the rows in use, and sequence b owns the rows
    row_start[b] .. row_start[b + 1] - 1, at most `max_rows` of them (2k - 1 in decoding). Rows in slot C are unused.

        out = decode_attention(q, k_cache, v_cache, plan.seq, plan.slot, plan.start, max_rows=15, scale=D**-0.5)
    """
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
