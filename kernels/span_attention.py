"""Span attention: the attention of training, under the visibility rule of mtpkern.kernels.span_mask.

    s_rj  = softcap(scale * q_r . k_j)    over the keys j that row r sees;    softcap(x) = c tanh(x / c), or x
    out_r = sum_j exp(s_rj - m_r) v_j / (sum_j exp(s_rj - m_r) + exp(sink - m_r)),    m_r the maximum of its terms

A row that sees nothing (padding) gives 0 and receives and passes on no gradient.

Shapes   query [B, Hq, T, D];  key, value [B, Hkv, T, D];  position, prefix_end, span_start [B, T];  sinks [Hq]
         out [B, T, Hq, D]
Traffic  reads q, k, v once a tile and writes out; no [T, T] tensor but the boolean mask in this torch form
Source   arXiv 2602.06019 (mask); softcap as in Gemma 2, sinks as in gpt-oss
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtpkern.kernels.span_mask import span_mask


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
    if mask is None:
        mask = span_mask(position, prefix_end, span_start, window)
    if softcap is not None or sinks is not None:
        return span_attention_reference(
            query, key, value, position, prefix_end, span_start, scale=scale, softcap=softcap, sinks=sinks, mask=mask
        )
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask.unsqueeze(1), scale=scale, enable_gqa=key.shape[1] != heads
    )
    return out.transpose(1, 2)


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
    """`span_attention` written out, in the dtype of its inputs (float64 too); accumulates in at least float32."""
    if mask is None:
        mask = span_mask(position, prefix_end, span_start, window)
    batch, heads, rows, dim = query.shape
    groups = heads // key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    q = query.to(wide).unflatten(1, (key.shape[1], groups))
    score = torch.einsum("bhgrd,bhjd->bhgrj", q, key.to(wide)) * scale
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    # The lowest finite number, not -inf: a row without keys must give 0 and a zero gradient, not 0 / 0.
    mask = mask[:, None, None]
    score = score.masked_fill(~mask, torch.finfo(wide).min)
    peak = score.amax(-1, keepdim=True).detach()
    sink: Tensor | float = 0.0
    if sinks is not None:
        logit = sinks.to(wide).view(1, -1, groups, 1, 1)
        peak = torch.maximum(peak, logit.detach())
        sink = torch.exp(logit - peak)
    weight = torch.exp(score - peak) * mask
    total = weight.sum(-1, keepdim=True) + sink
    weight = weight / total.masked_fill(total == 0, 1)
    out = torch.einsum("bhgrj,bhjd->brhgd", weight, value.to(wide))
    return out.reshape(batch, rows, heads, dim).to(query.dtype)
