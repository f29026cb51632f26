"""Gated LoRA against float64: gated rows get the update, no other row is touched, whatever stands anywhere."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mtpkern.kernels import gated_lora as module
from mtpkern.kernels.gated_lora import gated_expand_triton, gated_lora, gated_lora_triton, gated_update
from support.adapters import DTYPES, RANKS, WIDTHS, Form, H, Operands, bits, draw, eager, truth

TRITON = pytest.param(gated_lora_triton, marks=pytest.mark.kernel)
FORMS = [gated_lora, TRITON]
# Uninitialised memory is NaN, so that reading what nobody has written shows.
pytestmark = [pytest.mark.usefixtures("interpreter")] if not torch.cuda.is_available() else []


def run(form: Form, operands: Operands) -> list[Tensor]:
    """The outputs; those of `operands` are left as they are."""
    outs = [y.clone() for y in operands[0]]
    form(outs, *operands[1:])
    return outs


def compare(form: Form, operands: Operands, tolerance: float = 1e-5) -> list[Tensor]:
    before = [t.clone() for t in (operands[1], operands[2], *operands[3], *operands[4])]
    got, gate = run(form, operands), operands[2] != 0
    for y, expected, was in zip(got, truth(*operands), operands[0]):
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=10 * tolerance)
        assert torch.equal(bits(y[~gate]), bits(was[~gate]))
    for t, was in zip((operands[1], operands[2], *operands[3], *operands[4]), before):
        assert torch.equal(t, was)
    return got


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("R", [1, 2, 15, 16, 17, 63, 64, 65, 200])
def test_equals_float64(form: Form, R: int) -> None:
    compare(form, draw(R))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("adapter", ["as x", "float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_twice_the_same_dtype_eager(form: Form, dtype: torch.dtype, adapter: str) -> None:
    error, eager_error = 0.0, 0.0
    for seed in range(3):
        operands = draw(17, dtype, torch.float32 if adapter == "float32" else None, seed=seed)
        for y, theirs, right in zip(run(form, operands), eager(*operands), truth(*operands)):
            error += (y.double() - right).square().sum().item()
            eager_error += (theirs.double() - right).square().sum().item()
    assert error**0.5 <= 2 * eager_error**0.5


def test_float64_is_computed_in_float64() -> None:
    for form in (gated_lora, gated_update):
        compare(form, draw(5, torch.float64), tolerance=1e-13)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", [(8,), (16,), (48,), (96, 1), (128, 32)], ids=str)
def test_ranks(form: Form, ranks: tuple[int, ...]) -> None:
    compare(form, draw(3, ranks=ranks, widths=WIDTHS[: len(ranks)]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("hidden", "widths"), [(1, (1,)), (64, (128, 16, 16)), (256, (8,)), (4111, (37,))], ids=str)
def test_sizes(form: Form, hidden: int, widths: tuple[int, ...]) -> None:
    compare(form, draw(5, ranks=RANKS[: len(widths)], widths=widths, hidden=hidden))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("which", "dtype"),
    [("none", torch.bool), ("all", torch.bool), ("first", torch.int8), ("last", torch.uint8), ("one tile", torch.bool)],
)
def test_gates(form: Form, which: str, dtype: torch.dtype) -> None:
    outs, x, _, *adapter = draw(70)
    gate = torch.zeros(70, dtype=dtype)
    rows = {"none": slice(0), "all": slice(None), "first": slice(1), "last": slice(69, 70), "one tile": slice(32, 64)}
    gate[rows[which]] = -1 if dtype == torch.int8 else 1
    compare(form, (outs, x, gate, *adapter))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nothing_reaches_a_row_without_gate(form: Form, value: float) -> None:
    outs, x, gate, as_, bs, scales = draw(34)
    for y in outs:
        y[~gate] = torch.nan
    as_, bs = ([torch.full_like(t, value) for t in ts] for ts in (as_, bs))
    poisoned = (outs, x, gate, as_, bs, scales)
    for y, was in zip(run(form, poisoned), outs):
        assert torch.equal(bits(y[~gate]), bits(was[~gate]))
        assert y[gate].isnan().all()


@pytest.mark.parametrize("form", FORMS)
def test_nan_of_a_row_without_gate_goes_nowhere(form: Form) -> None:
    outs, x, gate, *adapter = draw(34)
    expected = run(form, (outs, x, gate, *adapter))
    x[~gate] = torch.nan
    for y, right in zip(run(form, (outs, x, gate, *adapter)), expected):
        assert torch.equal(y, right)


@pytest.mark.parametrize("form", FORMS)
def test_nan_stays_in_its_sibling_and_its_column(form: Form) -> None:
    outs, x, gate, as_, bs, scales = draw(5)
    expected = run(form, (outs, x, gate, as_, bs, scales))
    as_[1][0] = torch.nan
    bs[2][63] = torch.nan
    got = run(form, (outs, x, gate, as_, bs, scales))
    assert torch.equal(got[0], expected[0])
    assert got[1][gate].isnan().all()
    assert torch.equal(got[2][:, :63], expected[2][:, :63])
    assert got[2][gate, 63].isnan().all()


@pytest.mark.parametrize("form", [TRITON])
def test_a_row_without_gate_is_not_even_written(form: Form) -> None:
    """All rows lie in one place: a row that got its old values back would undo the gated one."""
    outs, x, _, *adapter = draw(5)
    gate = torch.tensor([False, True, False, False, False])
    together = [y[:1].expand(5, -1) for y in outs]
    expected = [right[1] for right in truth(together, x, gate, *adapter)]
    form(together, x, gate, *adapter)
    for y, right in zip(together, expected):
        torch.testing.assert_close(y[0].double(), right, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", [TRITON])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_row_depend_on_no_other(form: Form, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    operands = draw(67, dtype, ranks=(12,), widths=(33,), hidden=521)  # three chunks
    outs, x, gate, *adapter = operands
    together = run(form, operands)
    assert all(map(torch.equal, run(form, operands), together))
    # Nor on a row's place in its tile.
    for rows in (slice(0, 1), slice(32, 67), slice(64, 65), slice(3, 20), slice(40, 67)):
        alone = run(form, ([y[rows] for y in outs], x[rows], gate[rows], *adapter))
        assert all(torch.equal(y, whole[rows]) for y, whole in zip(alone, together))
    # Nor on whether a chunk has a program of its own.
    monkeypatch.setattr(module, "SPLIT_ROWS", 0)
    assert all(map(torch.equal, run(form, operands), together))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_layer_depend_on_no_sibling(form: Form, dtype: torch.dtype) -> None:
    outs, x, gate, as_, bs, scales = draw(5, dtype)
    together = run(form, (outs, x, gate, as_, bs, scales))
    for i, y in enumerate(together):
        one = slice(i, i + 1)
        (alone,) = run(form, (outs[one], x, gate, as_[one], bs[one], scales[one]))
        assert torch.equal(alone, y)


@pytest.mark.parametrize("form", FORMS)
def test_strides(form: Form) -> None:
    """As siblings that are one product have them; and whatever else a view may be."""
    outs, x, gate, as_, bs, scales = draw(9)
    joint = torch.cat(outs, dim=1)
    views = list(joint.split(WIDTHS, dim=1))
    expected = truth(outs, x, gate, as_, bs, scales)
    form(views, x, gate, list(torch.cat(as_).split(RANKS)), bs, scales)
    torch.testing.assert_close(joint.double(), torch.cat(expected, dim=1), rtol=1e-5, atol=1e-4)

    wide = torch.stack([x, x + 1], dim=1)
    flags = torch.stack([gate, ~gate], dim=1)
    turned = [y.t().contiguous().t() for y in outs]
    as_, bs = ([t.t().contiguous().t() for t in ts] for ts in (as_, bs))
    form(turned, wide[:, 0], flags[:, 0], as_, bs, scales)
    for y, right in zip(turned, expected):
        torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_no_rows(form: Form) -> None:
    compare(form, draw(0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("far", ["y", "x", "a", "b"])
def test_offsets_pass_32_bits(form: Form, far: str) -> None:
    """Rows 2^30 elements apart: only what is touched takes memory."""
    torch.use_deterministic_algorithms(False)  # which would fill it
    outs, x, gate, as_, bs, scales = draw(3, torch.float16, ranks=(3,), widths=(3,), hidden=16)
    near = {"y": outs[0], "x": x, "a": as_[0], "b": bs[0]}
    apart = torch.empty(2**31 + 16, dtype=torch.float16).as_strided(near[far].shape, (2**30, 1))
    apart.copy_(near[far])
    t = {**near, far: apart}
    (expected,) = truth(outs, x, gate, as_, bs, scales)
    form([t["y"]], t["x"], gate, [t["a"]], [t["b"]], scales)
    torch.testing.assert_close(t["y"].double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("form", FORMS[1:2])
def test_where_the_host_would_have_to_wait_all_rows_are_computed(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    operands = draw(17)
    expected = compare(form, operands)
    monkeypatch.setattr(module, "gated_rows", lambda gate: None)
    for y, right in zip(compare(form, operands), expected):
        torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-5)


def test_no_form_waits_for_the_device() -> None:
    """On a device without memory nothing can be read."""
    outs, x, gate, as_, bs, scales = draw(3)
    with FakeTensorMode() as mode:
        outs, as_, bs = ([mode.from_tensor(t).to("meta") for t in ts] for ts in (outs, as_, bs))
        x, gate = (mode.from_tensor(t).to("meta") for t in (x, gate))
        gated_lora(outs, x, gate, as_, bs, scales)


@pytest.mark.parametrize(
    ("launch", "names"),
    [("gated_lora_triton", ["_shrink_kernel", "_expand_kernel"]), ("gated_expand_triton", ["_expand_kernel"])],
)
def test_launches(launch: str, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two, or one where the base's product brings the first half along."""
    pytest.importorskip("triton")
    seen: list[str] = []
    run_class = type(module._shrink_kernel)  # of the interpreter, or of the compiler where there is a GPU
    run = run_class.run

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        seen.append(self.fn.__name__)
        return run(self, *args, **options)

    monkeypatch.setattr(run_class, "run", noted)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    outs, x, gate, as_, bs, scales = draw(15)
    lows = [x @ a.T for a in as_]
    outs, as_, bs, lows = ([t.to(device) for t in ts] for ts in (outs, as_, bs, lows))
    x, gate = x.to(device), gate.to(device)
    if launch == "gated_lora_triton":
        gated_lora_triton(outs, x, gate, as_, bs, scales)
    else:
        gated_expand_triton(outs, lows, gate, bs, scales)
    assert seen == names


