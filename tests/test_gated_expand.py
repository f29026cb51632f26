"""The second half of gated LoRA against float64, where the base's product brings the first: columns of one tensor."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mtpkern.kernels import gated_lora as module
from mtpkern.kernels.gated_lora import gated_expand, gated_expand_triton, gated_lora
from support.adapters import DTYPES, RANKS, WIDTHS, Form, H, Operands, bits, draw, eager, truth

FORMS = [gated_expand, pytest.param(gated_expand_triton, marks=pytest.mark.kernel)]

# Uninitialised memory is NaN, so that reading what nobody has written shows.
pytestmark = [pytest.mark.usefixtures("interpreter")] if not torch.cuda.is_available() else []


def brought_along(operands: Operands) -> tuple[Tensor, Operands]:
    """Outputs and lows as columns of one tensor, as one product of weights and A gives them, and `operands` on it."""
    outs, x, gate, as_, bs, scales = operands
    joint = torch.cat([*outs, *((x.double() @ a.double().T).to(x.dtype) for a in as_)], dim=1)
    widths, ranks = [y.shape[1] for y in outs], [len(a) for a in as_]
    views = joint.split([*widths, *ranks], dim=1)
    return joint, (list(views[: len(widths)]), x, gate, list(views[len(widths) :]), bs, scales)


def truth_of_half(operands: Operands) -> list[Tensor]:
    """In float64, of lows as they are."""
    outs, _, gate, lows, bs, scales = operands
    return [
        torch.where(gate[:, None] != 0, y.double() + scale * (low.double() @ b.double().T), y.double())
        for y, low, b, scale in zip(outs, lows, bs, scales)
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("R", [1, 2, 15, 31, 32, 33, 97])
@pytest.mark.parametrize(("ranks", "widths"), [(RANKS, WIDTHS), ((1,), (7,)), ((61, 13), (131, 29))], ids=str)
def test_equals_float64(form: Form, ranks: Any, widths: Any, R: int) -> None:
    """Of columns of one tensor, which are all that changes, in gated rows alone."""
    joint, operands = brought_along(draw(R, ranks=ranks, widths=widths))
    outs, _, gate, lows, bs, scales = operands
    before, expected = joint.clone(), truth_of_half(operands)
    form(outs, lows, gate, bs, scales)
    for y, right in zip(outs, expected):
        torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-4)
    assert torch.equal(joint[~gate], before[~gate])
    assert torch.equal(joint[:, sum(widths) :], before[:, sum(widths) :])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_twice_the_same_dtype_eager(form: Form, dtype: torch.dtype) -> None:
    """Both halves against the truth of both: what a product in that dtype has rounded x A^T to is eager's too."""
    error, eager_error = 0.0, 0.0
    for seed in range(3):
        whole = draw(17, dtype, seed=seed)
        right, theirs = truth(*whole), eager(*whole)
        _, (outs, _, gate, lows, bs, scales) = brought_along(whole)
        form(outs, lows, gate, bs, scales)
        for y, other, true in zip(outs, theirs, right):
            error += (y.double() - true).square().sum().item()
            eager_error += (other.double() - true).square().sum().item()
    assert error**0.5 <= 2 * eager_error**0.5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_leaves_rows_without_gate_untouched(form: Form, value: float) -> None:
    """Whatever stands in B, in their lows and in themselves; and what stands there goes nowhere."""
    joint, (outs, _, gate, lows, bs, scales) = brought_along(draw(34))
    joint[~gate] = torch.nan
    clean = joint.clone()
    form(outs, lows, gate, bs, scales)
    assert torch.equal(bits(joint[~gate]), bits(clean[~gate]))
    assert joint[gate].isfinite().all()
    form(outs, lows, gate, [torch.full_like(b, value) for b in bs], scales)
    assert torch.equal(bits(joint[~gate]), bits(clean[~gate]))
    assert not any(y[gate].isfinite().any() for y in outs)


