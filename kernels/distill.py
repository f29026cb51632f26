"""Distill: the language-model head fused with what training reads from it, in row chunks, never [R, V] at once.

    z_rv  = softcap(logit_scale * (h_r . w_v + b_v)),  z_r,banned = -inf       softcap(x) = c tanh(x / c), or x
    hard  L = sum_r weight_r (lse_r - z_r,y_r)                                 y_r the teacher's argmax, or a label
    soft  L = sum_r weight_r (lse_r - sum_v q_rv z_rv)                         q_r the teacher's softmax

`distill_loss` computes the gradients of hidden states and head in its forward pass, chunk by chunk, and backward only
scales them: the logits of a chunk live once. `head_readout` gives each row's argmax and its probability.

Shapes   hidden [R, H];  weight [V, H];  bias [V];  target, token [R] int64;  row_weight, confidence [R] float32
Memory   one chunk of logits (CHUNK rows; a second with a teacher), d hidden [R, H], d weight [V, H] of a trained head
Traffic  behind the matrix product of a chunk the Triton form reads the logits twice and writes the gradient over them;
         a row's second reading finds most of it in the L2 cache
Ties     the lowest index wins
Source   arXiv 2602.06019, section on the online self-distillation objective
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

if find_spec("triton"):
    import triton
    import triton.language as tl

    # Below every logit but finite, so that the first difference to it is no NaN.
    LOW = tl.constexpr(-1e38)

    @triton.jit
    def _logits(head, z, o_v, DTYPE: tl.constexpr):
        """Logits of one row at o_v and the derivative of the cap; -inf at the banned token and from V on."""
        bias, V, logit_scale, softcap, banned = head
        m_v = o_v < V
        x = tl.load(z + o_v, mask=m_v, other=0.0).to(DTYPE)
        if bias is not None:
            x += tl.load(bias + o_v, mask=m_v, other=0.0).to(DTYPE)
        x *= logit_scale
        slope = 1.0
        if softcap is not None:
            # tanh x = 1 - 2 / (1 + e^2x), right where e^2x is infinite too.
            t = 1 - 2 / (1 + tl.exp(x * (2 / softcap)))
            x = softcap * t
            slope = 1 - t * t
        if banned is not None:
            m_v &= o_v != banned
        return tl.where(m_v, x, float("-inf")), slope

    @triton.jit
    def _add(top, total, x):
        """Running maximum and sum of exp(x - maximum), further logits x."""
        higher = tl.maximum(top, tl.max(x, 0))
        return higher, total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)

    @triton.jit
    def _readout_kernel(
        z,  # [R, V], the product
        head,  # bias [V], V, logit_scale, softcap, banned; None what there is not
        token,  # [R] int64, written
        confidence,  # [R], written
        s_z,
        BLOCK: tl.constexpr,
    ):
        DTYPE: tl.constexpr = confidence.dtype.element_ty
        r = tl.program_id(0).to(tl.int64)
        z += r * s_z
        top = tl.full([], LOW, DTYPE)
        total = tl.full([], 0.0, DTYPE)
        index = tl.full([], 0, tl.int32)
        for v in range(0, head[1], BLOCK):
            x, _ = _logits(head, z, v + tl.arange(0, BLOCK), DTYPE)
            first = v + tl.argmax(x, 0)
            index = tl.where(tl.max(x, 0) > top, first, index)
            top, total = _add(top, total, x)
        tl.store(token + r, index)
        tl.store(confidence + r, 1 / total)

    @triton.jit
    def _loss_kernel(
        z,  # [R, V], the student's product; its gradient is written over it
        head,  # bias [V], V, logit_scale, softcap, banned; None what there is not
        target,  # [R] int64, or None
        teacher_z,  # [R, V'], or None
        teacher_head,
        row_weight,  # [R]
        loss,  # [R], written
        s_z,
        s_teacher_z,
        NEED_GRAD: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        DTYPE: tl.constexpr = loss.dtype.element_ty
        r = tl.program_id(0).to(tl.int64)
        z += r * s_z
        weight = tl.load(row_weight + r).to(DTYPE)
        top = tl.full([], LOW, DTYPE)
        total = tl.full([], 0.0, DTYPE)
        if target is not None:
            y = tl.load(target + r)
            # Read before any thread writes its gradient: the reductions of the first loop stand in between.
            picked = _logits(head, z, y, DTYPE)[0]  # not `_`, which the loop gives another shape
            for v in range(0, head[1], BLOCK):
                x, _ = _logits(head, z, v + tl.arange(0, BLOCK), DTYPE)
                top, total = _add(top, total, x)
        else:
            teacher_z += r * s_teacher_z
            teacher_top = tl.full([], LOW, DTYPE)
            teacher_total = tl.full([], 0.0, DTYPE)
            picked = tl.full([], 0.0, DTYPE)
            for v in range(0, head[1], BLOCK):
                x, _ = _logits(head, z, v + tl.arange(0, BLOCK), DTYPE)
                top, total = _add(top, total, x)
                t, _ = _logits(teacher_head, teacher_z, v + tl.arange(0, BLOCK), DTYPE)
                before = teacher_top
                teacher_top, teacher_total = _add(teacher_top, teacher_total, t)
                q = tl.exp(t - teacher_top)
                # 0 * -inf at a banned token is NaN: there q is 0 and the term is 0.
                picked = picked * tl.exp(before - teacher_top) + tl.sum(tl.where(q > 0, q * x, 0.0), 0)
            picked /= teacher_total
            teacher_lse = teacher_top + tl.log(teacher_total)
        lse = top + tl.log(total)
        # A row of weight 0 may be padding with infinite loss: select, do not multiply.
        tl.store(loss + r, tl.where(weight != 0, weight * (lse - picked), 0.0))
        if NEED_GRAD:
            for v in range(0, head[1], BLOCK):
                o_v = v + tl.arange(0, BLOCK)
                x, slope = _logits(head, z, o_v, DTYPE)
                grad = tl.exp(x - lse)
                if target is not None:
                    grad -= tl.where(o_v == y, 1.0, 0.0)
                else:
                    t, _ = _logits(teacher_head, teacher_z, o_v, DTYPE)
                    grad -= tl.exp(t - teacher_lse)
                grad = tl.where(weight != 0, grad * slope * head[2] * weight, 0.0)
                grad = tl.where(x == float("-inf"), 0.0, grad)
                tl.store(z + o_v, grad.to(z.dtype.element_ty), mask=o_v < head[1])


# Logits that a program of those kernels holds at once, and its warps.
BLOCK, WARPS = 4096, 8

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


def _autocast(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """Both operands of the product in autocast's dtype where it is on: cast once, not once a chunk."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, head
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), replace(head, weight=head.weight.to(dtype))


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden @ weight^T [R, V], rows a multiple of 16 elements apart: aligned for any V."""
    vocabulary = weight.shape[0]
    z = hidden.new_empty(hidden.shape[0], -(-vocabulary // 16) * 16)[:, :vocabulary]
    return torch.mm(hidden, weight.t(), out=z)


def _options(head: Head) -> tuple[Tensor | None, int, float, float | None, int | None]:
    return head.bias, head.weight.shape[0], head.logit_scale, head.softcap, head.banned


@torch.no_grad()
def head_readout_triton(hidden: Tensor, head: Head, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """`head_readout` with one launch behind each chunk's product."""
    hidden, head = _autocast(hidden, head)
    token = torch.empty(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    confidence = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
    for start in range(0, hidden.shape[0], chunk):
        z = _product(hidden[start : start + chunk], head.weight)
        _readout_kernel[(z.shape[0],)](
            z, _options(head), token[start:], confidence[start:], z.stride(0), BLOCK=BLOCK, num_warps=WARPS
        )
    return token, confidence.float()


@torch.no_grad()
def head_readout(hidden: Tensor, head: Head, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Each row's most probable token and its probability: hidden [R, H] -> token [R] int64, confidence [R] float32.

    Source: arXiv 2602.06019, the student's span y' and the hard teacher's targets.

        token, confidence = head_readout(hidden, Head(model.lm_head.weight, banned=mask_token_id))
    """
    if hidden.is_cuda:
        return head_readout_triton(hidden, head, chunk)
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
    if hidden.is_cuda:
        return distill_loss_triton(hidden, head, target=target, teacher=teacher, row_weight=row_weight, chunk=chunk)
    return _distill_loss(_rows_torch, hidden, head, target, teacher, row_weight, chunk)


def distill_loss_triton(
    hidden: Tensor,
    head: Head,
    *,
    target: Tensor | None = None,
    teacher: tuple[Tensor, Head] | None = None,
    row_weight: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """`distill_loss` with one launch behind each chunk's product."""
    return _distill_loss(_rows_triton, hidden, head, target, teacher, row_weight, chunk)


def _distill_loss(
    rows: Rows,
    hidden: Tensor,
    head: Head,
    target: Tensor | None,
    teacher: tuple[Tensor, Head] | None,
    row_weight: Tensor | None,
    chunk: int,
) -> Tensor:
    weight = row_weight if row_weight is not None else hidden.new_ones(hidden.shape[0])
    return _DistillLoss.apply(hidden, head.weight, head.bias, head, target, teacher, weight, chunk, rows)


# Of a chunk: hidden, head, target, teacher, row_weight, whether a gradient is wanted -> the rows' weighted losses [r]
# and their gradient with respect to the product [r, V], in its dtype; without meaning where it is not wanted.
Rows = Callable[[Tensor, Head, Tensor | None, tuple[Tensor, Head] | None, Tensor, bool], tuple[Tensor, Tensor]]


def _rows_triton(
    hidden: Tensor,
    head: Head,
    target: Tensor | None,
    teacher: tuple[Tensor, Head] | None,
    row_weight: Tensor,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    z = _product(hidden, head.weight)
    teacher_z = None if teacher is None else _product(teacher[0], teacher[1].weight)
    loss = z.new_empty(z.shape[0], dtype=torch.promote_types(z.dtype, torch.float32))
    _loss_kernel[(z.shape[0],)](
        z,
        _options(head),
        target,
        teacher_z,
        None if teacher is None else _options(teacher[1]),
        row_weight,
        loss,
        z.stride(0),
        0 if teacher_z is None else teacher_z.stride(0),
        NEED_GRAD=need_grad,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return loss, z


def _rows_torch(
    hidden: Tensor,
    head: Head,
    target: Tensor | None,
    teacher: tuple[Tensor, Head] | None,
    row_weight: Tensor,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    z = head.logits(hidden)
    losses, grad = _row_losses(z, target, None if teacher is None else teacher[1].logits(teacher[0]))
    scale = row_weight.to(losses.dtype)
    # A row of weight 0 may be padding with infinite loss: select, do not multiply.
    losses = torch.where(scale != 0, losses * scale, 0)
    if not need_grad:
        return losses, z
    grad = torch.where(scale.unsqueeze(-1) != 0, grad * scale.unsqueeze(-1), 0)
    if head.softcap is not None:
        # d/dx c tanh(x / c) = 1 - tanh(x / c)^2; at the banned token z is -inf and the gradient 0 already.
        grad = grad * (1 - (z.masked_fill(z.isinf(), 0) / head.softcap) ** 2)
    return losses, (grad * head.logit_scale).to(hidden.dtype)


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
        rows: Rows,
    ) -> Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = hidden.new_zeros((), dtype=wide)
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=wide) if need_bias and bias is not None else None
        states, head = _autocast(hidden, head)
        teacher = None if teacher is None else _autocast(*teacher)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            losses, grad = rows(
                states[part],
                head,
                None if target is None else target[part],
                None if teacher is None else (teacher[0][part], teacher[1]),
                row_weight[part],
                any(ctx.needs_input_grad),
            )
            loss += losses.sum()
            if d_hidden is not None:
                d_hidden[part] = (grad @ head.weight).to(hidden.dtype)
            if d_weight is not None:
                d_weight += grad.t() @ states[part]
            if d_bias is not None:
                d_bias += grad.sum(0, dtype=wide)
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
            *([None] * 6),
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
