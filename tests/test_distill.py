"""The fused head against plain torch in float64, its memory, and what it must refuse."""

import pytest
import torch

from mtpkern.kernels.distill import Head, distill_loss, distill_loss_reference, head_readout

R, H, V, BANNED = 37, 6, 19, 11


def case(dtype=torch.float64, bias=True, **options):
    generator = torch.Generator().manual_seed(0)
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


def test_finite_differences():
    hidden, head, target, _, row_weight = case(softcap=1.5, logit_scale=0.7, banned=BANNED)

    def f(hidden, weight, bias):
        option = Head(weight, bias, logit_scale=0.7, softcap=1.5, banned=BANNED)
        return distill_loss(hidden, option, target=target, row_weight=row_weight, chunk=8)

    assert torch.autograd.gradcheck(f, (hidden, head.weight, head.bias))


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


def test_teacher_equal_to_student_has_zero_soft_gradient():
    hidden, head, _, _, _ = case(banned=BANNED)
    distill_loss(
        hidden, head, teacher=(hidden.detach(), Head(head.weight.detach(), head.bias, banned=BANNED))
    ).backward()
    assert (hidden.grad == 0).all()


def test_readout():
    hidden, head, _, _, _ = case(banned=BANNED, softcap=2.0)
    token, confidence = head_readout(hidden, head, chunk=8)
    p = head.logits(hidden).softmax(-1)
    assert torch.equal(token, head.logits(hidden).argmax(-1))
    torch.testing.assert_close(confidence, p.amax(-1).float())
    assert BANNED not in token
    tie = Head(torch.ones(V, H, dtype=torch.float64))
    assert (head_readout(torch.ones(R, H, dtype=torch.float64), tie)[0] == 0).all()


def test_never_all_logits_at_once(monkeypatch):
    rows = []
    logits = Head.logits

    def record(self, hidden):
        rows.append(len(hidden))
        return logits(self, hidden)

    monkeypatch.setattr(Head, "logits", record)
    hidden, head, target, teacher, _ = case()
    distill_loss(hidden, head, target=target, chunk=10)
    distill_loss(hidden, head, teacher=teacher, chunk=10)
    head_readout(hidden, head, chunk=10)
    assert max(rows) == 10
    assert sum(rows) == 4 * R


def test_bfloat16_error_is_that_of_the_reference():
    hidden, head, target, _, _ = case(dtype=torch.float32, bias=False)
    truth = distill_loss_reference(hidden.double(), Head(head.weight.double()), target=target)
    with torch.autocast("cpu", torch.bfloat16):
        ours = distill_loss(hidden, head, target=target)
        eager = distill_loss_reference(hidden, head, target=target)
    assert abs(ours - truth) <= 2 * abs(eager - truth) + 1e-4 * abs(truth)


def test_errors():
    hidden, head, target, teacher, _ = case()
    with pytest.raises(ValueError, match="exactly one"):
        distill_loss(hidden, head)
    with pytest.raises(ValueError, match="exactly one"):
        distill_loss(hidden, head, target=target, teacher=teacher)
    with pytest.raises(ValueError, match="vocabulary"):
        distill_loss(hidden, Head(head.weight[:5]), teacher=teacher)
