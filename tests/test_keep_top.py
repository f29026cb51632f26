"""Keep top against a sort in float64: what stays, what stays of equal ones, and rows that ask for nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtpkern.kernels.keep_top import BLOCK, keep_top_k, keep_top_k_triton, keep_top_p, keep_top_p_triton

Form = Callable[[Tensor, Tensor], Tensor]
kernel = pytest.mark.kernel
BY_K = [keep_top_k, keep_top_k.reference, pytest.param(keep_top_k_triton, marks=kernel)]
BY_P = [keep_top_p, keep_top_p.reference, pytest.param(keep_top_p_triton, marks=kernel)]
# With whether the number is a k: what form it is does not tell, as a kernel comes to its test in a function around it.
KERNELS = [
    pytest.param(form, by_k, marks=kernel) for form, by_k in ((keep_top_p_triton, False), (keep_top_k_triton, True))
]
EITHER = [*((form, False) for form in BY_P[:2]), *((form, True) for form in BY_K[:2]), *KERNELS]
SIZES = [(3, 1), (9, 2), (40, 31), (7, 1009), (4, BLOCK), (5, 2 * BLOCK + 7)]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def draw(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32, *, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(rows * vocabulary)
    return (torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * scale).to(dtype)


@pytest.mark.parametrize("form", BY_K)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_k_largest_stay_and_those_equal_to_the_last(form: Form, dtype: torch.dtype, size: tuple[int, int]) -> None:
    z = draw(*size, dtype)
    R, V = size
    k = torch.tensor([1, 2, 64, 50, 0, V - 1, V, V + 9])[torch.arange(R) % 8].clamp(min=0)
    found = form(z, k.float())
    for row, new, n in zip(z.double(), found.double(), k.tolist()):
        last = -torch.inf if n == 0 else row.sort(descending=True).values[min(n, V) - 1]
        assert new.equal(torch.where(row >= last, row, -torch.inf))


@pytest.mark.parametrize("form", BY_P)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_goes_has_at_most_the_rest(form: Form, dtype: torch.dtype, size: tuple[int, int]) -> None:
    z = draw(*size, dtype)
    rest = torch.tensor([0.1, 0.5, 0.9, 0.01, 0.999, 0.05])[torch.arange(size[0]) % 6]
    found = form(z, rest)
    p = z.double().softmax(-1)
    for row, weight, new, most in zip(z, p, found, rest.tolist()):
        gone = new == -torch.inf
        assert new[~gone].equal(row[~gone])
        assert row[gone].max() <= row[~gone].min() if gone.any() else not gone.any()
        # As much as may go, but for rounding in float32, and never all.
        assert weight[gone].sum() <= most + 1e-5
        stays = (~gone).sum() == 1 or weight[gone].sum() + weight[~gone].min() > most - 1e-5
        assert stays


@pytest.mark.parametrize(
    ("form", "in_order"), [*((form, False) for form in BY_P[:2]), pytest.param(keep_top_p_triton, True, marks=kernel)]
)
def test_of_equal_ones_as_many_stay_as_it_takes(form: Form, in_order: bool) -> None:
    z = torch.zeros(6, 40)
    z[1, 7], z[2, 7], z[3] = 3.0, -3.0, torch.arange(40) // 10
    rest = torch.tensor([0.5, 0.5, 0.5, 0.2, 1.0, 0.74])
    kept = form(z, rest) > -torch.inf
    p = z.double().softmax(-1)
    for row, weight, stays, most in zip(z, p, kept, rest.tolist()):
        cut = row[stays].min()
        assert stays[row > cut].all()
        assert not stays[row < cut].any()
        below = weight[row < cut].sum()
        equal = (row == cut).nonzero()[:, 0]
        n = min(int((most - below) / weight[equal[0]] + 1e-6), len(equal) - 1)
        assert stays[equal].sum() == len(equal) - n
        if in_order:
            assert not stays[equal[:n]].any()


@pytest.mark.parametrize("form", BY_P)
def test_the_ends_of_the_scale(form: Form) -> None:
    z = draw(4, 301)
    z[3, 5] = -200.0  # of no probability in float32
    found = form(z, torch.tensor([-1.0, 1.0, 1.5, 0.0]))
    assert found[0].equal(z[0])
    assert (found[1:3] > -torch.inf).sum(1).tolist() == [1, 1]
    assert (found[1:3].amax(1)).equal(z[1:3].amax(1))
    assert (found[3] == -torch.inf).nonzero().tolist() == [[5]]


@pytest.mark.parametrize(("form", "by_k"), KERNELS)
def test_banned_tokens_stay_banned_and_scores_may_lie_anywhere(form: Form, by_k: bool) -> None:
    shifts = (-1e4, 0.0, 1e4, 1e30)
    z = torch.stack([draw(1, 509)[0] * scale + shift for scale in (1e-3, 1.0, 30.0) for shift in shifts])
    z[:, ::3], z[:, 1], z[:, 2] = -torch.inf, 0.0, -0.0
    number = torch.full((len(z),), 5.0 if by_k else 0.3)
    expected = keep_top_k(z, number)
    if not by_k:
        ordered, place = z.sort(stable=True)
        gone = ordered.softmax(-1).cumsum(-1) <= number[:, None]
        expected = z.masked_fill(gone.scatter(1, place, gone), -torch.inf)
    assert form(z, number).equal(expected)


@pytest.mark.parametrize(("form", "by_k"), EITHER)
def test_faulty_rows_stay_faulty_and_leave_the_others_alone(form: Form, by_k: bool) -> None:
    z = draw(7, 67)
    number = torch.full((7,), 3.0 if by_k else 0.2)
    good = form(z, number)
    broken = z.clone()
    broken[1, 3], broken[3, 66], broken[4] = torch.nan, torch.inf, -torch.inf
    found = form(broken, number)
    assert found[[0, 2, 5, 6]].equal(good[[0, 2, 5, 6]])
    assert found[1, 3].isnan()
    assert found[3, 66] == torch.inf
    assert (found[4] == -torch.inf).all()


@pytest.mark.parametrize(("form", "by_k"), EITHER)
def test_a_row_is_cut_the_same_in_any_company_and_layout(form: Form, by_k: bool) -> None:
    z = draw(9, 301)
    number = torch.linspace(0.05, 0.9, 9)
    if by_k:
        number = (number * 100).round()
    before = z.clone()
    found = form(z, number)
    assert z.equal(before)
    for rows in ([4], [8, 0, 3], [2, 2]):
        assert form(z[rows], number[rows]).equal(found[rows])
    strided = torch.stack([z, z], 2).flatten(1)[:, ::2]
    assert form(strided, torch.stack([number, number], 1)[:, 0]).equal(found)
    assert form(z[:0], number[:0]).shape == (0, 301)
