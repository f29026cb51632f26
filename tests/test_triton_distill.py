"""The Triton form of the fused head against float64, run by Triton's interpreter where there is no GPU."""

import math
from functools import partial

import pytest
import torch

from mtpkern.kernels import distill
from mtpkern.kernels.distill import distill_loss, head_readout
from mtpkern.kernels.head import Head, Rows
from support.losses import distill_loss_reference

pytest.importorskip("triton")

distill_loss_triton, head_readout_triton = (partial(form, triton=True) for form in (distill_loss, head_readout))

R, H, V, BANNED = 5, 6, 41, 7
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = [
    {},
    {"logit_scale": 2.0, "softcap": 3.0, "banned": BANNED},
    {"banned": V - 1},
]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch, interpreter):
    # Three blocks a row, the last one partly behind its end.
    monkeypatch.setattr(distill, "BLOCK", 16)


def case(dtype, bias=False, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(DEVICE, dtype)

    head = Head(draw(V, H).requires_grad_(), draw(V).requires_grad_() if bias else None, **options)
    # The teacher has one token fewer and another width.
    teacher = draw(R, H + 1), Head(draw(V - 1, H + 1), banned=options.get("banned"), softcap=4.0)
    target = torch.tensor([0, 15, 16, V - 2, 3], device=DEVICE)
    return draw(R, H).requires_grad_(), head, target, teacher, torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0], device=DEVICE)


def to(x, dtype):
    """The same leaves, heads or pairs of them in another dtype."""
    if isinstance(x, tuple):
        return tuple(to(y, dtype) for y in x)
    if isinstance(x, Head):
        bias = None if x.bias is None else to(x.bias, dtype)
        return Head(to(x.weight, dtype), bias, x.logit_scale, x.softcap, x.banned)
    return x.detach().to(dtype, copy=True).requires_grad_(x.requires_grad)


def gradients(form, hidden, head, target, teacher, row_weight, **options):
    loss = form(hidden, head, target=target, teacher=teacher, row_weight=row_weight, **options)
    leaves = [x for x in (hidden, head.weight, head.bias) if x is not None]
    # A factor behind the loss, because backward must scale the stored gradients.
    return [loss.detach(), *torch.autograd.grad(0.5 * loss, leaves)]


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_that_of_eager(kind, options, dtype):
    hidden, head, target, teacher, row_weight = case(dtype, bias=kind == "hard", **options)
    target, teacher = (target, None) if kind == "hard" else (None, teacher)
    wide = teacher and to(teacher, torch.float64)
    truth = gradients(
        distill_loss_reference, to(hidden, torch.float64), to(head, torch.float64), target, wide, row_weight.double()
    )
    eager = gradients(distill_loss_reference, hidden, head, target, teacher, row_weight)
    ours = gradients(distill_loss_triton, hidden, head, target, teacher, row_weight, chunk=2)
    for name, t, e, o in zip(("loss", "d_hidden", "d_weight", "d_bias"), truth, eager, ours):
        # Over a whole tensor at once: a greatest error hangs on the draw.
        assert (o - t).norm() <= 2 * (e - t).norm() + 4 * torch.finfo(dtype).eps * t.norm(), name


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_float64_equals_the_reference(softcap):
    """Nothing hides in a tolerance: to the last digits, also with float32 scale and cap (both powers of two)."""
    hidden, head, target, teacher, row_weight = case(torch.float64, bias=True, softcap=softcap, banned=BANNED)
    for pair in ((target, None), (None, teacher)):
        want = gradients(distill_loss_reference, hidden, head, *pair, row_weight.double())
        for a, b in zip(gradients(distill_loss_triton, hidden, head, *pair, row_weight.double()), want):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_left_to_the_loss_is_as_one_made_anew(kind, dtype):
    """In whatever memory: a product's room holds NaN until the readout, which the loss reads to the end of a block."""
    hidden, head, target, teacher, row_weight = case(dtype, bias=True, softcap=3.0, banned=BANNED)
    found = []
    for make in (Rows, Rows.sharing):
        rows, its = make(hidden, head), make(*teacher) if kind == "soft" else None
        read = [head_readout_triton(*x, chunk=2) for x in (rows, its) if x is not None]
        targets = {"teacher": its} if its else {"target": target}
        loss = distill_loss_triton(*rows, **targets, row_weight=row_weight, chunk=2)
        found.append([*read, loss, torch.autograd.grad(loss, (hidden, head.weight, head.bias))])
    assert rows.product is not None
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_rows_of_weight_zero_give_nothing():
    hidden, head, target, _, _ = case(torch.float32, banned=BANNED)
    target[1], target[2], target[3] = BANNED, -100, V  # losses of infinity
    weight = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0], device=DEVICE)
    loss, d_hidden, _ = gradients(distill_loss_triton, hidden, head, target, None, weight)
    assert loss.isfinite()
    assert (d_hidden[1:] == 0).all()
    assert (d_hidden[0] != 0).any()