def test_one_scale_for_all() -> None:
    operands = draw(4)
    one, each = ([y.clone() for y in operands[0]] for _ in range(2))
    gated_lora(one, *operands[1:5], scale=0.25)
    gated_lora(each, *operands[1:5], scale=[0.25] * 3)
    assert all(map(torch.equal, one, each))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": [1.0]}, "one entry for each sibling, got 3, 3, 3 and 1"),
        ({"outs": [], "as_": [], "bs": [], "scale": 1.0}, "one entry for each sibling, got 0, 0, 0 and 0"),
        ({"as_": [torch.zeros(44, H)]}, "one entry for each sibling, got 3, 1, 3 and 3"),
        ({"x": torch.zeros(1, 4, H)}, "x [R, H] expected, got (1, 4, 263)"),
        ({"as_": [torch.zeros(r, 7) for r in RANKS]}, "sibling 0: A [r, H], B [N, r] and"),
        ({"as_": [torch.zeros(12, H)] * 3}, "H = 263 and R = 4 expected, got (12, 263), (33, 8) and (4, 33)"),
        ({"gate": torch.zeros(3, dtype=torch.bool)}, "gate must be [R] = [4] of bool"),
        ({"gate": torch.zeros(4)}, "of bool, uint8 or int8, got (4,) of torch.float32"),
        (
            {"as_": [torch.zeros(r, H, dtype=torch.float16) for r in RANKS]},
            "A must be float32 or torch.float32, as x is, got torch.float16",
        ),
        ({"outs": [torch.zeros(4, 70), torch.zeros(4, 33), torch.zeros(3, 64)]}, "sibling 2: A [r, H], B [N, r] and"),
        (
            {"outs": [torch.zeros(4, 70).half(), torch.zeros(4, 33), torch.zeros(4, 64)]},
            "sibling 0: the output must be",
        ),
        (
            {"bs": [torch.zeros(70, 12), torch.zeros(33, 8), torch.zeros(64, 24).half()]},
            "sibling 2: the output must be",
        ),
        ({"gate": torch.zeros(4, dtype=torch.bool, device="meta")}, "all tensors must be on cpu"),
        ({"as_": [torch.zeros(r, H, requires_grad=True) for r in RANKS]}, "no backward"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    outs, x, gate, as_, bs, scales = draw(4)
    arguments = {"outs": outs, "x": x, "gate": gate, "as_": as_, "bs": bs, "scale": scales}
    before = [y.clone() for y in outs]
    with pytest.raises(ValueError, match=r"^gated_lora") as raised:
        gated_lora(**{**arguments, **change})
    assert message in str(raised.value)
    assert all(map(torch.equal, outs, before))
