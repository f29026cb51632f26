"""Linear layers with few rows: a product whose time is that of reading the weight.

    y = x W^T (+ bias)

Shapes   x [..., K], R rows in all;  weight [N, K], its rows contiguous, any stride between them;  bias [N] or None
Traffic  the weight once, x once a tile of N from L2 (R / BLOCK_N of the weight), partial sums 8 * SPLITS * R * N bytes
Rounding sums in float32, with bias, rounded once
Bits     a row's are the same whatever its company: which sums are made, and in which order, follows from N and K

The floor is the weight's bytes: of Qwen3-4B's q, k, v 31 MB, o 21, gate and up 100, down 50. What keeps a product above
it, and what is done about it here:

- Bytes under way. Some TB/s at a latency of 1 us want MB in flight, 36 KB a processor: loads run five blocks of 16 KB
  ahead, and two programs share a processor.
- Processors without work. N / 64 is 40 (o, down) to 304 (gate, up), so K is split until there are 80 programs. Each
  further split costs more in sums than it brings, and tiles of 16 or 32 of N read x too often.
- The end. The program of a tile that arrives last adds the tile's sums up, in order, so that no second launch is
  needed. It knows that it is the last from a counter, which it sets back to 0. A barrier stands between the stores of
  all of a program's threads and the one thread's count (the compiler puts none there), and the count has acquire and
  release semantics: what other programs stored is seen.

The weight is the side of the product that has many rows, so 64 of N fill wgmma's 64 and x's rows, padded to 16 or 32,
its other side. Weights go through shared memory past L1 and are the first to leave L2, x the last.

What it reaches on an H200, beside torch, and what did not help there: bench/results/h200/linear.md and docs/log.md.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Optional

import torch
from torch import Tensor
from torch.nn.functional import linear

from mtpkern.kernels.form import on_device, pdl_options
from mtpkern.kernels.op import op

# More rows than this are torch's: arithmetic counts there.
MOST_ROWS = 32
# Programs of a launch, below which K is split.
PROGRAMS = 80
# Tiles of N that may be split. Rules that split where there are more would have no use of it.
COUNTERS = 1024

if find_spec("triton"):
    import triton
    import triton.language as tl

    from mtpkern.kernels.form import gdc_wait

    @triton.jit(do_not_specialize=["R"])
    def _linear_kernel(
        x_ptr,  # [R, K]
        w_ptr,  # [N, K]
        bias_ptr,  # [N]
        y_ptr,  # [R, N]
        sums_ptr,  # [tiles, SPLITS, BLOCK_N, BLOCK_R] float32
        count_ptr,  # [tiles] int32, zeros
        s_x,
        s_w,
        s_y,
        R,
        N,
        K,
        chunk,  # of K, a program's
        HAS_BIAS: tl.constexpr,
        EVEN_K: tl.constexpr,
        SPLITS: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        PDL: tl.constexpr,
    ):
        gdc_wait(PDL)
        i_n, i_split = tl.program_id(1), tl.program_id(0)
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        # Behind the last row it is read again. N * K can pass 2^31, and so can R * N: 64 bits.
        p_w = w_ptr + tl.minimum(o_n, N - 1).to(tl.int64)[:, None] * s_w
        start = i_split * chunk
        end = tl.minimum(start + chunk, K)
        o_r = tl.arange(0, BLOCK_R).to(tl.int64)
        m_r = o_r < R
        p_x = x_ptr + o_r[:, None] * s_x
        acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        for k in range(start, end, BLOCK_K):
            o_k = k + tl.arange(0, BLOCK_K)[None, :]
            if EVEN_K:
                w = tl.load(p_w + o_k, eviction_policy="evict_first")
                x = tl.load(p_x + o_k, mask=m_r[:, None], other=0.0, eviction_policy="evict_last")
            else:
                w = tl.load(p_w + o_k, mask=o_k < K, other=0.0, eviction_policy="evict_first")
                x = tl.load(p_x + o_k, mask=m_r[:, None] & (o_k < K), other=0.0, eviction_policy="evict_last")
            acc = tl.dot(w, x.T, acc)

        last = True
        if SPLITS > 1:
            o_tile = tl.arange(0, BLOCK_N)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
            p_sums = sums_ptr + i_n.to(tl.int64) * (SPLITS * BLOCK_N * BLOCK_R) + o_tile
            tl.store(p_sums + i_split * (BLOCK_N * BLOCK_R), acc)
            tl.debug_barrier()
            last = tl.atomic_add(count_ptr + i_n, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
            if last:
                acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
                for i in tl.static_range(SPLITS):
                    # Past L1, which knows nothing of what other processors have stored.
                    acc += tl.load(p_sums + i * (BLOCK_N * BLOCK_R), cache_modifier=".cg")
                tl.store(count_ptr + i_n, 0)
        if last:
            m_n = o_n < N
            if HAS_BIAS:
                acc += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
            p_y = y_ptr + o_r[None, :] * s_y + o_n[:, None]
            tl.store(p_y, acc, mask=m_n[:, None] & m_r[None, :])


@dataclass(frozen=True)
class Tiles:
    """How a product is laid out: what a program takes of N and, at a time, of K; and in how many parts K is split.

    warps, stages   of the launch; a stage less where a block of x takes its room
    """

    BLOCK_N: int = 64
    BLOCK_K: int = 128
    SPLITS: int = 1
    warps: int = 4
    stages: int = 5


def tiles_of(N: int, K: int) -> Tiles:
    """The layout of a weight [N, K]: of those timed on an H200 the best for each product of Qwen3-4B.

    tiles_of(2560, 4096).SPLITS  # 2
    """
    splits = triton.next_power_of_2(triton.cdiv(PROGRAMS, triton.cdiv(N, Tiles.BLOCK_N)))
    # At least two blocks each.
    return Tiles(SPLITS=max(1, min(splits, 8, K // (2 * Tiles.BLOCK_K))))


def new_counters(device: torch.device) -> Tensor:
    """What `few_rows_linear` counts with, [COUNTERS] int32 zeros: it finds and leaves zeros there.

    One for each stream: launches that share it must not overlap, but as kernels/form.py lets them. Made before a
    capture, and kept as long as its graph.
    """
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel computes this product: up to MOST_ROWS rows of bfloat16 or float16, K a multiple of 16, and
    the weight's rows without gaps inside, a multiple of 16 elements apart, from a multiple of 16 bytes on.
    """
    K = weight.shape[1]
    fits = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    lies = weight.stride(1) == 1 and K % 16 == 0 and weight.stride(0) % 16 == 0 and weight.data_ptr() % 16 == 0
    return fits and lies and K > 0 and len(weight) > 0 and 0 < x.numel() <= MOST_ROWS * K


