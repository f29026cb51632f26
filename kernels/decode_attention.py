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
Faults   unused rows give 0; the trash slot may hold anything, NaN included; other slots that no row sees must be
         finite, which caches of zeros are and stay: a row with a NaN ends its sequence (see advance)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
    memo: dict[int | None, _Spread] | None = None,
) -> Tensor:
    """Attend with query [R, Hq, D] to caches [B, Hkv, C + 1, D]; returns [R, Hq, D] in the query's dtype.

    Rows of a sequence stand together: row_seq is sorted over the rows in use, and sequence b owns the rows
    row_start[b] .. row_start[b + 1] - 1, at most `max_rows` of them (2k - 1 in decoding). Rows in slot C are unused.
    `memo`, a dict that lives as long as these rows stand, keeps what all layers of a pass share.

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
        memo=memo,
    )


@dataclass(frozen=True)
class _Spread:
    """Where packed rows go in [B, W] (None: they stand there already), and what they do not see: bias [B, 1, W, C]."""

    place: Tensor | None
    bias: Tensor
    unused: Tensor

    @classmethod
    def of(
        cls,
        row_seq: Tensor,
        row_slot: Tensor,
        row_start: Tensor,
        *,
        batch: int,
        capacity: int,
        max_rows: int,
        window: int | None,
        dtype: torch.dtype,
    ) -> _Spread:
        o_r, o_c = torch.arange(len(row_slot), device=row_slot.device), torch.arange(capacity, device=row_slot.device)
        unused = row_slot >= capacity
        slot = torch.where(unused, -1, row_slot)
        if batch == 1:
            place, slot = None, slot.view(1, -1, 1)
        else:
            # Unused rows share one more place behind the end.
            place = torch.where(unused, batch * max_rows, row_seq * max_rows + o_r - row_start[row_seq])
            slot = slot.new_full((batch * max_rows + 1,), -1).index_copy_(0, place, slot)[:-1].view(batch, -1, 1)
        visible = o_c <= slot
        if window is not None:
            visible &= o_c > slot - window
        bias = torch.zeros((), dtype=dtype, device=slot.device).where(visible, -torch.inf)
        return cls(place, bias[:, None], unused[:, None, None])


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
    memo: dict[int | None, _Spread] | None = None,
) -> Tensor:
    """`decode_attention` in plain torch: rows spread to [B, W], attention of a padded batch, rows gathered back.

    With a softcap or sinks it computes in float32, or in float64 for float64 inputs; else as
    scaled_dot_product_attention does.
    """
    B, Hkv, C, D = k_cache.shape[0], k_cache.shape[1], k_cache.shape[2] - 1, k_cache.shape[3]
    R, Hq, _ = query.shape
    Dv, W = v_cache.shape[-1], R if B == 1 else max_rows
    memo = {} if memo is None else memo
    if window not in memo:
        memo[window] = _Spread.of(
            row_seq, row_slot, row_start, batch=B, capacity=C, max_rows=max_rows, window=window, dtype=query.dtype
        )
    spread = memo[window]
    q = query
    if spread.place is not None:
        q = query.new_zeros(B * W + 1, Hq, D).index_copy_(0, spread.place, query)[:-1]
    q = q.view(B, W, Hq, D).transpose(1, 2)
    k, v = k_cache[:, :, :C], v_cache[:, :, :C]
    if softcap is None and sinks is None:
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=spread.bias, scale=scale, enable_gqa=Hq > Hkv)
    else:
        dtype = torch.promote_types(query.dtype, torch.float32)
        q, k, v = (x.to(dtype) for x in (q, k, v))
        s = (q.reshape(B, Hkv, -1, D) @ k.transpose(-1, -2)).mul_(scale).view(B, Hq, W, C)
        if softcap is not None:
            s = s.div_(softcap).tanh_().mul_(softcap)
        s = s.add_(spread.bias)
        if sinks is not None:
            s = torch.cat([s, sinks.to(dtype).view(1, Hq, 1, 1).expand(B, -1, W, -1)], dim=-1)
        o = (s.softmax(-1)[..., :C].reshape(B, Hkv, -1, C) @ v).view(B, Hq, W, Dv)
    o = o.transpose(1, 2).reshape(B * W, Hq, Dv).to(query.dtype)
    if spread.place is not None:
        o = torch.cat([o, o.new_zeros(1, Hq, Dv)])[spread.place]
    return o.masked_fill(spread.unused, 0)
