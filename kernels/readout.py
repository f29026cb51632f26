"""Readout: each row's argmax and its probability, in one pass over the vocabulary.

    token_r = argmax_v z_rv        confidence_r = 1 / sum_v exp(z_rv - max_v z_rv)

The mask token stands outside of both: its logit counts as -inf, so it is never emitted and takes no probability.

Shapes   z [R, V] logits;  token [R] int64;  confidence [R] float32 (float64 for float64 logits)
Traffic  reads z once, writes 12 bytes a row: bandwidth-bound
Ties     the lowest index wins
Faults   a row with a NaN, with +inf or without any finite logit: token -1 and confidence NaN, which `advance` reports
Source   arXiv 2602.06019, section "Static vs. Adaptive Decoding Strategies"
"""

from __future__ import annotations

import torch
from torch import Tensor


def readout(logits: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """Token [R] and confidence [R] of logits [R, V]; the mask token is left out.

    >>> readout(torch.tensor([[0.0, 2.0, 9.0]]), mask_token_id=2)
    (tensor([1]), tensor([0.8808]))
    """
    return readout_reference(logits, mask_token_id)


def readout_reference(logits: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """`readout` in plain torch; computes in float32, or in float64 for float64 logits."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    z[:, mask_token_id] = -torch.inf
    top, token = z.max(dim=-1)
    confidence = z.sub_(top[:, None]).exp_().sum(dim=-1).reciprocal()
    return token.masked_fill(confidence.isnan(), -1), confidence
