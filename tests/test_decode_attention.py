"""Decode attention against a loop over rows, heads and keys in float64."""

import math
from typing import Any

import pytest
import torch

from mtpkern.kernels.decode_attention import _is_aligned, decode_attention, decode_attention_triton
from support.attended import RAGGED, Case, Form, compare, make_case

KERNEL = pytest.param(decode_attention_triton, marks=pytest.mark.kernel)


FORMS = [decode_attention, KERNEL]


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def forms_with(dtypes: list[torch.dtype]) -> list[Any]:
    """Pairs of form and dtype. The kernel has no float64."""
    torch_forms = [pytest.param(decode_attention, dtype) for dtype in dtypes]
    kernels = [
        pytest.param(decode_attention_triton, dtype, marks=pytest.mark.kernel)
        for dtype in dtypes
        if dtype != torch.float64
    ]
    return [*torch_forms, *kernels]


@pytest.mark.parametrize(("form", "dtype"), forms_with(DTYPES))
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
def test_ragged_batches(form: Form, dtype: torch.dtype, batch: int) -> None:
    compare(form, make_case(RAGGED[:batch], dtype=dtype, seed=batch))


@pytest.mark.parametrize("has", [False, True, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_with_16_bit_products_and_without(
    dtype: torch.dtype, has: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The torch form on either kind of processor, whichever this one is."""
    asked = []
    monkeypatch.setattr("mtpkern.kernels.form.has_products", lambda dtype: asked.append(dtype) or has)
    compare(decode_attention, make_case(RAGGED, dtype=dtype))
    assert asked == [dtype]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("groups", "dtype"),
    [*((n, torch.float32) for n in (1, 2, 4, 8)), (4, torch.float16), (8, torch.bfloat16)],
)
def test_grouped_heads(form: Form, dtype: torch.dtype, groups: int) -> None:
    compare(form, make_case(RAGGED[:3], heads=8, groups=groups, dim=16, dtype=dtype))


@pytest.mark.parametrize(("form", "dtype"), forms_with([torch.float16, torch.bfloat16, torch.float32]))
@pytest.mark.parametrize("dim", [8, 32, 64, 80, 96, 128, 256])
def test_head_dimensions(form: Form, dtype: torch.dtype, dim: int) -> None:
    compare(form, make_case(RAGGED[:3], heads=2, groups=2, dim=dim, dtype=dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [1, 2, 3, 6, 21, 500])
def test_window_also_below_the_number_of_rows(form: Form, window: int) -> None:
    # The third sequence has seven rows: with a window below that, its later rows do not see its first.
    compare(form, make_case(RAGGED, window=window), window=window)


ONE_BY_ONE = [
    (0.5, None, None, None),
    (None, None, 0.7, None),
    (None, None, None, 0.0),
    (None, None, None, 30.0),
    (None, None, None, -30.0),
]


@pytest.mark.parametrize(
    ("form", "dtype", "scale", "window", "softcap", "sink"),
    [
        pytest.param(*pair.values, *options, marks=pair.marks)
        for pair in forms_with(DTYPES)
        for options in [(0.5, 4, 2.0, 1.0), *(ONE_BY_ONE if torch.float32 in pair.values else [])]
    ],
)
def test_scale_softcap_and_sinks(
    form: Form,
    dtype: torch.dtype,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sink: float | None,
) -> None:
    case = make_case(RAGGED, heads=4, groups=2, dtype=dtype, window=window)
    sinks = None if sink is None else sink + torch.arange(4).to(dtype)
    options = {"window": window, "softcap": softcap, "sinks": sinks}
    if scale is not None:
        options["scale"] = scale
    compare(form, case, **options)


@pytest.mark.parametrize("form", FORMS)
def test_by_hand(form: Form) -> None:
    # Scores 0 and ln 3 at the second row: weights 1/4 and 3/4. The first row sees its own slot only.
    case = make_case([[0, 1]], heads=1, groups=1, dim=1, capacity=2, unused=1)
    case.query[:2] = 1.0
    case.k_cache[0, 0, :2, 0] = torch.tensor([0.0, math.log(3)])
    case.v_cache[0, 0, :2, 0] = torch.tensor([8.0, 4.0])
    assert case.run(form).flatten().tolist() == pytest.approx([8.0, 5.0, 0.0], rel=1e-5)
    # A sink of ln 4 halves the second row's weights and leaves a fifth of the first row's.
    sinks = torch.tensor([math.log(4)])
    assert case.run(form, sinks=sinks).flatten().tolist() == pytest.approx([8 / 5, 2.5, 0.0], rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_sequence_do_not_depend_on_the_others(form: Form) -> None:
    # Rows of a sequence stand anywhere in the pack; the same row alone gives the same output.
    case = make_case(RAGGED)
    out = case.run(form)
    for b, slots in enumerate(RAGGED):
        rows = slice(int(case.start[b]), int(case.start[b + 1]))
        alone = Case(
            case.query[rows],
            case.k_cache[b : b + 1],
            case.v_cache[b : b + 1],
            torch.zeros(len(slots), dtype=torch.int64),
            case.slot[rows],
            torch.tensor([0, len(slots)]),
            max(1, len(slots)),
        )
        torch.testing.assert_close(alone.run(form), out[rows], rtol=1e-5, atol=1e-5)


NO_ROWS: list[list[int]] = []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "slots",
    [
        pytest.param([NO_ROWS, [7, 8, 9], NO_ROWS], id="one in the middle"),
        pytest.param([NO_ROWS, [7, 8, 9], NO_ROWS, [4], NO_ROWS], id="two near each other"),
        pytest.param([[7, 8, 9], NO_ROWS, NO_ROWS, NO_ROWS, NO_ROWS, [4, 5]], id="two far apart"),
    ],
)
def test_sequences_without_rows_are_not_looked_at(form: Form, slots: list[list[int]]) -> None:
    case = make_case(slots)
    compare(form, case)
    compare(form, case, window=2)
    compare(form, case, sinks=torch.arange(case.query.shape[1]).float())


@pytest.mark.parametrize("form", FORMS)
def test_more_room_than_rows_changes_nothing(form: Form) -> None:
    case = make_case(RAGGED)
    out = case.run(form)
    case.max_rows = 31
    torch.testing.assert_close(case.run(form), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_large_scores_do_not_overflow(form: Form) -> None:
    case = make_case(RAGGED[:3])
    case.query *= 1e4
    compare(form, case)


@pytest.mark.parametrize("form", FORMS)
def test_strided_query_and_cache(form: Form) -> None:
    case = make_case(RAGGED)
    case.query = case.query.transpose(0, 1).contiguous().transpose(0, 1)
    case.k_cache = case.k_cache.transpose(1, 2).contiguous().transpose(1, 2)
    assert not case.query.is_contiguous()
    assert not case.k_cache.is_contiguous()
    compare(form, case)


@pytest.mark.parametrize("form", FORMS)
def test_strided_keys_and_values(form: Form) -> None:
    """As in a model, heads first; halves of one projection; and in no order that any model has."""
    case = make_case(RAGGED)
    heads_first, values = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in case.new())
    compare(form, case, key=heads_first, value=values)
    key, value = torch.cat(case.new(), dim=-1).chunk(2, dim=-1)
    assert not key.is_contiguous()
    compare(form, case, key=key, value=value)
    compare(form, case, key=key.transpose(1, 2).contiguous().transpose(1, 2))


@pytest.mark.parametrize("form", FORMS)
def test_keys_that_are_not_aligned(form: Form) -> None:
    """They begin an element later than memory does."""
    case = make_case(RAGGED)
    case.k_cache, case.v_cache, key, value = map(_moved, (case.k_cache, case.v_cache, *case.new()))
    assert not any(map(_is_aligned, (case.k_cache, case.v_cache, key, value)))
    compare(form, case, key=key, value=value)


def _moved(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


def test_what_is_said_to_be_aligned_is() -> None:
    """Or a GPU reads elsewhere, or faults: of the first element, and of every line's."""
    x = torch.empty(4, 3, 9, 16, dtype=torch.bfloat16)
    for aligned in (x, x[:, :, 1:], x[..., :5], x[:1].expand(4, -1, -1, -1), x.new_empty(4, 72), x.float()[..., :4]):
        assert _is_aligned(aligned)
    for not_aligned in (_moved(x), x.new_empty(4, 3, 20), x[..., 1:], x.float()[..., 2:]):
        assert not _is_aligned(not_aligned)


@pytest.mark.parametrize("form", FORMS)
def test_only_unused_rows(form: Form) -> None:
    case = make_case([[], []], unused=3)
    case.max_rows = 5
    assert not case.run(form).any()


@pytest.mark.parametrize("form", FORMS)
def test_a_row_sees_its_own_slot_and_none_behind_it(form: Form) -> None:
    case = make_case([[5, 6, 7]], unused=0)
    out = case.run(form)
    for changed in (case.k_cache, case.v_cache):
        before = changed[0, :, 6].clone()
        changed[0, :, 6] += 1
        differs = (case.run(form) != out).flatten(1).any(1).tolist()
        changed[0, :, 6] = before
        assert differs == [False, True, True]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [1, 20])
def test_values_have_a_width_of_their_own(form: Form, width: int) -> None:
    case = make_case(RAGGED)
    out = case.run(form)
    case.v_cache = case.v_cache[..., :width]
    torch.testing.assert_close(case.run(form), out[..., :width], rtol=1e-5, atol=1e-6)