@pytest.mark.parametrize("form", FORMS)
def test_in_whatever_strides_and_where_all_rows_are_computed(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    _, operands = brought_along(draw(9))
    outs, _, gate, lows, bs, scales = operands
    expected = truth_of_half(operands)
    turned, flags = [y.t().contiguous().t() for y in outs], torch.stack([gate, ~gate], dim=1)
    lows, bs = ([t.t().contiguous().t() for t in ts] for ts in (lows, bs))
    form(turned, lows, flags[:, 0], bs, scales)
    monkeypatch.setattr(module, "gated_rows", lambda gate: None)
    form(outs, lows, gate, bs, scales)
    for y, other, right in zip(turned, outs, expected):
        torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(other.double(), right, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("adapter", DTYPES[1:], ids=str)
def test_with_b_as_it_is(form: Form, adapter: torch.dtype) -> None:
    """In float32 or as the outputs are; no rows; and float64, which no kernel computes."""
    _, operands = brought_along(draw(5, torch.bfloat16))
    outs, _, gate, lows, bs, scales = operands
    bs = [b.to(adapter) for b in bs]
    expected = truth_of_half((outs, _, gate, lows, bs, scales))
    form(outs, lows, gate, bs, scales)
    for y, right in zip(outs, expected):
        torch.testing.assert_close(y.double(), right, rtol=2e-2, atol=1e-1)
    form([y[:0] for y in outs], [low[:0] for low in lows], gate[:0], bs, scales)
    _, wide = brought_along(draw(5, torch.float64))
    expected = truth_of_half(wide)
    form(wide[0], wide[3], *wide[2:3], *wide[4:])
    for y, right in zip(wide[0], expected):
        torch.testing.assert_close(y, right, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("far", ["y", "low", "b"])
def test_offsets_pass_32_bits(form: Form, far: str) -> None:
    torch.use_deterministic_algorithms(False)  # which would fill it
    _, operands = brought_along(draw(3, torch.float16, ranks=(3,), widths=(3,), hidden=16))
    outs, _, gate, lows, bs, scales = operands
    (expected,) = truth_of_half(operands)
    near = {"y": outs[0], "low": lows[0], "b": bs[0]}
    apart = torch.empty(2**31 + 16, dtype=torch.float16).as_strided(near[far].shape, (2**30, 1))
    apart.copy_(near[far])
    t = {**near, far: apart}
    form([t["y"]], [t["low"]], gate, [t["b"]], scales)
    torch.testing.assert_close(t["y"].double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_both_halves_are_the_whole(form: Form) -> None:
    """Two launches round at the same places as a product that brings x A^T along and one launch."""
    outs, x, gate, as_, bs, scales = draw(17, torch.bfloat16)
    one, two = [y.clone() for y in outs], [y.clone() for y in outs]
    form(one, [(x.float() @ a.float().T).to(x.dtype) for a in as_], gate, bs, scales)
    gated_lora(two, x, gate, as_, bs, scales)
    for y, other in zip(one, two):
        torch.testing.assert_close(y, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": [1.0]}, "outs, lows, bs and scale want one entry for each sibling, got 3, 3, 3 and 1"),
        ({"outs": [], "lows": [], "bs": [], "scale": 1.0}, "one entry for each sibling, got 0, 0, 0 and 0"),
        ({"lows": [torch.zeros(1, 4, 12)] * 3}, "the first low [R, r] expected, got (1, 4, 12)"),
        ({"gate": torch.zeros(3, dtype=torch.bool)}, "gate must be [R] = [4] of bool"),
        (
            {"lows": [torch.zeros(4, 12)] * 3},
            "sibling 1: low [R, r], B [N, r] and an output [R, N] with R = 4 expected",
        ),
        ({"outs": [torch.zeros(4, 70), torch.zeros(4, 33), torch.zeros(3, 64)]}, "(4, 24), (64, 24) and (3, 64)"),
        (
            {"outs": [torch.zeros(4, 70).half(), torch.zeros(4, 33), torch.zeros(4, 64)]},
            "sibling 0: output and low must be",
        ),
        (
            {"lows": [torch.zeros(4, 12), torch.zeros(4, 8), torch.zeros(4, 24).half()]},
            "sibling 2: output and low must be",
        ),
        (
            {"bs": [torch.zeros(70, 12), torch.zeros(33, 8), torch.zeros(64, 24).half()]},
            "sibling 2: output and low must be",
        ),
        (
            {"bs": [torch.zeros(N, r).half() for N, r in zip(WIDTHS, RANKS)]},
            "B must be float32 or torch.float32, as the first low is, got torch.float16",
        ),
        ({"gate": torch.zeros(4, dtype=torch.bool, device="meta")}, "all tensors must be on cpu"),
        ({"lows": [torch.zeros(4, r, requires_grad=True) for r in RANKS]}, "no backward"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    _, (outs, _, gate, lows, bs, scales) = brought_along(draw(4))
    arguments = {"outs": outs, "lows": lows, "gate": gate, "bs": bs, "scale": scales}
    before = [y.clone() for y in outs]
    with pytest.raises(ValueError, match=r"^gated_expand") as raised:
        gated_expand(**{**arguments, **change})
    assert message in str(raised.value)
    assert all(map(torch.equal, outs, before))


def test_compiled_whole() -> None:
    """No break in the graph, of the whole and of its second half; outputs and lows are views of one product."""
    _, x, gate, as_, bs, scales = draw(6)
    weight = torch.randn(sum(WIDTHS), H, generator=torch.Generator().manual_seed(0))

    def layer(x: Tensor, gate: Tensor) -> Tensor:
        joint = x @ weight.T
        gated_lora(list(joint.split(WIDTHS, dim=1)), x, gate, as_, bs, scales)
        return joint.sigmoid()

    def riding(x: Tensor, gate: Tensor) -> Tensor:
        joint = x @ torch.cat([weight, *as_]).T
        views = joint.split([*WIDTHS, *RANKS], dim=1)
        gated_expand(views[:3], views[3:], gate, bs, scales)
        return joint[:, : sum(WIDTHS)].sigmoid()

    for form in (layer, riding):
        torch._dynamo.reset()
        compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
        for rows in (gate, ~gate):
            torch.testing.assert_close(compiled(x, rows), layer(x, rows))
    torch._dynamo.reset()
