"""The loss of `distill_loss` as one writes it down."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtpkern.kernels.head import Head


def distill_loss_reference(
    hidden: Tensor,
    head: Head,
    *,
    target: Tensor | None = None,
    teacher: tuple[Tensor, Head] | None = None,
    row_weight: Tensor | None = None,
) -> Tensor:
    """`distill_loss` in plain torch with all logits at once, differentiated by autograd (float64 too)."""
    log_p = head.logits(hidden).log_softmax(-1)
    if target is not None:
        losses = -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    else:
        assert teacher is not None
        log_q = teacher[1].logits(teacher[0]).detach().log_softmax(-1)
        # The student may have tokens (the mask) that the teacher lacks; 0 * -inf at a banned token is NaN.
        log_q = F.pad(log_q, (0, log_p.shape[-1] - log_q.shape[-1]), value=float("-inf"))
        losses = torch.where(log_q.isinf(), 0, log_q.exp() * (log_q - log_p.masked_fill(log_q.isinf(), 0))).sum(-1)
    if row_weight is not None:
        losses = torch.where(row_weight != 0, losses * row_weight, 0)
    return losses.sum()
