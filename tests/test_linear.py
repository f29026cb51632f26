"""Linear layers with few rows against float64; a row's bits are its own, and counters are zeros again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtpkern.kernels import linear as module
from mtpkern.kernels.linear import COUNTERS, MOST_ROWS, Tiles, few_rows_linear, few_rows_linear_triton, new_counters

CPU = torch.device("cpu")
TRITON = pytest.param(few_rows_linear_triton, marks=pytest.mark.kernel)
FORMS = [few_rows_linear, TRITON]
DTYPES = [torch.float16, torch.bfloat16]

Form = Callable[..., Tensor]

# Uninitialised memory is NaN, so that reading what nobody has written shows.
pytestmark = [pytest.mark.usefixtures("interpreter")] if not torch.cuda.is_available() else []


def draw(
    R: int, N: int, K: int, dtype: torch.dtype = torch.bfloat16, *, bias: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [R, K], a weight [N, K] and perhaps a bias [N]."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, b = (torch.randn(*shape, generator=generator) for shape in ((R, K), (N, K), (N,)))
    return x.to(dtype), (weight * K**-0.5).to(dtype), b.to(dtype) if bias else None


def truth(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def run(form: Form, x: Tensor, weight: Tensor, bias: Tensor | None = None, tiles: Tiles | None = None) -> Tensor:
    """The product; what it was made of is as it was, and the counters are."""
    counters, before = new_counters(CPU), [t.clone() for t in (x, weight)]
    y = form(x, weight, bias, counters, **({"tiles": tiles} if tiles else {}))
    assert not counters.any()
    assert all(torch.equal(t, was) for t, was in zip((x, weight), before))
    assert y.dtype == x.dtype
    return y


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def compare(form: Form, x: Tensor, weight: Tensor, bias: Tensor | None = None, tiles: Tiles | None = None) -> Tensor:
    """Within what rounding the result once costs, and a little for the sums."""
    y, right = run(form, x, weight, bias, tiles), truth(x, weight, bias)
    assert y.shape == right.shape
    assert rms(y.double() - right) <= 2 * rms(right.to(x.dtype).double() - right) + 1e-6
    return y


def small(splits: int = 1, **options: Any) -> Tiles:
    """Tiles that a small weight has several of."""
    return Tiles(**{"BLOCK_N": 16, "BLOCK_K": 32, "SPLITS": splits, **options})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("R", [1, 2, 16, 17, MOST_ROWS, MOST_ROWS + 1])
def test_equals_float64(form: Form, R: int) -> None:
    compare(form, *draw(R, 67, 272, bias=R % 2 == 0, seed=R))


@pytest.mark.parametrize("form", [TRITON])
@pytest.mark.parametrize("splits", [1, 2, 3, 8])
@pytest.mark.parametrize(("N", "K"), [(1, 16), (17, 48), (61, 160), (32, 256)])
def test_sizes_and_splits(form: Form, N: int, K: int, splits: int) -> None:
    """Ragged tiles, ragged blocks, parts that are shorter than others and parts that would be empty."""
    compare(form, *draw(5, N, K, bias=N == 61), tiles=small(splits))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_twice_the_same_dtype_eager(form: Form, dtype: torch.dtype) -> None:
    error = eager = 0.0
    for seed in range(2):
        x, weight, bias = draw(15, 70, 1040, dtype, bias=True, seed=seed)
        right = truth(x, weight, bias)
        error += rms(run(form, x, weight, bias).double() - right) ** 2
        eager += rms(torch.nn.functional.linear(x, weight, bias).double() - right) ** 2
    assert error**0.5 <= 2 * eager**0.5


@pytest.mark.parametrize("form", [TRITON])
@pytest.mark.parametrize(("N", "K"), [(40, 528), (70, 144)])
def test_a_row_has_the_same_bits_whatever_its_company(form: Form, N: int, K: int) -> None:
    """And the same again. Each product's terms cancel: nothing is left but the rounding of sums, in their order."""
    x, weight, _ = draw(MOST_ROWS, N, K)
    x[:, K // 2 :], weight[:, K // 2 :] = -x[:, : K // 2], weight[:, : K // 2]
    whole = run(form, x, weight)
    assert whole.count_nonzero() > whole.numel() // 2
    for R in (1, 15, 16, 17, 24):
        some = x[8 : 8 + R]
        assert torch.equal(run(form, some, weight), whole[8 : 8 + R])
    assert torch.equal(run(form, x.flip(0), weight), whole.flip(0))
    assert torch.equal(run(form, x, weight), whole)


@pytest.mark.parametrize("form", FORMS)
def test_strides(form: Form) -> None:
    """A weight that is a part of another, rows that lie apart, more dimensions; NaN all around."""
    x, weight, bias = draw(6, 37, 80, bias=True)
    wide = torch.full((37, 128), torch.nan, dtype=x.dtype)
    wide[:, 16:96] = weight
    apart = torch.full((2, 3, 96), torch.nan, dtype=x.dtype)
    apart[..., :80] = x.view(2, 3, 80)
    y = run(form, apart[..., :80], wide[:, 16:96], bias)
    assert y.shape == (2, 3, 37)
    torch.testing.assert_close(y.view(6, 37), compare(form, x, weight, bias), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "change",
    [
        lambda x, w: (x.float(), w.float()),
        lambda x, w: (x.double(), w.double()),
        lambda x, w: (x[:, :30], w[:, :30]),
        lambda x, w: (x[:, 1:17], w[:, 1:17]),
        lambda x, w: (x, w.T.contiguous().T),
        lambda x, w: (x[:0], w),
        lambda x, w: (x, w[:0]),
        lambda x, w: (x.repeat(50, 1), w),
    ],
    ids=["float32", "float64", "K", "alignment", "columns", "no rows", "no outputs", "many rows"],
)
def test_what_the_kernel_does_not_take_is_the_product_of_torch(
    form: Form, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_linear_kernel", None)
    x, weight = change(*draw(3, 20, 64)[:2])
    torch.testing.assert_close(run(form, x, weight), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("form", [TRITON])
def test_more_tiles_than_counters(form: Form) -> None:
    """Are an error where they are split, none where not."""
    N = 16 * COUNTERS + 1
    x, weight = torch.ones(1, 64, dtype=torch.float16), torch.ones(64, dtype=torch.float16).expand(N, 64)
    with pytest.raises(ValueError, match=r"1025 tiles of N = 16385 in 2 parts .* there are 1024"):
        form(x, weight, None, new_counters(CPU), tiles=small(2))
    counts = new_counters(CPU)
    assert form(x, weight, None, counts, tiles=small(1, BLOCK_N=1024, BLOCK_K=64, stages=1)).eq(64).all()


@pytest.mark.parametrize("form", [TRITON])
def test_offsets_pass_31_bits(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight whose rows lie 2^26 apart: the last begins behind 2^31."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # of 4 GB, 1 kB is used
    K, stride = 16, 1 << 26
    reach = 32 * stride + K
    weight = torch.empty(reach, dtype=torch.bfloat16).as_strided((33, K), (stride, 1))
    x, drawn, _ = draw(2, 33, K)
    weight.copy_(drawn)
    compare(form, x, weight)


@pytest.mark.skipif(not module.find_spec("triton"), reason="Triton is not installed")
def test_the_layout_follows_from_the_weight_alone() -> None:
    """And large weights are split into no more tiles than are counted."""
    for N in (1, 192, 576, 1536, 2560, 6144, 19_456, 151_936):
        for K in (16, 576, 2560, 9728):
            tiles = module.tiles_of(N, K)
            assert tiles.SPLITS == 1 or -(-N // tiles.BLOCK_N) <= COUNTERS
            assert 1 <= tiles.SPLITS <= max(1, K // (2 * tiles.BLOCK_K))
    splits = [module.tiles_of(N, K).SPLITS for N, K in ((6144, 2560), (2560, 4096), (19_456, 2560), (2560, 9728))]
    assert splits == [1, 2, 1, 2]
