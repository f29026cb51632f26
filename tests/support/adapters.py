"""Operands of the ops that add a gated adapter, and what they should make of them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
H = 263  # a prime, and two chunks
RANKS, WIDTHS, SCALES = (12, 8, 24), (70, 33, 64), [0.5, 2.0, -1.25]

Form = Callable[..., None]
Operands = tuple[list[Tensor], Tensor, Tensor, list[Tensor], list[Tensor], list[float]]


def draw(
    R: int,
    dtype: torch.dtype = torch.float32,
    adapter: torch.dtype | None = None,
    *,
    ranks: Sequence[int] = RANKS,
    widths: Sequence[int] = WIDTHS,
    hidden: int = H,
    seed: int = 0,
) -> Operands:
    """Outputs, x, a gate on every other row, the A, the B and the scales."""
    generator = torch.Generator().manual_seed(1000 * R + seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    adapter = adapter or dtype
    outs = [normal(R, N).to(dtype) for N in widths]
    as_ = [(normal(r, hidden) * hidden**-0.5).to(adapter) for r in ranks]
    bs = [normal(N, r).to(adapter) for N, r in zip(widths, ranks)]
    gate = torch.arange(R) % 2 == 0
    return outs, normal(R, hidden).to(dtype), gate, as_, bs, SCALES[: len(widths)]


def truth(
    outs: list[Tensor], x: Tensor, gate: Tensor, as_: list[Tensor], bs: list[Tensor], scales: list[float]
) -> list[Tensor]:
    """In float64, row by row and sibling by sibling."""
    result = [y.double() for y in outs]
    for y, a, b, scale in zip(result, as_, bs, scales):
        for r in range(len(x)):
            if gate[r]:
                y[r] += scale * (b.double() @ (a.double() @ x[r].double()))
    return result


def eager(
    outs: list[Tensor], x: Tensor, gate: Tensor, as_: list[Tensor], bs: list[Tensor], scales: list[float]
) -> list[Tensor]:
    """As a LoRA layer of peft computes it, in the dtypes at hand."""
    result = []
    for y, a, b, scale in zip(outs, as_, bs, scales):
        h = x.to(a.dtype) @ a.T
        result.append(torch.where(gate[:, None] != 0, y + ((h @ b.T) * scale).to(y.dtype), y))
    return result


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
