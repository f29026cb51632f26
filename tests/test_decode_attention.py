"""Decode attention against a loop over rows, heads and keys in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mtpkern.kernels.decode_attention import decode_attention, decode_attention_reference

FORMS = [decode_attention, decode_attention_reference]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

# What a slot may hold that no row sees.
STALE = 1e4

Form = Callable[..., Tensor]


@dataclass
class Case:
    """Packed rows over caches in which what no row may look at would show: see make_case."""

    query: Tensor
    k_cache: Tensor
    v_cache: Tensor
    seq: Tensor
    slot: Tensor
    start: Tensor
    max_rows: int

    def run(self, form: Form, **options: object) -> Tensor:
        options.setdefault("scale", self.query.shape[-1] ** -0.5)
        caches = [self.k_cache.clone(), self.v_cache.clone()]
        for cache in caches:
            cache[:, :, :-1] = cache[:, :, :-1].nan_to_num(STALE)
        return form(
            self.query,
            *caches,
            self.seq,
            self.slot,
            self.start,
            max_rows=self.max_rows,
            **options,
        )


def make_case(
    row_slots: list[list[int]],
    *,
    unused: int = 2,
    capacity: int = 21,
    heads: int = 4,
    groups: int = 2,
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    seed: int = 0,
) -> Case:
    """One list of slots per sequence, in order. The trash slot holds NaN; other slots that no row of a sequence sees
    hold large numbers, as finite as what decoding leaves there.
    """
    generator = torch.Generator().manual_seed(seed)
    seq = [b for b, slots in enumerate(row_slots) for _ in slots]
    slot = [c for slots in row_slots for c in slots]
    start = [sum(len(slots) for slots in row_slots[:b]) for b in range(len(row_slots) + 1)]
    shape = (len(row_slots), heads // groups, capacity + 1, dim)
    k_cache, v_cache = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    for b, slots in enumerate(row_slots):
        seen = {j for c in slots for j in range(max(0, c - (window or capacity) + 1), c + 1)}
        unseen = [j for j in range(capacity) if j not in seen]
        k_cache[b, :, unseen] = 100.0
        v_cache[b, :, unseen] = 100.0
    k_cache[:, :, capacity] = torch.nan
    v_cache[:, :, capacity] = torch.nan
    query = torch.randn(len(seq) + unused, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    query[len(seq) :] = torch.nan  # an unused row may hold anything
    return Case(
        query,
        k_cache,
        v_cache,
        torch.tensor(seq + [len(row_slots) - 1] * unused, dtype=torch.int64),
        torch.tensor(slot + [capacity] * unused, dtype=torch.int64),
        torch.tensor(start, dtype=torch.int64),
        max((len(slots) for slots in row_slots), default=0),
    )


def attend(
    case: Case,
    dtype: torch.dtype,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Every row by itself over exactly the keys that it sees, in `dtype`: the truth in float64, "eager" elsewhere."""
    R, Hq, D = case.query.shape
    groups = Hq // case.k_cache.shape[1]
    capacity = case.k_cache.shape[2] - 1
    out = torch.zeros(R, Hq, D, dtype=dtype)
    for r in range(R):
        b, c = int(case.seq[r]), int(case.slot[r])
        if c == capacity:
            continue
        lower = 0 if window is None else max(0, c - window + 1)
        for h in range(Hq):
            keys = case.k_cache[b, h // groups, lower : c + 1].to(dtype)
            values = case.v_cache[b, h // groups, lower : c + 1].to(dtype)
            score = (keys @ case.query[r, h].to(dtype)) * (D**-0.5 if scale is None else scale)
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            if sinks is not None:
                score = torch.cat([score, sinks[h : h + 1].to(dtype)])
            out[r, h] = score.softmax(0)[: len(keys)] @ values
    return out


def compare(form: Form, case: Case, **options: object) -> None:
    poisoned = [x.clone() for x in (case.query, case.k_cache, case.v_cache)]
    out = case.run(form, **options)
    assert out.dtype == case.query.dtype
    assert out.shape == case.query.shape
    truth = attend(case, torch.float64, **options)
    eager = attend(case, case.query.dtype, **options)
    error, eager_error = ((x.double() - truth).abs().max().item() if x.numel() else 0.0 for x in (out, eager))
    tiny = {torch.float64: 1e-13, torch.float32: 1e-6}.get(case.query.dtype, 1e-4)
    assert error <= 2 * eager_error + tiny
    assert not out[case.slot == case.k_cache.shape[2] - 1].any()
    for x, before in zip((case.query, case.k_cache, case.v_cache), poisoned):
        assert torch.equal(x.nan_to_num(), before.nan_to_num())


RAGGED = [[7, 8, 9, 10], [0], [14, 15, 16, 17, 18, 19, 20], [], [3, 4]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
def test_ragged_batches(form: Form, dtype: torch.dtype, batch: int) -> None:
    compare(form, make_case(RAGGED[:batch], dtype=dtype, seed=batch))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_grouped_heads(form: Form, dtype: torch.dtype, groups: int) -> None:
    compare(form, make_case(RAGGED[:3], heads=8, groups=groups, dim=16, dtype=dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128])
def test_head_dimensions(form: Form, dtype: torch.dtype, dim: int) -> None:
    compare(form, make_case(RAGGED[:3], heads=2, groups=2, dim=dim, dtype=dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [1, 2, 3, 6, 21, 500])
def test_window_also_below_the_number_of_rows(form: Form, window: int) -> None:
    # The third sequence has seven rows: with a window below that, its later rows do not see its first.
    compare(form, make_case(RAGGED, window=window), window=window)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("scale", "window", "softcap", "sink"),
    [
        (0.5, None, None, None),
        (None, None, 0.7, None),
        (None, None, None, 0.0),
        (None, None, None, 30.0),
        (None, None, None, -30.0),
        (0.5, 4, 2.0, 1.0),
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
    assert case.run(form).flatten().tolist() == pytest.approx([8.0, 5.0, 0.0])
    # A sink of ln 4 halves the second row's weights and leaves a fifth of the first row's.
    sinks = torch.tensor([math.log(4)])
    assert case.run(form, sinks=sinks).flatten().tolist() == pytest.approx([8 / 5, 2.5, 0.0])


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
