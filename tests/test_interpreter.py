"""bfloat16 in Triton's interpreter, as conftest.py teaches it: what the tests of the kernels lean on."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU, not in the interpreter")


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(y_ptr + o, tl.load(x_ptr + o).to(y_ptr.dtype.element_ty))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, y_ptr, N: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(y_ptr + o, tl.dot(tl.load(a_ptr + o), tl.load(b_ptr + o)))


@triton.jit
def _double_kernel(x_ptr, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(x_ptr + o, tl.load(x_ptr + o) + tl.load(x_ptr + o))


@triton.jit
def _sum_kernel(x_ptr, y_ptr, N: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, N)), 0))


@pytest.mark.parametrize("wide", [torch.float32, torch.float16, torch.float64, torch.int32], ids=str)
def test_casts_are_those_of_torch(wide: torch.dtype) -> None:
    special = [0.0, -0.0, 1.0, -3.0, 257.0, 258.0, 259.0, 0.1, torch.inf, -torch.inf, torch.nan, 1e-8]
    numbers = special if wide.is_floating_point else [0.0, 1.0, -3.0, 257.0, 258.0, 259.0, 1e6, -1e6]
    x = torch.tensor((numbers * 2)[:16]).to(wide)
    narrow, back = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x)
    _cast_kernel[(1,)](x, narrow, N=16)
    _cast_kernel[(1,)](narrow, back, N=16)
    torch.testing.assert_close(narrow, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, x.bfloat16().to(wide), rtol=0, atol=0, equal_nan=True)


def test_products_are_those_of_the_numbers() -> None:
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, y, N=16)
    torch.testing.assert_close(y, a.float() @ b.float())


def test_other_arithmetic_is_refused() -> None:
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="arithmetic in bfloat16"):
        _double_kernel[(1,)](x, N=16)
    with pytest.raises(Exception, match="reductions in bfloat16"):
        _sum_kernel[(1,)](x, x, N=16)