@op(fake=lambda x, weight, bias, counters: x.new_empty(*x.shape[:-1], len(weight)), float64=False)
def few_rows_linear(x: Tensor, weight: Tensor, bias: Optional[Tensor], counters: Tensor) -> Tensor:  # noqa: UP045
    """x [..., K] times weight [N, K], plus bias [N]: [..., N], as `torch.nn.functional.linear`.

    counters: of `new_counters`, for this stream; zeros before and after.

    What the kernel does not take (see `takes`) is torch's product. There is no backward.

    >>> x, weight = torch.ones(2, 3), torch.tensor([[1.0, 2.0, 3.0]])
    >>> few_rows_linear(x, weight, None, new_counters(x.device))
    tensor([[6.],
            [6.]])
    """
    return linear(x, weight, bias)


@few_rows_linear.kernel
def few_rows_linear_triton(x, weight, bias, counters, tiles=None):
    """One launch; `tiles` other than those of `tiles_of` are for a comparison."""
    if not takes(x, weight):
        return linear(x, weight, bias)
    N, K = weight.shape
    tiles = tiles or tiles_of(N, K)
    rows = x.reshape(-1, K)
    if rows.stride(1) != 1 or rows.stride(0) % 16 or rows.data_ptr() % 16:
        rows = rows.clone(memory_format=torch.contiguous_format)
    R = len(rows)
    n = triton.cdiv(N, tiles.BLOCK_N)
    chunk = tiles.BLOCK_K * triton.cdiv(K, tiles.BLOCK_K * tiles.SPLITS)
    splits = triton.cdiv(K, chunk)
    if splits > 1 and n > len(counters):
        raise ValueError(
            f"few_rows_linear: {n} tiles of N = {N} in {splits} parts want as many counters, there are "
            f"{len(counters)}; take new_counters(device), and no splits for so many tiles"
        )
    BLOCK_R = max(16, triton.next_power_of_2(R))
    y = rows.new_empty(R, N)
    sums = rows.new_empty(n * splits * tiles.BLOCK_N * BLOCK_R, dtype=torch.float32) if splits > 1 else y
    # So that two programs share a processor's memory all the same.
    stages = tiles.stages - (BLOCK_R == 32 and tiles.stages > 4)
    tensors = rows, weight, weight if bias is None else bias, y, sums, counters
    forms = {"HAS_BIAS": bias is not None, "EVEN_K": K % tiles.BLOCK_K == 0, "SPLITS": splits}
    sizes = {"BLOCK_R": BLOCK_R, "BLOCK_N": tiles.BLOCK_N, "BLOCK_K": tiles.BLOCK_K, "num_warps": tiles.warps}
    sizes["num_stages"] = 2 if torch.version.hip else stages
    with on_device(x):
        _linear_kernel[(splits, n)](
            *(*tensors, rows.stride(0), weight.stride(0), y.stride(0), R, N, K, chunk),
            **forms,
            **sizes,
            **pdl_options(x.device),
        )
    return y.view(*x.shape[:-1], N)
