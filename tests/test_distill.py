"""The fused head against plain torch in float64, its memory, and what it must refuse."""

from functools import partial
from itertools import product

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mtpkern.kernels import distill
from mtpkern.kernels import head as heads
from mtpkern.kernels.distill import distill_loss, head_readout
from mtpkern.kernels.head import Head, Rows
from support.losses import distill_loss_reference

distill_loss_triton, head_readout_triton = (partial(form, triton=True) for form in (distill_loss, head_readout))

R, H, V, BANNED = 37, 6, 19, 11


def case(dtype=torch.float64, bias=True, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(R, H, dtype=dtype, generator=generator).requires_grad_()
    weight = torch.randn(V, H, dtype=dtype, generator=generator).requires_grad_()
    b = torch.randn(V, dtype=dtype, generator=generator).requires_grad_() if bias else None
    target = torch.randint(0, BANNED, (R,), generator=generator)
    row_weight = torch.randint(0, 3, (R,), generator=generator).to(dtype)
    teacher_hidden = torch.randn(R, H + 1, dtype=dtype, generator=generator)
    # The teacher knows one token fewer than the student.
    teacher_head = Head(torch.randn(V - 1, H + 1, dtype=dtype, generator=generator), banned=BANNED)
    return hidden, Head(weight, b, **options), target, (teacher_hidden, teacher_head), row_weight


OPTIONS = [
    {},
    {"logit_scale": 0.3},
    {"softcap": 1.5},
    {"banned": BANNED},
    {"logit_scale": 2.0, "softcap": 3.0, "banned": BANNED},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_reference_with_gradients(options, kind, bias, weighted):
    hidden, head, target, teacher, row_weight = case(bias=bias, **options)
    targets = {"target": target} if kind == "hard" else {"teacher": teacher}
    weight = row_weight if weighted else None
    leaves = [x for x in (hidden, head.weight, head.bias) if x is not None]
    got = distill_loss(hidden, head, row_weight=weight, chunk=8, **targets)
    want = distill_loss_reference(hidden, head, row_weight=weight, **targets)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    # A factor behind the loss, because backward must scale the stored gradients.
    for a, b in zip(torch.autograd.grad(3 * got, leaves), torch.autograd.grad(3 * want, leaves)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_a_product_left_to_the_loss_is_as_one_made_anew(options, kind, bias, narrow):
    """To the bit, chunk by chunk; rows of weight 0 make other products, to rounding."""
    hidden, head, target, (states, its_head), row_weight = case(torch.float32, bias, **options)
    targets = {"target": target}
    leaves = [x for x in (hidden, head.weight, head.bias) if x is not None]

    def step(make, weight):
        rows = make(hidden, head)
        read = head_readout(*rows, chunk=8)
        if kind == "soft":
            targets["teacher"], targets["target"] = make(states.float(), its_head), None
            read += head_readout(*targets["teacher"], chunk=8)
        loss = distill_loss(*rows, **targets, row_weight=weight, chunk=8)
        return [*read, loss, *torch.autograd.grad(3 * loss, leaves)]

    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        assert Rows.sharing(hidden, head).product.dtype == (torch.bfloat16 if narrow else torch.float32)
        for weight in (None, row_weight):
            close = {"rtol": 0, "atol": 0} if weight is None else {"rtol": 1e-2 if narrow else 1e-5, "atol": 1e-5}
            torch.testing.assert_close(step(Rows.sharing, weight), step(Rows, weight), **close)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_finite_differences_of_the_reference(kind):
    hidden, head, target, teacher, row_weight = case(softcap=1.5, logit_scale=0.7, banned=BANNED)
    targets = {"target": target[:9]} if kind == "hard" else {"teacher": (teacher[0][:9], teacher[1])}

    def f(hidden, weight, bias):
        option = Head(weight, bias, logit_scale=0.7, softcap=1.5, banned=BANNED)
        return distill_loss_reference(hidden, option, row_weight=row_weight[:9], **targets)

    assert torch.autograd.gradcheck(f, (hidden[:9].detach().requires_grad_(), head.weight, head.bias))


def test_frozen_head_gets_no_gradient_and_costs_none():
    hidden, head, target, _, _ = case()
    frozen = Head(head.weight.detach(), None)
    distill_loss(hidden, frozen, target=target).backward()
    assert hidden.grad is not None
    assert frozen.weight.grad is None


def test_rows_of_weight_zero_keep_the_graph_connected():
    hidden, head, target, _, _ = case(banned=BANNED)
    # A row may even name the impossible token.
    target[0] = BANNED
    loss = distill_loss(hidden, head, target=target, row_weight=torch.zeros(R, dtype=torch.float64))
    loss.backward()
    assert loss == 0
    assert (hidden.grad == 0).all()
    assert (head.weight.grad == 0).all()


def test_no_rows():
    _, head, _, _, _ = case()
    hidden = torch.zeros(0, H, dtype=torch.float64, requires_grad=True)
    loss = distill_loss(hidden, head, target=torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    assert (head.weight.grad == 0).all()


def test_teacher_equal_to_student_has_no_soft_loss_and_no_gradient():
    hidden, head, _, _, _ = case(banned=BANNED)
    loss = distill_loss(hidden, head, teacher=(hidden.detach(), Head(head.weight.detach(), head.bias, banned=BANNED)))
    loss.backward()
    assert loss == 0
    assert (hidden.grad == 0).all()


def test_readout():
    hidden, head, _, _, _ = case(banned=BANNED, softcap=2.0)
    token, confidence, entropy = head_readout(hidden, head, chunk=8)
    p = head.logits(hidden).softmax(-1)
    assert torch.equal(token, head.logits(hidden).argmax(-1))
    torch.testing.assert_close(confidence, p.amax(-1).float())
    torch.testing.assert_close(entropy, torch.special.entr(p).sum(-1).float())
    assert BANNED not in token
    tie = Head(torch.ones(V, H, dtype=torch.float64))
    assert (head_readout(torch.ones(R, H, dtype=torch.float64), tie)[0] == 0).all()


def test_never_all_logits_at_once(monkeypatch):
    rows = []
    finish = Head.finish

    def record(self, z):
        rows.append(len(z))
        return finish(self, z)

    monkeypatch.setattr(Head, "finish", record)
    hidden, head, target, teacher, _ = case()
    distill_loss(hidden, head, target=target, chunk=10)
    distill_loss(hidden, head, teacher=teacher, chunk=10)
    head_readout(hidden, head, chunk=10)
    assert max(rows) == 10
    assert sum(rows) == 4 * R


def peak_bytes(f):
    """The most memory alive at once, above what was there before: every allocation of torch, in C++ too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        f()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(live.cumsum(0).max())


class NoKernel:
    """A kernel that is launched and does nothing: what it would write costs no memory."""

    def __getitem__(self, grid):
        return lambda *args, **options: None


def test_memory_of_the_triton_form(monkeypatch):
    """Above its inputs: the bytes of LOGITS, the gradients in their own dtype once, a few bytes a row, no [R, V]."""
    monkeypatch.setattr(distill, "_loss_kernel", NoKernel(), raising=False)
    monkeypatch.setattr(distill, "_readout_kernel", NoKernel(), raising=False)
    V, H, rows = 4096, 256, 128
    monkeypatch.setattr(heads, "LOGITS", rows * V * 4)

    def peak(R, form, *, trained=True):
        hidden = torch.randn(R, H, requires_grad=True)
        head = Head(torch.randn(V, H, requires_grad=trained))
        return peak_bytes(lambda: form(hidden, head))

    def hard(hidden, head):
        (distill_loss_triton(hidden, head, target=torch.zeros(len(hidden), dtype=torch.int64)) / 7).backward()

    def soft(hidden, head):
        teacher = hidden.detach(), Head(head.weight.detach())
        (distill_loss_triton(hidden, head, teacher=teacher) / 7).backward()

    small = 64 << 10
    d_weight = V * H * 4

    def shared(hidden, head):
        left = Rows.sharing(hidden, head)
        head_readout_triton(*left)
        (distill_loss_triton(*left, target=torch.zeros(len(hidden), dtype=torch.int64)) / 7).backward()

    for form, R, logits in ((hard, 512, rows), (soft, 128, 2 * rows), (shared, 128, rows)):
        logits *= V * 4
        for trained in (True, False):
            # The bound, with a chunk's d hidden [rows, H] in place of the rest of its half gigabyte.
            allowed = logits + trained * d_weight + 4 * R * H + rows * H * 4 + 64 * R + small
            assert peak(R, form, trained=trained) <= allowed
    assert (peak(1024, hard) - peak(512, hard)) / 512 <= 8 * H + 64
    assert peak(1024, head_readout_triton) <= rows * V * 4 + 64 * 1024 + small


def test_d_weight_of_a_wider_dtype_is_summed_in_parts(monkeypatch):
    """Under autocast: float32 sums of bfloat16 products, a few rows of the head at a time, equal to all at once."""
    hidden, head, target, _, _ = case(dtype=torch.float32, bias=False)
    grads = []
    for held in (distill.PARTIAL, 3 * H * 2):
        monkeypatch.setattr(distill, "PARTIAL", held)
        with torch.autocast("cpu", torch.bfloat16):
            loss = distill_loss(hidden, head, target=target, chunk=8)
        grads.append(torch.autograd.grad(loss, head.weight)[0])
    assert grads[0].dtype == torch.float32
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_d_weight_summed_in_bfloat16_over_many_chunks():
    """In place and in the weight's own dtype: the error stays within twice that of one product over all rows."""
    generator = torch.Generator().manual_seed(0)
    rows, target = 640, torch.randint(0, V, (640,), generator=generator)
    hidden, weight = (torch.randn(n, 16, generator=generator).bfloat16() for n in (rows, V))

    def d_weight(form, dtype, **options):
        leaf = weight.to(dtype).requires_grad_()
        return torch.autograd.grad(form(hidden.to(dtype), Head(leaf), target=target, **options), leaf)[0]

    truth = d_weight(distill_loss_reference, torch.float64)
    eager = (d_weight(distill_loss_reference, torch.bfloat16) - truth).norm()
    assert (d_weight(distill_loss, torch.bfloat16, chunk=80) - truth).norm() <= 2 * eager


def test_backward_is_once_only_and_first_order_only():
    hidden, head, target, _, _ = case()
    loss = distill_loss(hidden, head, target=target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()
    loss = distill_loss(hidden, head, target=target)
    # A loss that is squared: its second derivative would depend on the gradients.
    (grad,) = torch.autograd.grad(loss**2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_one_node_for_the_compiler():
    """No graph break in a compiled step, hard and soft and readout, with and without autocast; the same bits."""
    hidden, head, target, teacher, row_weight = case(dtype=torch.float32)
    target, row_weight = target.clamp(max=BANNED - 1), row_weight[:20]

    def step(hidden, weight, bias, target):
        head = Head(weight, bias, softcap=3.0, banned=BANNED)
        states = torch.tanh(hidden)
        rows = Rows.sharing(states, head)
        token, confidence, entropy = head_readout(*rows)
        hard = distill_loss(*rows, target=torch.where(target == 3, token, target), row_weight=confidence)
        return hard / 7 + distill_loss(states, head, teacher=teacher) + entropy.sum()

    leaves = hidden, head.weight, head.bias
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for narrow in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            got, want = (f(*leaves, target) for f in (compiled, step))
        assert torch.equal(got, want)
        for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves)):
            assert torch.equal(a, b)


def test_operators_are_registered_rightly():
    hidden, head, target, teacher, row_weight = case(dtype=torch.float32, bias=True)
    leaves = hidden, head.weight, head.bias
    kept = 1.0, 3.0, BANNED, None, torch.randn(R, V), torch.float32
    student = *[x.detach() for x in leaves], *kept
    torch.library.opcheck(distill._readout_op.registered, (*student, 8, False))
    soft = teacher[0], *vars(teacher[1]).values(), torch.randn(R, V - 1), torch.float32
    for frozen, weight in product(((target, *[None] * 9), (None, *soft)), (None, row_weight)):
        arguments = *student, *frozen, weight, [True, True, True], 8, False
        torch.library.opcheck(distill._gradients_op.registered, arguments)
    ready = [torch.randn(()), *(torch.randn_like(x) for x in leaves)]
    # Traced with its gradients as outputs, backward could not write into them: test_one_node_for_the_compiler.
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(distill._loss_op.registered, (*leaves, *ready), test_utils=checks)


def test_bfloat16_error_is_that_of_the_reference():
    """Over 8 draws: a loss is one number, which the reference may hit by luck."""
    errors = []
    for seed in range(8):
        hidden, head, target, _, _ = case(dtype=torch.float32, bias=False, seed=seed)
        truth = distill_loss_reference(hidden.double(), Head(head.weight.double()), target=target)
        with torch.autocast("cpu", torch.bfloat16):
            losses = [form(hidden, head, target=target) for form in (distill_loss, distill_loss_reference)]
        errors.append([(loss / truth - 1).item() for loss in losses])
    ours, eager = torch.tensor(errors).square().mean(0).sqrt()
    assert ours <= 2 * eager + 1e-4


def test_errors():
    hidden, head, target, teacher, _ = case()
    with pytest.raises(ValueError, match="exactly one"):
        distill_loss(hidden, head)
    with pytest.raises(ValueError, match="exactly one"):
        distill_loss(hidden, head, target=target, teacher=teacher)
    with pytest.raises(ValueError, match="vocabulary"):
        distill_loss(hidden, Head(head.weight[:5]), teacher=teacher)
    with pytest.raises(ValueError, match="one dtype"):
        distill_loss(hidden.float(), head, target=target)
    with pytest.raises(ValueError, match="row_weight"):
        distill_loss(hidden, head, target=target, row_weight=torch.ones(R, requires_grad=True))
    # Rows that are not there would be left out, or read from behind the tensor by a kernel.
    rows = torch.arange(R + 1)
    for wrong in ({"target": target, "row_weight": torch.ones(R - 1)}, {"target": target[:-1]}, {"target": rows % V}):
        for triton in (False, True):
            with pytest.raises(ValueError, match=rf"must be \[R\] = \[{R}\], one for each hidden state; got"):
                distill_loss(hidden, head, triton=triton, **wrong)
    for triton in (False, True):
        with pytest.raises(ValueError, match=f"of the same {R} rows as the student's; got {R - 1}"):
            distill_loss(hidden, head, teacher=(teacher[0][1:], teacher[1]), triton=triton)
    room = heads.buffer_for(hidden, R, V, torch.float64)
    # Kernels would write behind rows that lie one behind the other.
    for wrong in (room.float(), room[1:], torch.empty(R, V, dtype=torch.float64)):
        with pytest.raises(ValueError, match="a product must be"):
            distill_loss(hidden, head, wrong, target=target)
        with pytest.raises(ValueError, match="a product must be"):
            head_readout(hidden, head, wrong)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        distill_loss(hidden, head, target=target - V)
