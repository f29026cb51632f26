"""Distill: the language-model head fused with what training reads from it, in row chunks, never [R, V] at once.

    z_rv  = softcap(logit_scale * (h_r . w_v + b_v)),  z_r,banned = -inf       softcap(x) = c tanh(x / c), or x
    hard  L = sum_r weight_r (lse_r - z_r,y_r)                                 y_r the teacher's argmax, or a label
    soft  L = sum_r weight_r (lse_r - sum_v q_rv z_rv)                         q_r the teacher's softmax

`distill_loss` computes the gradients of hidden states and head in its forward pass, chunk by chunk, and backward only
scales them: the logits of a chunk live once. `head_readout` gives each row's argmax and its probability.

Shapes   hidden [R, H];  weight [V, H];  bias [V];  target, token [R] int64;  row_weight, confidence [R] float32
Memory   one chunk of logits (CHUNK rows), d hidden [R, H], d weight [V, H] where the head is trained
Ties     the lowest index wins
Source   arXiv 2602.06019, section on the online self-distillation objective
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of logits alive at once: enough to keep a matrix product busy, 1 GiB in float32 at V = 262,144.
CHUNK = 1024


@dataclass(frozen=True)
class Head:
    """A language-model head: weight [V, H], bias [V], then a factor, then a soft cap; `banned` is never predicted."""

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    banned: int | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, V], in at least float32."""
        z = hidden @ self.weight.t()
        if self.bias is not None:
            z = z + self.bias
        z = z.to(torch.promote_types(z.dtype, torch.float32)) * self.logit_scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        if self.banned is not None:
            # Not in place: autograd of the tanh keeps its result.
            z = z.masked_fill(torch.arange(z.shape[-1], device=z.device) == self.banned, float("-inf"))
        return z


@torch.no_grad()
def head_readout(hidden: Tensor, head: Head, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Each row's most probable token and its probability: hidden [R, H] -> token [R] int64, confidence [R] float32.

    Source: arXiv 2602.06019, the student's span y' and the hard teacher's targets.

        token, confidence = head_readout(hidden, Head(model.lm_head.weight, banned=mask_token_id))
    """
    token = torch.empty(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    confidence = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    for start in range(0, hidden.shape[0], chunk):
        rows = slice(start, start + chunk)
        z = head.logits(hidden[rows])
        top, token[rows] = z.max(-1)
        confidence[rows] = torch.exp(top - z.logsumexp(-1)).float()
    return token, confidence


def distill_loss(
    hidden: Tensor,
    head: Head,
    *,
    target: Tensor | None = None,
    teacher: tuple[Tensor, Head] | None = None,
    row_weight: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Weighted sum of the rows' cross-entropies against hard targets or a teacher's softmax: a float scalar.

    hidden      [R, H] the student's final hidden states; gradients flow to it and, where they require one, to
                head.weight and head.bias
    target      [R] int64: hard targets; a row whose weight is 0 may hold any valid id
    teacher     (hidden [R, H'], Head [V', H']): soft targets instead; frozen; the first V' <= V tokens are the same
    row_weight  [R], default 1; rows of weight 0 give no loss and no gradient, and keep the graph connected

    Raises ValueError unless exactly one of target and teacher is given. Source: arXiv 2602.06019, hard and soft
    teacher.

        loss = distill_loss(hidden, Head(model.lm_head.weight), target=token) / token.numel()
    """
    if (target is None) == (teacher is None):
        raise ValueError("give exactly one of target (hard) and teacher (soft)")
    if teacher is not None and teacher[1].weight.shape[0] > head.weight.shape[0]:
        raise ValueError(
            "the teacher's vocabulary must not exceed the student's; got heads "
            f"{tuple(teacher[1].weight.shape)} and {tuple(head.weight.shape)}: resize the student's embeddings"
        )
    weight = row_weight if row_weight is not None else hidden.new_ones(hidden.shape[0])
    return _DistillLoss.apply(hidden, head.weight, head.bias, head, target, teacher, weight, chunk)


def _teacher_softmax(z: Tensor, vocabulary: int) -> Tensor:
    """Probabilities over the student's vocabulary, which may have rows (the mask token) that the teacher lacks."""
    return F.pad(z.softmax(-1), (0, vocabulary - z.shape[-1]))


def _row_losses(z: Tensor, target: Tensor | None, teacher_z: Tensor | None) -> tuple[Tensor, Tensor]:
    """Losses [r] of logits [r, V] and their gradient with respect to the logits [r, V]."""
    # Both softmaxes by the same function: a student equal to its teacher gets a gradient of exactly 0.
    log_p, p = z.log_softmax(-1), z.softmax(-1)
    if target is not None:
        index = target.unsqueeze(-1)
        loss = -log_p.gather(-1, index).squeeze(-1)
        return loss, p.scatter_add_(-1, index, p.new_full((), -1.0).expand(index.shape))
    assert teacher_z is not None
    q = _teacher_softmax(teacher_z, z.shape[-1])
    # 0 * -inf at a banned token is nan: there q is 0 and the term is 0.
    loss = -(q * log_p.masked_fill(q == 0, 0.0)).sum(-1)
    return loss, p - q


class _DistillLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        target: Tensor | None,
        teacher: tuple[Tensor, Head] | None,
        row_weight: Tensor,
        chunk: int,
    ) -> Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = hidden.new_zeros((), dtype=wide)
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=wide) if need_bias and bias is not None else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            z = head.logits(hidden[rows])
            teacher_z = None if teacher is None else teacher[1].logits(teacher[0][rows])
            losses, grad = _row_losses(z, None if target is None else target[rows], teacher_z)
            scale = row_weight[rows].to(losses.dtype)
            # A row of weight 0 may be padding with infinite loss: select, do not multiply.
            loss += torch.where(scale != 0, losses * scale, 0).sum()
            grad = torch.where(scale.unsqueeze(-1) != 0, grad * scale.unsqueeze(-1), 0)
            if head.softcap is not None:
                # d/dx c tanh(x / c) = 1 - tanh(x / c)^2; at the banned token z is -inf and the gradient 0 already.
                grad = grad * (1 - (z.masked_fill(z.isinf(), 0) / head.softcap) ** 2)
            grad = (grad * head.logit_scale).to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[rows] = (grad @ weight).to(hidden.dtype)
            if d_weight is not None:
                d_weight += grad.t() @ hidden[rows]
            if d_bias is not None:
                d_bias += grad.sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if d_hidden is None else (d_hidden * grad).to(d_hidden.dtype),
            None if d_weight is None else (d_weight * grad).to(weight_dtype),
            None if d_bias is None else (d_bias * grad).to(bias_dtype),
            *([None] * 5),
        )


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
        q = _teacher_softmax(teacher[1].logits(teacher[0]), log_p.shape[-1]).detach()
        losses = -(q * log_p.masked_fill(q == 0, 0.0)).sum(-1)
    if row_weight is not None:
        losses = torch.where(row_weight != 0, losses * row_weight, 0)
    return losses.sum()
