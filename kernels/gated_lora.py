"""Gated LoRA: the low-rank update of a linear layer's outputs on the mask rows of a pass, and on no others.

    y_r += gate_r * s * (x_r A^T) B^T

Siblings are layers that read the same x (q, k, v; gate, up): one pair of launches serves them all, wherever their
matrices lie. M is the sum of their ranks. Where A lies behind the base's weights, the base's own product brings x A^T
along (mtpkern/products.py), and `gated_expand` adds the rest, in one launch.

Shapes   x [R, H];  gate [R] bool, int8 or uint8;  for each sibling i: y_i [R, N_i], a_i [r_i, H], b_i [N_i, r_i], s_i;
         low_i [R, r_i], which is x a_i^T
Traffic  A and B once, x and y in the gated rows, and partial sums of x A^T, at most 64 * M bytes a gated row: up to 32
         rows the bytes of A and B (at rank 32 1.6 % of Qwen3-4B's weights) and the latency of two launches, or of one
Gate     a row with gate 0 is neither read nor written, so that nothing in A, B or x can reach it
Rounding sums in float32; between the products x A^T is rounded to B's dtype, or to y's where it comes along; the sum
         with y once
Source   arXiv 2507.11851 (gated LoRA), 2604.11035 (residual adapters on mask rows)

The first launch (shrink) makes x A^T. A pass has few rows and A has few, so H is split among programs, in chunks that
follow from H alone; the second launch (expand) adds their sums up in order: no atomics, and a row has the same bits
whatever its company. Where rows alone fill a GPU, one program takes all chunks, in the same order. Tiles have 32 rows
whatever R, for the same reason: few enough for one sequence's 15, and 512 read A and B no more than 16 times. No tile
has columns of two siblings, so that a layer has the same bits with its siblings as by itself.

A tile without a gated row returns before it reads a weight. Gated rows are not gathered into fewer tiles, and two
launches not made one: either would take longer, by estimate (docs/log.md; bench/gated_lora.py measures).

Launches are what it costs, by estimate, not bytes (docs/log.md): 10.6 to 13.8 % of a pass of Qwen3-4B, and 5.8 to 7.4 %
where x A^T comes along.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from mtpkern.kernels.form import pdl_options, strides
from mtpkern.kernels.op import op

Tensors = Sequence[Tensor]
# Of H: the least elements of a chunk, and the most chunks.
CHUNK, CHUNKS = 256, 16
# Up to so many rows each chunk has programs of its own; above, the partial sums would take memory for nothing.
SPLIT_ROWS = 512

if find_spec("triton"):
    import triton
    import triton.language as tl

    from mtpkern.kernels.form import gdc_wait

    @triton.jit
    def _rows(gate_ptr, s_gate, R, BLOCK_R: tl.constexpr):
        """This program's rows, and which of them are gated. R * H can pass 2^31, and so can R * M: 64 bits."""
        o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        return o_r, tl.load(gate_ptr + o_r * s_gate[0], mask=o_r < R, other=0) != 0

    @triton.jit
    def _tile(i_tile, size, BLOCK: tl.constexpr):
        """Of the tiles of all siblings, which stand in one row: whether this one lies in the next, and its tiles."""
        n_tiles = tl.cdiv(size, BLOCK)
        return (i_tile >= 0) & (i_tile < n_tiles), n_tiles

    @triton.jit
    def _columns(i_tile, size, BLOCK: tl.constexpr):
        """A tile's columns, and which of them exist."""
        o = (i_tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        return o, o < size

    @triton.jit(do_not_specialize=["R"])
    def _shrink_kernel(
        x_ptr,  # [R, H]
        gate_ptr,  # [R]
        a_ptrs,  # of each sibling [r, H]
        h_ptr,  # [n, R, M], the sums of one chunk each, or of all where n = 1
        s_x,  # the strides of each, as tuples
        s_gate,
        s_as,
        s_h,
        R,
        H,
        ranks,
        chunk,
        CHUNKS: tl.constexpr,  # that this program takes
        BLOCK_R: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_H: tl.constexpr,
        PRECISION: tl.constexpr,
        PDL: tl.constexpr,
    ):
        gdc_wait(PDL)
        i_chunk = tl.program_id(2)
        o_r, gated = _rows(gate_ptr, s_gate, R, BLOCK_R)
        if tl.max(gated.to(tl.int32), 0) == 0:
            return

        o_h = tl.arange(0, BLOCK_H)
        x_ptr += o_r[:, None] * s_x[0]
        h_ptr += i_chunk.to(tl.int64) * s_h[0] + o_r[:, None] * s_h[1]

        i_tile = tl.program_id(1)
        for i_a in tl.static_range(len(a_ptrs)):
            here, n_tiles = _tile(i_tile, ranks[i_a], BLOCK_M)
            if here:
                o_m, m_m = _columns(i_tile, ranks[i_a], BLOCK_M)
                p_a = a_ptrs[i_a] + o_m[:, None] * s_as[i_a][0]
                total = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
                for i in range(i_chunk, i_chunk + CHUNKS):
                    acc = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
                    for h in range(i * chunk, tl.minimum((i + 1) * chunk, H), BLOCK_H):
                        o = (h + o_h).to(tl.int64)[None, :]
                        x = tl.load(x_ptr + o * s_x[1], mask=gated[:, None] & (o < H), other=0.0)
                        a = tl.load(p_a + o * s_as[i_a][1], mask=m_m[:, None] & (o < H), other=0.0)
                        acc = tl.dot(x.to(a.dtype), a.T, acc, input_precision=PRECISION)
                    total += acc
                tl.store(h_ptr + o_m[None, :] * s_h[2], total, mask=gated[:, None] & m_m[None, :])
            i_tile -= n_tiles
            h_ptr += ranks[i_a] * s_h[2]

    @triton.jit(do_not_specialize=["R"])
    def _expand_kernel(
        h_ptrs,  # of each sibling [n, R, r]; x A^T is the sum of the n
        gate_ptr,  # [R]
        b_ptrs,  # of each sibling [N, r]
        y_ptrs,  # of each sibling [R, N]
        scales,
        s_hs,
        s_gate,
        s_bs,
        s_ys,
        R,
        Ns,
        ranks,
        CHUNKS: tl.constexpr,  # n
        GROUP: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        PRECISION: tl.constexpr,
        PDL: tl.constexpr,
    ):
        gdc_wait(PDL)
        o_r, gated = _rows(gate_ptr, s_gate, R, BLOCK_R)
        if tl.max(gated.to(tl.int32), 0) == 0:
            return

        i_tile = tl.program_id(1)
        for i in tl.static_range(len(y_ptrs)):
            here, n_tiles = _tile(i_tile, Ns[i], BLOCK_N)
            if here:
                o_n, m_n = _columns(i_tile, Ns[i], BLOCK_N)
                m_y = gated[:, None] & m_n[None, :]
                p_y = y_ptrs[i] + o_r[:, None] * s_ys[i][0] + o_n[None, :] * s_ys[i][1]
                y = tl.load(p_y, mask=m_y, other=0.0).to(tl.float32)
                row_ptr = h_ptrs[i] + o_r[:, None] * s_hs[i][1]
                acc = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
                for k in range(0, ranks[i], BLOCK_K):
                    o_k = k + tl.arange(0, BLOCK_K)
                    m_k = o_k < ranks[i]
                    p_b = b_ptrs[i] + o_n[:, None] * s_bs[i][0] + o_k[None, :] * s_bs[i][1]
                    b = tl.load(p_b, mask=m_n[:, None] & m_k[None, :], other=0.0)
                    h = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
                    # In order, and as many at once under way as there are registers for.
                    for first in range(0, CHUNKS, GROUP):
                        for j in tl.static_range(GROUP):
                            m_h = gated[:, None] & m_k[None, :] & (first + j < CHUNKS)
                            p_h = row_ptr + (first + j) * s_hs[i][0] + o_k[None, :] * s_hs[i][2]
                            h += tl.load(p_h, mask=m_h, other=0.0).to(tl.float32)
                    acc = tl.dot(h.to(b.dtype), b.T, acc, input_precision=PRECISION)
                tl.store(p_y, y + acc * scales[i], mask=m_y)
            i_tile -= n_tiles


# Chosen by what the compiler reports (python -m mtpkern.bench.aot), not by timing.
BLOCK_R, BLOCK_M, BLOCK_N, BLOCK_K = 32, 32, 64, 32


def _chunk(H: int) -> int:
    """Elements of a chunk of H: a multiple of every block size, at most CHUNKS of them."""
    return max(CHUNK, 64 * -(-H // (64 * CHUNKS)))


def _precision(dtype: torch.dtype) -> str | None:
    """One pass of TF32 would lose half of float32's digits, three keep nearly all; AMD multiplies float32 as it is."""
    return None if dtype != torch.float32 else "ieee" if torch.version.hip else "tf32x3"


def shrink_triton(x: Tensor, gate: Tensor, as_: Sequence[Tensor]) -> Tensor:
    """x A_i^T of the gated rows, side by side, in one launch: [n, R, M] float32, to be summed over n."""
    R, H = x.shape
    ranks = tuple(len(a) for a in as_)
    n = triton.cdiv(H, _chunk(H))
    split = R <= SPLIT_ROWS
    h = x.new_empty(n if split else 1, R, sum(ranks), dtype=torch.float32)
    sizes = {
        "CHUNKS": 1 if split else n,
        "BLOCK_R": BLOCK_R,
        "BLOCK_M": BLOCK_M,
        "BLOCK_H": 128 // as_[0].element_size(),
    }
    _shrink_kernel[(triton.cdiv(R, BLOCK_R), sum(triton.cdiv(r, BLOCK_M) for r in ranks), len(h))](
        *(x, gate, tuple(as_), h, x.stride(), gate.stride(), tuple(strides(*as_)), h.stride()),
        *(R, H, ranks, _chunk(H)),
        **sizes,
        PRECISION=_precision(as_[0].dtype),
        num_stages=5,
        **pdl_options(x.device),
    )
    return h


def expand_triton(outs: Tensors, hs: Tensors, gate: Tensor, bs: Tensors, scales: Sequence[float]) -> None:
    """Add s_i * h_i B_i^T to the gated rows of each y_i in one launch; h_i [n, R, r_i], any dtype, is summed over n."""
    chunks, R, _ = hs[0].shape
    Ns, ranks = tuple(b.shape[0] for b in bs), tuple(b.shape[1] for b in bs)
    sizes = {"CHUNKS": chunks, "GROUP": min(16 // bs[0].element_size(), chunks)}
    sizes |= {"BLOCK_R": BLOCK_R, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "num_warps": 8, "num_stages": 1}
    _expand_kernel[(triton.cdiv(R, BLOCK_R), sum(triton.cdiv(N, BLOCK_N) for N in Ns))](
        *(tuple(hs), gate, tuple(bs), tuple(outs), tuple(scales)),
        *(tuple(strides(*hs)), gate.stride(), tuple(strides(*bs)), tuple(strides(*outs))),
        *(R, Ns, ranks),
        **sizes,
        PRECISION=_precision(bs[0].dtype),
        **pdl_options(gate.device),
    )


def gated_lora(
    outs: Tensors, x: Tensor, gate: Tensor, as_: Tensors, bs: Tensors, scale: float | Sequence[float]
) -> None:
    """Add the adapter of sibling layers to their outputs, in place, in the rows whose gate is not 0.

    outs: y_i [R, N_i] of each sibling, any strides; they must not overlap.
    x: what the siblings read, [R, H], in the dtype of the outputs.
    gate: [R] bool, int8 or uint8, on the device: it is read there, nobody waits for it.
    as_: A_i [r_i, H] of each sibling, all in float32 or all in the dtype of x.
    bs: B_i [N_i, r_i] of each sibling, in the dtype of the A_i.
    scale: lora_alpha / rank, one for all or one for each sibling.

    There is no backward: adapters are trained as modules. ValueError where a shape, a dtype or a device does not fit.

    >>> y, x = torch.zeros(2, 3), torch.ones(2, 4)
    >>> gated_lora([y], x, torch.tensor([False, True]), [torch.ones(1, 4)], [torch.ones(3, 1)], scale=0.5)
    >>> y
    tensor([[0., 0., 0.],
            [2., 2., 2.]])
    """
    scales = _scale_of_each("gated_lora", scale, outs=outs, as_=as_, bs=bs)
    _require_fitting("gated_lora", outs, x, gate, bs, as_=as_)
    gated_update(outs, x, gate, as_, bs, scales)


@op(mutates=["outs"], name="gated_lora", float64=False)
def gated_update(outs: Tensors, x: Tensor, gate: Tensor, as_: Tensors, bs: Tensors, scales: Sequence[float]) -> None:
    """`gated_lora`, unchecked. The torch form computes in float32, or in float64 for float64 inputs.

    On a CPU the gated rows alone are computed, where casting a narrow adapter costs less than multiplying it does.
    Elsewhere all are, because the host would have to wait for their number.
    """
    rows = gated_rows(gate)
    x = _chosen(x, rows)
    if len(x):
        _expand(outs, [x @ a.to(x.dtype).T for a in as_], gate, rows, bs, scales)


def gated_expand(outs: Tensors, lows: Tensors, gate: Tensor, bs: Tensors, scale: float | Sequence[float]) -> None:
    """The second half of `gated_lora`, where x A_i^T is there already: in the gated rows y_i += s_i * low_i B_i^T.

    outs: y_i [R, N_i] of each sibling, in place, any strides; they overlap neither each other nor the lows.
    lows: x A_i^T [R, r_i] of each sibling, any strides, in the dtype of the outputs: the base's product brings them as
        columns behind its own.
    gate, bs, scale: as `gated_lora` takes them.

    There is no backward. ValueError where a shape, a dtype or a device does not fit.
    Source: arXiv 2507.11851 (gated LoRA), 2604.11035 (residual adapters on mask rows).

    >>> weight, a, b = torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1)
    >>> both = torch.ones(2, 4) @ torch.cat([weight, a]).T
    >>> gated_expand([both[:, :3]], [both[:, 3:]], torch.tensor([False, True]), [b], scale=0.5)
    >>> both[:, :3]
    tensor([[4., 4., 4.],
            [6., 6., 6.]])
    """
    scales = _scale_of_each("gated_expand", scale, outs=outs, lows=lows, bs=bs)
    _require_fitting("gated_expand", outs, lows[0], gate, bs, lows=lows)
    expand_update(outs, lows, gate, bs, scales)


@op(mutates=["outs"], name="gated_expand", float64=False)
def expand_update(outs: Tensors, lows: Tensors, gate: Tensor, bs: Tensors, scales: Sequence[float]) -> None:
    """`gated_expand`, unchecked; the torch form computes as that of `gated_update` does."""
    rows = gated_rows(gate)
    lows = [_chosen(low, rows) for low in lows]
    if len(lows[0]):
        _expand(outs, lows, gate, rows, bs, scales)


def gated_rows(gate: Tensor) -> Tensor | slice | None:
    """The gated rows, where the host need not wait to know them; one sequence's are a slice, which costs no copy."""
    if gate.device.type != "cpu":
        return None
    rows = gate.numpy().nonzero()[0]
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows)


def _chosen(x: Tensor, rows: Tensor | slice | None) -> Tensor:
    """These rows of x, all for None, in what the torch forms compute in."""
    return (x if rows is None else x[rows]).to(torch.promote_types(x.dtype, torch.float32))


def _expand(
    outs: Tensors, lows: Tensors, gate: Tensor, rows: Tensor | slice | None, bs: Tensors, scales: Sequence[float]
) -> None:
    """Add s_i * low_i B_i^T to the gated rows of each y_i, in the dtype of the lows, which hold the chosen rows."""
    for y, low, b, scale in zip(outs, lows, bs, scales):
        before = y if rows is None else y[rows]
        after = torch.addmm(before.to(low.dtype), low, b.to(low.dtype).T, alpha=scale).to(y.dtype)
        if rows is None:
            y.copy_(torch.where(gate[:, None] != 0, after, y))
        else:
            y[rows] = after


@gated_update.kernel
def gated_lora_triton(outs, x, gate, as_, bs, scales):
    """Two launches."""
    if len(x):
        gate = gate.view(torch.uint8)
        lows = shrink_triton(x, gate, as_).split([len(a) for a in as_], dim=2)
        expand_triton(outs, lows, gate, bs, scales)


@expand_update.kernel
def gated_expand_triton(outs, lows, gate, bs, scales):
    """One launch; the type of the first tensor, the gate, does not tell that of the numbers."""
    if lows[0].dtype == torch.float64:
        expand_update.reference(outs, lows, gate, bs, scales)
    elif len(gate):
        expand_triton(outs, [low[None] for low in lows], gate.view(torch.uint8), bs, scales)


def _scale_of_each(op: str, scale: float | Sequence[float], **given: Tensors) -> list[float]:
    """One for each sibling; ValueError where there is not one of each tensor."""
    n = len(given["outs"])
    scales = [float(scale)] * n if isinstance(scale, int | float) else [float(s) for s in scale]
    numbers = [*map(len, given.values()), len(scales)]
    if numbers != [n] * 4 or not n:
        got = "{}, {}, {} and {}".format(*numbers)
        raise ValueError(f"{op}: {', '.join(given)} and scale want one entry for each sibling, got {got}")
    return scales


def _require_fitting(op, outs, x, gate, bs, *, as_=(), lows=()):
    """ValueError where a kernel would read or write what is not there, or something else than was meant.

    With A of what x [R, H] is multiplied by, or with lows, of which x is the first.
    """

    def refuse(says):
        raise ValueError(f"{op}: {says}")

    x_is, shape, half_is = ("x", "[R, H]", "A [r, H]") if as_ else ("the first low", "[R, r]", "low [R, r]")
    if x.dim() != 2:
        refuse(f"{x_is} {shape} expected, got {tuple(x.shape)}")
    R, H = x.shape
    if gate.shape != (R,) or gate.dtype not in (torch.bool, torch.uint8, torch.int8):
        refuse(f"gate must be [R] = [{R}] of bool, uint8 or int8, got {tuple(gate.shape)} of {gate.dtype}")
    dtype = (as_ or bs)[0].dtype
    if dtype not in (torch.float32, x.dtype):
        refuse(f"{'A' if as_ else 'B'} must be float32 or {x.dtype}, as {x_is} is, got {dtype}; cast the adapter")
    for i, (y, half, b) in enumerate(zip(outs, as_ or lows, bs)):
        fits = half.dim() == b.dim() == 2 and half.shape == ((b.shape[1], H) if as_ else (R, b.shape[1]))
        if not fits or y.shape != (R, b.shape[0]):
            sizes = f"H = {H} and R = {R}" if as_ else f"R = {R}"
            got = f"{tuple(half.shape)}, {tuple(b.shape)} and {tuple(y.shape)}"
            refuse(f"sibling {i}: {half_is}, B [N, r] and an output [R, N] with {sizes} expected, got {got}")
        if y.dtype != x.dtype or half.dtype != (dtype if as_ else x.dtype) or b.dtype != dtype:
            outputs, adapters = ("the output", "A and B") if as_ else ("output and low", "B")
            wanted = f"{outputs} must be {x.dtype}, as {x_is} is, {adapters} {dtype}, as the first {adapters[0]} is"
            refuse(f"sibling {i}: {wanted}, got {y.dtype}, {half.dtype} and {b.dtype}")
    tensors = (x, *as_, *lows, *outs, *bs)
    if any(t.device != x.device for t in (gate, *tensors)):
        refuse(f"all tensors must be on {x.device}, where {x_is} is")
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        refuse("there is no backward: call it under torch.no_grad(), and train the adapter as a module")
