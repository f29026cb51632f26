"""Distill: the language-model head fused with what training reads from it, in row chunks, never [R, V] at once.

    z_rv  = softcap(logit_scale * (h_r . w_v + b_v)),  z_r,banned = -inf       softcap(x) = c tanh(x / c), or x
    hard  L = sum_r weight_r (lse_r - z_r,y_r)                                 y_r the teacher's argmax, or a label
    soft  L = sum_r weight_r sum_v q_rv (log q_rv - log p_rv)                  q_r, p_r: softmax of teacher, student

`distill_loss` computes the gradients of hidden states and head in its forward pass: the logits of a chunk live once,
their gradient is written over them, and backward only scales. Nothing is left out of a gradient. A readout may leave
its product to the loss (`Rows`). Both public functions are operators of torch: no graph breaks.

Shapes   hidden [R, H];  weight [V, H];  bias [V];  target, token [R] int64;  row_weight, confidence, entropy [R]
Memory   at most `room` bytes of logits of student and teacher together (kernels/head.py; at V = 152k in 2 bytes 1,280
         rows hard, 640 soft; on a GPU of 80 GiB 5,760 and 2,816), a product for the loss included; d hidden [R, H],
         d weight [V, H] of a trained head in its own dtype, PARTIAL bytes; where autocast makes the head narrower, a
         copy of it in autocast's dtype besides
Traffic  behind the matrix product of a chunk the Triton form reads the logits twice and writes the gradient over them
Ties     the lowest index wins
Source   arXiv 2602.06019, section on the online self-distillation objective
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtpkern.kernels.form import on_device
from mtpkern.kernels.head import Head, Rows, buffer_for, chunk_rows, multiply, product_dtype, products
from mtpkern.kernels.op import operator

if find_spec("triton"):
    import triton
    import triton.language as tl

    # Below every logit but finite, so that the first difference to it is no NaN.
    LOW = tl.constexpr(-1e38)

    @triton.jit
    def _padded(V):
        """Columns of a product's buffer: masked by them, an odd vocabulary is also read 16 bytes at a time."""
        return tl.cdiv(V, 16) * 16

    @triton.jit
    def _logits(head, z, o_v, DTYPE: tl.constexpr):
        """Logits of one row at o_v and the derivative of the cap; -inf at the banned token and from V on."""
        bias, V, logit_scale, softcap, banned = head
        m_v = o_v < V
        x = tl.load(z + o_v, mask=o_v < _padded(V), other=0.0).to(DTYPE)
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
        z,  # [R, V], the product, in a `buffer_for` it
        head,  # bias [V], V, logit_scale, softcap, banned; None what there is not
        token,  # [R] int64, written
        confidence,  # [R], written
        entropy,  # [R], written
        s_z,
        BLOCK: tl.constexpr,
    ):
        DTYPE: tl.constexpr = confidence.dtype.element_ty
        r = tl.program_id(0).to(tl.int64)
        z += r * s_z
        top = tl.full([], LOW, DTYPE)
        total = tl.full([], 0.0, DTYPE)
        moment = tl.full([], 0.0, DTYPE)  # sum of exp(x - top) (x - top)
        index = tl.full([], 0, tl.int32)
        for v in range(0, head[1], BLOCK):
            x, _ = _logits(head, z, v + tl.arange(0, BLOCK), DTYPE)
            first = v + tl.argmax(x, 0)
            index = tl.where(tl.max(x, 0) > top, first, index)
            before = top
            top = tl.maximum(top, tl.max(x, 0))
            moment = (moment + total * (before - top)) * tl.exp(before - top)
            # 0 * -inf at a banned token is NaN: there the term is 0.
            moment += tl.sum(tl.where(x == float("-inf"), 0.0, tl.exp(x - top) * (x - top)), 0)
            total = total * tl.exp(before - top) + tl.sum(tl.exp(x - top), 0)
        tl.store(token + r, index)
        tl.store(confidence + r, 1 / total)
        tl.store(entropy + r, tl.log(total) - moment / total)

    @triton.jit
    def _loss_kernel(
        z,  # [R, V], the student's product, in a `buffer_for` it; its gradient is written over it
        head,  # bias [V], V, logit_scale, softcap, banned; None what there is not
        target,  # [R] int64, or None
        teacher_z,  # [R, V'], in a `buffer_for` it, or None
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
        # Of a row of weight 0 no logit is read.
        read = tl.where(weight != 0, head[1], 0)
        top = tl.full([], LOW, DTYPE)
        total = tl.full([], 0.0, DTYPE)
        if target is not None:
            y = tl.load(target + r)
            # Read before any thread writes its gradient: the reductions of the first loop stand in between.
            picked = _logits(head, z, tl.maximum(y, 0), DTYPE)[0]  # not `_`, which the loop gives another shape
            for v in range(0, read, BLOCK):
                x, _ = _logits(head, z, v + tl.arange(0, BLOCK), DTYPE)
                top, total = _add(top, total, x)
            lse = top + tl.log(total)
            # A target that does not exist has an infinite loss, below 0 as from V on.
            row_loss = tl.where(y >= 0, lse - picked, float("inf"))
        else:
            teacher_z += r * s_teacher_z
            teacher_top = tl.full([], LOW, DTYPE)
            teacher_total = tl.full([], 0.0, DTYPE)
            gap = tl.full([], 0.0, DTYPE)  # sum of q (t - x), q not yet divided by its sum
            for v in range(0, read, BLOCK):
                x, _ = _logits(head, z, v + tl.arange(0, BLOCK), DTYPE)
                top, total = _add(top, total, x)
                t, _ = _logits(teacher_head, teacher_z, v + tl.arange(0, BLOCK), DTYPE)
                before = teacher_top
                teacher_top, teacher_total = _add(teacher_top, teacher_total, t)
                q = tl.exp(t - teacher_top)
                # 0 * inf at a banned token is NaN: there q is 0 and the term is 0.
                gap = gap * tl.exp(before - teacher_top) + tl.sum(tl.where(q > 0, q * (t - x), 0.0), 0)
            lse = top + tl.log(total)
            teacher_lse = teacher_top + tl.log(teacher_total)
            row_loss = lse - teacher_lse + gap / teacher_total
        # A row of weight 0 may be padding with infinite loss: select, do not multiply.
        tl.store(loss + r, tl.where(weight != 0, weight * row_loss, 0.0))
        if NEED_GRAD:
            for v in range(0, read, BLOCK):
                o_v = v + tl.arange(0, BLOCK)
                x, slope = _logits(head, z, o_v, DTYPE)
                grad = tl.exp(x - lse)
                if target is not None:
                    grad -= tl.where(o_v == y, 1.0, 0.0)
                else:
                    t, _ = _logits(teacher_head, teacher_z, o_v, DTYPE)
                    grad -= tl.exp(t - teacher_lse)
                grad = tl.where(x == float("-inf"), 0.0, grad * slope * head[2] * weight)
                tl.store(z + o_v, grad.to(z.dtype.element_ty), mask=o_v < _padded(head[1]))
            if weight == 0:
                for v in range(0, head[1], BLOCK):
                    o_v = v + tl.arange(0, BLOCK)
                    tl.store(z + o_v, tl.zeros([BLOCK], z.dtype.element_ty), mask=o_v < _padded(head[1]))


# Logits that a program of those kernels holds at once, and its warps.
BLOCK, WARPS = 4096, 8

# Bytes of a part of d weight that is computed in a narrower dtype than it is summed in.
PARTIAL = 64 << 20


class Readout(NamedTuple):
    """Of each row: the most probable token [R] int64, its probability and the entropy in nats, both [R] float32."""

    token: Tensor
    confidence: Tensor
    entropy: Tensor


def _readout_rows_triton(z: Tensor, head: Head, read: Readout) -> None:
    with on_device(z):
        _readout_kernel[(len(z),)](z, head.options(), *read, z.stride(0), BLOCK=BLOCK, num_warps=WARPS)


def _readout_rows_torch(z: Tensor, head: Head, read: Readout) -> None:
    x = head.finish(z)
    top, read.token[:] = x.max(-1)
    # From -inf on, where exp is 0 long since: 0 * -inf would be NaN.
    x = (x - top.unsqueeze(-1)).clamp_(min=-1e4)
    share = x.exp()
    total = share.sum(-1)
    read.confidence[:] = 1 / total
    read.entropy[:] = total.log() - share.mul_(x).sum(-1) / total


@operator("head_readout", mutates=["product"])
def _readout_op(
    hidden: Tensor, head: Head, product: Tensor | None, dtype: torch.dtype, chunk: int | None, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocabulary = hidden.shape[0], head.weight.shape[0]
    head = head.within(dtype)
    chunk = chunk or chunk_rows(rows, vocabulary, dtype, hidden.device, triton)
    buffer = buffer_for(hidden, min(chunk, rows), vocabulary, dtype) if product is None else product
    wide = torch.promote_types(dtype, torch.float32)
    read = Readout(*(hidden.new_empty(rows, dtype=x) for x in (torch.int64, wide, wide)))
    form = _readout_rows_triton if triton else _readout_rows_torch
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        z = multiply(hidden[part], head, buffer if product is None else product[part])
        form(z, head, Readout(*(x[part] for x in read)))
    return read.token, read.confidence.float(), read.entropy.float()


@_readout_op.fake
def _(hidden, *_):
    return tuple(hidden.new_empty(len(hidden), dtype=dtype) for dtype in (torch.int64, torch.float32, torch.float32))


@torch.no_grad()
def head_readout(
    hidden: Tensor, head: Head, product: Tensor | None = None, *, chunk: int | None = None, triton: bool | None = None
) -> Readout:
    """Each row's most probable token, its probability and the row's entropy; `chunk` and `triton` as in `distill_loss`.

    Source: arXiv 2602.06019, the student's span y' and the hard teacher's targets.

        token, confidence, entropy = head_readout(hidden, Head(model.lm_head.weight, banned=mask_token_id))
    """
    triton = hidden.is_cuda if triton is None else triton
    return Readout(*_readout_op(hidden, head, product, product_dtype(hidden, head, product), chunk, triton))


def distill_loss(
    hidden: Tensor,
    head: Head,
    product: Tensor | None = None,
    *,
    target: Tensor | None = None,
    teacher: tuple[Tensor, Head] | Rows | None = None,
    row_weight: Tensor | None = None,
    chunk: int | None = None,
    triton: bool | None = None,
) -> Tensor:
    """Weighted sum of the rows' cross-entropies against hard targets, or divergences from a teacher: a float scalar.

    hidden      [R, H] the student's final hidden states; gradients flow to it and, where they require one, to
                head.weight and head.bias
    product     of the two, as `head_readout` has left it in `Rows`; written over, as a teacher's may be
    target      [R] int64: hard targets; a row whose weight is 0 may hold any valid id
    teacher     (hidden [R, H'], Head [V', H']) or Rows: soft targets instead, KL(teacher || student); frozen; the first
                V' <= V tokens are the same
    row_weight  [R], default 1; rows of weight 0 give no loss and no gradient, and keep the graph connected; in plain
                torch on a CPU they are left out of the products too
    chunk       rows whose logits live at once; on a GPU as many as `room` holds unless given
    triton      by the kernel, or in plain torch; the former on a GPU unless given

    Its gradients are ready before backward, which scales them where they lie: a second backward through the same
    loss and second derivatives raise RuntimeError. Raises ValueError unless exactly one of target and teacher is
    given, for a teacher with more tokens than the student or other rows, for target and row_weight of another shape,
    for two dtypes without autocast, and for a row_weight that requires a gradient. Source: arXiv 2602.06019, hard and
    soft teacher.

        loss = distill_loss(hidden, Head(model.lm_head.weight), target=token) / token.numel()
    """
    if (target is None) == (teacher is None):
        raise ValueError("give exactly one of target (hard) and teacher (soft)")
    if teacher is not None and teacher[1].weight.shape[0] > head.weight.shape[0]:
        raise ValueError(
            "the teacher's vocabulary must not exceed the student's; got heads "
            f"{tuple(teacher[1].weight.shape)} and {tuple(head.weight.shape)}: resize the student's embeddings"
        )
    shape = hidden.shape[:1]
    if any(x is not None and x.shape != shape for x in (target, row_weight)):
        got = {name: list(x.shape) for name, x in (("target", target), ("row_weight", row_weight)) if x is not None}
        raise ValueError(f"target and row_weight must be [R] = {list(shape)}, one for each hidden state; got {got}")
    if teacher is not None and teacher[0].shape[:1] != shape:
        raise ValueError(
            f"the teacher's hidden states must be of the same {len(hidden)} rows as the student's; "
            f"got {len(teacher[0])}"
        )
    if row_weight is not None and row_weight.requires_grad:
        raise ValueError("row_weight gets no gradient; got one that requires it: detach it")
    dtype, triton = product_dtype(hidden, head, product), hidden.is_cuda if triton is None else triton
    its_states, its_head, its_product = (None, None, None) if teacher is None else Rows(*teacher)
    of_teacher = its_states, its_head, its_product, None if teacher is None else product_dtype(*teacher)
    leaves = hidden, head.weight, head.bias
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in leaves]
    with torch.no_grad():
        found = _gradients_op(hidden, head, product, dtype, target, *of_teacher, row_weight, needs, chunk, triton)
    return _loss_op(*leaves, *found)


# Of a chunk: z [r, V] is the product under the head, and its gradient is written over it; teacher, where there is one,
# is its product and head; loss [r] is written.


def _loss_rows_triton(z, head, target, teacher, row_weight, loss, need_grad):
    its_z, its_head = teacher or (None, None)
    teacher_of = its_z, its_head and its_head.options()
    between_rows = z.stride(0), 0 if its_z is None else its_z.stride(0)
    options = {"NEED_GRAD": need_grad, "BLOCK": BLOCK, "num_warps": WARPS}
    with on_device(z):
        _loss_kernel[(len(z),)](z, head.options(), target, *teacher_of, row_weight, loss, *between_rows, **options)


def _loss_rows_torch(z, head, target, teacher, row_weight, loss, need_grad):
    x = head.finish(z)
    grad = x.log_softmax(-1)
    if target is not None:
        index = target.unsqueeze(-1)
        losses = -grad.gather(-1, index).squeeze(-1)
        grad.exp_().scatter_add_(-1, index, grad.new_full((), -1.0).expand(index.shape))
    else:
        its_z, its_head = teacher
        log_q = its_head.finish(its_z).log_softmax(-1)
        # The same operations on equal logits: a student equal to its teacher gets a gradient of exactly 0.
        q, known = log_q.exp(), log_q.shape[1]
        # 0 * inf at a banned token is NaN: there q is 0 and the term is 0.
        losses = log_q.sub_(grad[:, :known]).mul_(q).masked_fill_(q == 0, 0).sum(-1)
        grad.exp_()[:, :known] -= q
    scale = row_weight.to(losses.dtype)
    # A row of weight 0 may be padding with infinite loss: select, do not multiply.
    loss.copy_(torch.where(scale != 0, losses * scale, 0))
    if not need_grad:
        return
    if head.softcap is not None:
        # d/dx c tanh(x / c) = 1 - tanh(x / c)^2; at a banned token x is -inf and the gradient 0 already.
        grad *= 1 - (x.masked_fill(x.isinf(), 0) / head.softcap) ** 2
    scale = scale.unsqueeze(-1)
    z.copy_(grad.mul_(scale * head.logit_scale).masked_fill_(scale == 0, 0))


def _add_outer(total: Tensor, grad: Tensor, states: Tensor, first: bool) -> None:
    """total [V, H] += grad^T states of a chunk, without a second [V, H]; the first chunk finds no value in it."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.t(), states, beta=0 if first else 1)
        return
    step = max(PARTIAL // (states.shape[1] * states.dtype.itemsize), 1)
    for v in range(0, len(total), step):
        part = grad[:, v : v + step].t() @ states
        if first:
            total[v : v + step] = part
        else:
            total[v : v + step] += part


@operator("distill_gradients", mutates=["product", "teacher_product"])
def _gradients_op(
    hidden: Tensor,
    head: Head,
    product: Tensor | None,
    dtype: torch.dtype,
    target: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_head: Head | None,
    teacher_product: Tensor | None,
    teacher_dtype: torch.dtype | None,
    row_weight: Tensor | None,
    needs: Sequence[bool],
    chunk: int | None,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and its gradients with respect to hidden, weight and bias; empty where one is not needed."""
    rows, vocabulary = hidden.shape[0], head.weight.shape[0]
    d_hidden, d_weight, d_bias = gradients = _gradients(hidden, head, needs)
    head = head.within(dtype)
    some = None
    if row_weight is not None and hidden.device.type == "cpu" and not triton:
        # Rows without weight need no product; a device would have to be asked which they are.
        some = row_weight.nonzero().squeeze(1)
        rows = len(some)
        d_hidden.zero_()
    # A teacher's logits live beside the student's.
    chunk = chunk or chunk_rows(rows, vocabulary * (1 if teacher_hidden is None else 2), dtype, hidden.device, triton)
    student, of_teacher = products(hidden, head, product, min(chunk, rows)), None
    if teacher_head is not None:
        assert teacher_hidden is not None
        assert teacher_dtype is not None
        teacher_head = teacher_head.within(teacher_dtype)
        of_teacher = products(teacher_hidden, teacher_head, teacher_product, min(chunk, rows))
    if row_weight is None:
        row_weight = hidden.new_ones(rows)
    losses = hidden.new_empty(rows, dtype=torch.promote_types(dtype, torch.float32))
    for gradient in gradients if rows == 0 else ():
        gradient.zero_()
    form = _loss_rows_triton if triton else _loss_rows_torch
    for start in range(0, rows, chunk):
        part: Any = slice(start, start + chunk)
        loss = losses[part]
        part = part if some is None else some[part]
        z, teacher = student(part), None if of_teacher is None else (of_teacher(part), teacher_head)
        labels = None if target is None else target[part]
        form(z, head, labels, teacher, row_weight[part], loss, any(needs))
        if needs[0]:
            d_hidden[part] = (z @ head.weight).to(d_hidden.dtype)
        if needs[1]:
            _add_outer(d_weight, z, hidden[part].to(dtype), start == 0)
        if needs[2]:
            part_bias = z.sum(0, dtype=losses.dtype)
            d_bias.copy_(part_bias if start == 0 else d_bias + part_bias)
    return losses.sum(), d_hidden, d_weight, d_bias


def _gradients(hidden: Tensor, head: Head, needs: Sequence[bool]) -> list[Tensor]:
    """Room for the gradients that are needed, none for the others."""
    like = hidden, head.weight, head.bias
    return [torch.empty_like(x) if need and x is not None else hidden.new_empty(0) for x, need in zip(like, needs)]


@_gradients_op.fake
def _(hidden, head, product, dtype, *rest):
    loss = hidden.new_empty((), dtype=torch.promote_types(dtype, torch.float32))
    return loss, *_gradients(hidden, head, rest[-3])


@operator("distill_loss")
def _loss_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss: Tensor,
    d_hidden: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
) -> Tensor:
    """The loss, whose backward hands on the gradients: an operator that writes over its arguments may have none."""
    return loss.clone()


@_loss_op.fake
def _(*inputs):
    return torch.empty_like(inputs[3])


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    # Not by save_for_backward, which would hold them on: a leaf takes what nobody else holds without a copy.
    ctx.gradients = inputs[4:]


@once_differentiable
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.gradients is None:
        raise RuntimeError(
            "a second backward through one distill_loss: the first has scaled its gradients where they lie; compute "
            "the loss again"
        )
    gradients, ctx.gradients = ctx.gradients, None
    scaled = [x.mul_(grad) if need else None for x, need in zip(gradients, ctx.needs_input_grad)]
    return (*scaled, *[None] * 4)


_loss_op.registered.register_autograd(_backward, setup_context=_setup_context)