def test_teacher_equal_to_student_has_zero_soft_gradient():
    hidden, head, _, _, row_weight = case(torch.float32, banned=BANNED)
    _, *grads = gradients(distill_loss_triton, hidden, head, None, to((hidden, head), torch.float32), row_weight)
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("wrong", [-1, -100, V, V + 3])
def test_a_target_that_does_not_exist_shows(wrong):
    """Neither a read from another row nor a finite loss."""
    hidden, head, target, _, _ = case(torch.float32)
    target[3] = wrong
    assert distill_loss_triton(hidden, head, target=target) == float("inf")


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (1, 16), (3, 17), (7, 31), (13, 2)])
def test_odd_sizes(rows, vocabulary):
    """Rows and a vocabulary that fill no chunk and no block, one token alone, the last ones banned."""
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, H, dtype=torch.float64, generator=generator).to(DEVICE).requires_grad_()
    weight = torch.randn(vocabulary, H, dtype=torch.float64, generator=generator).to(DEVICE).requires_grad_()
    head = Head(weight, banned=vocabulary - 1 if vocabulary > 1 else None)
    target = torch.arange(rows, device=DEVICE) % max(vocabulary - 1, 1)
    teacher = 2 * hidden.detach(), Head(weight.detach()[: max(vocabulary - 1, 1)])
    weights = torch.ones(rows, dtype=torch.float64, device=DEVICE)
    for pair in ((target, None), (None, teacher)):
        want = gradients(distill_loss_reference, hidden, head, *pair, weights)
        for a, b in zip(gradients(distill_loss_triton, hidden, head, *pair, weights, chunk=4), want):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(head_readout_triton(hidden, head, chunk=4), head_readout(hidden, head)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_repeats_bit_for_bit(kind):
    """In whatever memory the buffers lie: what they held before is NaN, and a row ends within a block."""
    hidden, head, target, teacher, row_weight = case(torch.float32, bias=True, softcap=3.0, banned=BANNED)
    target, teacher = (target, None) if kind == "hard" else (None, teacher)
    first = gradients(distill_loss_triton, hidden, head, target, teacher, row_weight, chunk=2)
    for size in (1, 999):
        elsewhere = torch.empty(size, device=DEVICE)
        again = gradients(distill_loss_triton, hidden, head, target, teacher, row_weight, chunk=2)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        del elsewhere


def test_no_rows_and_no_gradients():
    hidden, head, target, _, row_weight = case(torch.float32)
    loss = distill_loss_triton(hidden[:0], head, target=target[:0])
    loss.backward()
    assert loss == 0
    assert (head.weight.grad == 0).all()
    with torch.no_grad():
        quiet = distill_loss_triton(hidden, head, target=target, row_weight=row_weight)
    torch.testing.assert_close(quiet, gradients(distill_loss_triton, hidden, head, target, None, row_weight)[0])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_readout(options, dtype):
    hidden, head, *_ = case(dtype, bias=True, **options)
    token, confidence, entropy = head_readout_triton(hidden, head, chunk=2)
    want_token, want_confidence, want_entropy = head_readout(to(hidden, torch.float64), to(head, torch.float64))
    assert token.dtype == torch.int64
    assert confidence.dtype == torch.float32
    assert torch.equal(token, want_token)
    torch.testing.assert_close(confidence, want_confidence, rtol=20 * torch.finfo(dtype).eps, atol=0)
    eps = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(entropy, want_entropy, rtol=eps, atol=eps)


def test_readout_takes_the_lowest_of_equals_and_never_the_banned():
    tie = Head(torch.ones(V, H, device=DEVICE), banned=0)
    token, confidence, entropy = head_readout_triton(torch.ones(R, H, device=DEVICE), tie)
    assert (token == 1).all()
    torch.testing.assert_close(confidence, torch.full((R,), 1 / (V - 1), device=DEVICE))
    torch.testing.assert_close(entropy, torch.full((R,), math.log(V - 1), device=DEVICE))


def test_autocast_computes_in_its_dtype():
    hidden, head, target, _, row_weight = case(torch.float32)
    with torch.autocast(DEVICE, torch.float16):
        cast = gradients(distill_loss_triton, hidden, head, target, None, row_weight)
    half = to((hidden, head), torch.float16)
    for a, b in zip(cast, gradients(distill_loss_triton, *half, target, None, row_weight)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b.float(), rtol=2e-3, atol=2e-3)
