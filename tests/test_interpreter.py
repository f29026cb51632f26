"""Triton's interpreter as support/interpreter.py teaches it: what the tests of the kernels lean on."""

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
def _dot_kernel(a_ptr, b_ptr, y_ptr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    o_m, o_k, o_n = tl.arange(0, M)[:, None], tl.arange(0, K), tl.arange(0, N)[None, :]
    p_y = y_ptr + o_m * N + o_n
    tl.store(
        p_y, tl.dot(tl.load(a_ptr + o_m * K + o_k[None, :]), tl.load(b_ptr + o_k[:, None] * N + o_n), tl.load(p_y))
    )


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("M", "K", "N"), [(16, 16, 16), (32, 128, 16), (64, 16, 64)])
def test_products_are_summed_in_order(dtype: torch.dtype, M: int, K: int, N: int) -> None:
    """To the bit, on every processor: no product is rounded by its row's place in the tile."""
    generator = torch.Generator().manual_seed(0)
    a, b, y = (torch.randn(*shape, generator=generator) for shape in ((M, K), (K, N), (M, N)))
    a, b = a.to(dtype), b.to(dtype)
    expected = a[:, :1].float() * b[:1].float()
    for k in range(1, K):
        expected += a[:, k : k + 1].float() * b[k : k + 1].float()
    expected += y
    _dot_kernel[(1,)](a, b, y, M=M, K=K, N=N)
    assert torch.equal(y, expected)


def test_other_arithmetic_is_refused() -> None:
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="arithmetic in bfloat16"):
        _double_kernel[(1,)](x, N=16)
    with pytest.raises(Exception, match="reductions in bfloat16"):
        _sum_kernel[(1,)](x, x, N=16)


@triton.jit
def _offset_kernel(x_ptr, y_ptr, stride, BACK: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    far = o * stride if BACK == 0 else o - stride - BACK
    tl.store(y_ptr + o, tl.load(x_ptr + o) + far)


@pytest.mark.parametrize(("stride", "back"), [(1 << 29, 0), (1 << 30, 1 << 30)])
def test_integers_that_overflow_are_an_error(stride: int, back: int) -> None:
    """As offsets do that should have been 64 bits wide."""
    x, y = torch.zeros(4, dtype=torch.int32), torch.empty(4, dtype=torch.int64)
    _offset_kernel[(1,)](x, y, stride - 1, BACK=back, N=4)
    assert y.tolist() == [o * (stride - 1) if back == 0 else o - stride + 1 - back for o in range(4)]
    with pytest.raises(Exception, match=f"{'sub' if back else 'mul'} overflows"):
        _offset_kernel[(1,)](x, y, 2 * stride - 1 if back == 0 else stride + 5, BACK=back, N=4)


@triton.jit
def _mixed_kernel(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr):
    o_m, o_n = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + o_m * N + o_n)
    most = tl.max(x, 1)[:, None]
    y = tl.where(x == most, x / 2, (x - most) * 2) + o_m // 2 + (o_n % 3).to(tl.float32) + 1
    tl.store(y_ptr + o_m * N + o_n, y)


def test_types_and_shapes_are_what_they_were() -> None:
    """Blocks of one shape and of several, scalars, integers beside floats, products, quotients and remainders."""
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).half()
    y = torch.empty(4, 8, dtype=torch.float32)
    _mixed_kernel[(1,)](x, y, M=4, N=8)
    wide, most = x.float(), x.float().amax(1, keepdim=True)
    expected = torch.where(wide == most, wide / 2, (x - most.half()).float() * 2)
    expected += torch.arange(4)[:, None] // 2 + torch.arange(8)[None] % 3 + 1
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
