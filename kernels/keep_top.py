"""Keep top: of each row's scores the k largest, or the largest that have the probability p together; -inf for others.

    top-k   kept_rv = z_rv >= the k-th largest of row r
    top-p   sorted upwards, scores go while their sum of exp(z - max_v z_rv) is at most rest_r of the row's; one stays

rest is 1 - p. Rows that ask for nothing (k 0, rest negative) stay as they are, so that of one pass each row may have a
number of its own.

Shapes   z [R, V] scores;  k, rest [R] float32;  what comes back [R, V], as z
Traffic  the kernel reads z some 20 times, from the second on out of L2, and writes it once; nothing is sorted
Ties     with the k-th largest: all stay; at the cut of top-p: as many as it takes, of the kernel the last in the row
Faults   a row with a NaN or +inf, or without any finite score, stays as it is under top-p; `readout` and `sample` tell
Source   Fan, Lewis, Dauphin 2018 (top-k); Holtzman et al. 2020 (top-p); both as in transformers' warpers

The kernel looks for the score at the cut by its bits: the order of floats is that of whole numbers, once those of
negative ones are turned around. A pass over a row sums up what lies at or below three borders, which quarters the
interval: 16 or 17 of them for scores as models have. A sort of a vocabulary, by contrast, writes it, and the places,
several times.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from mtpkern.kernels.form import pdl_options
from mtpkern.kernels.op import op

BLOCK = 4096
# exp of less than this below the largest score is 0 in float32.
NOTHING = 128.0

if find_spec("triton"):
    import triton
    import triton.language as tl

    from mtpkern.kernels.form import gdc_wait

    @triton.jit
    def _key(z):
        """Whole numbers in the order of float32 scores; 0 and -0 are one."""
        bits = (z + 0.0).to(tl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)

    @triton.jit
    def _scores(p_z, s_z, o, V):
        return tl.load(p_z + o.to(tl.int64) * s_z, mask=o < V, other=-float("inf")).to(tl.float32)

    @triton.jit
    def _weights(z, o, top, V, BY_MASS: tl.constexpr):
        """What each score counts: exp(z - top), or one."""
        weight = tl.exp(z - top) if BY_MASS else tl.full(z.shape, 1.0, tl.float32)
        return tl.where(o < V, weight, 0.0)

    @triton.jit
    def _keep_top_kernel(
        z_ptr,  # [R, V]
        number_ptr,  # [R]
        out_ptr,  # [R, V]
        s_z,
        s_number,
        V,
        BY_MASS: tl.constexpr,
        NOTHING: tl.constexpr,
        BLOCK: tl.constexpr,
        PDL: tl.constexpr,
    ):
        gdc_wait(PDL)
        r = tl.program_id(0).to(tl.int64)  # R * V can pass 2^31
        number = tl.load(number_ptr + r * s_number)
        p_z, s_v = z_ptr + r * s_z[0], s_z[1]
        o_b = tl.arange(0, BLOCK)

        tops = tl.full([BLOCK], -float("inf"), tl.float32)
        for first in range(0, V, BLOCK):
            tops = tl.maximum(tops, _scores(p_z, s_v, first + o_b, V))
        top = tl.max(tops, 0)
        totals = tl.zeros([BLOCK], tl.float32)
        for first in range(0, V, BLOCK):
            o = first + o_b
            totals += _weights(_scores(p_z, s_v, o, V), o, top, V, BY_MASS)
        total = tl.sum(totals, 0)

        # Of the weights at most `rest` go. The key of the cut is above lo and at most hi.
        if BY_MASS:
            rest, asks = number * total, (number >= 0) & (total == total)
            lo = _key(top - NOTHING).to(tl.int64) - 1
        else:
            rest, asks = V - number, (number > 0) & (number < V)
            lo = tl.full([], -2147483648, tl.int64)
        hi = _key(top).to(tl.int64)
        lo = tl.where(asks, lo, hi)
        while hi - lo > 1:
            width = hi - lo
            b1, b2, b3 = lo + width // 4, lo + width // 2, lo + width // 4 + width // 2
            m1, m2, m3 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            for first in range(0, V, BLOCK):
                o = first + o_b
                z = _scores(p_z, s_v, o, V)
                key, weight = _key(z), _weights(z, o, top, V, BY_MASS)
                m1 += tl.where(key <= b1.to(tl.int32), weight, 0.0)
                m2 += tl.where(key <= b2.to(tl.int32), weight, 0.0)
                m3 += tl.where(key <= b3.to(tl.int32), weight, 0.0)
            # Sums of the same order, so that they grow with the border.
            up1, up2, up3 = tl.sum(m1, 0) <= rest, tl.sum(m2, 0) <= rest, tl.sum(m3, 0) <= rest
            hi = tl.where(up3, hi, tl.where(up2, b3, tl.where(up1, b2, b1)))
            lo = tl.where(up3, b3, tl.where(up2, b2, tl.where(up1, b1, lo)))
        cut = hi.to(tl.int32)

        # Of those equal to it so many go as have room in the rest, the first in the row.
        gone = 0
        if BY_MASS:
            below, as_many = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            weights = tl.zeros([BLOCK], tl.float32)
            for first in range(0, V, BLOCK):
                o = first + o_b
                z = _scores(p_z, s_v, o, V)
                key, weight = _key(z), _weights(z, o, top, V, BY_MASS)
                below += tl.where(key < cut, weight, 0.0)
                as_many += tl.where((key == cut) & (o < V), 1.0, 0.0)
                weights = tl.maximum(weights, tl.where(key == cut, weight, 0.0))
            room = (rest - tl.sum(below, 0)) / tl.max(weights, 0)
            gone = tl.minimum(tl.maximum(room, 0.0), tl.sum(as_many, 0) - 1).to(tl.int32)

        before = 0
        p_out = out_ptr + r * V
        for first in range(0, V, BLOCK):
            o = first + o_b
            z = _scores(p_z, s_v, o, V)
            key = _key(z)
            equal = ((key == cut) & (o < V)).to(tl.int32)
            rank = before + tl.cumsum(equal, 0) - equal
            kept = (key > cut) | ((key == cut) & (rank >= gone)) | (asks == 0)
            tl.store(p_out + o, tl.where(kept, z, -float("inf")), mask=o < V)
            before += tl.sum(equal, 0)


def _as_scores(scores: Tensor, *_: object) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


@op(fake=_as_scores)
def keep_top_k(scores: Tensor, k: Tensor) -> Tensor:
    """Of scores [R, V] the k [R] largest, and those equal to the last of them; -inf for others. k 0: all.

    >>> keep_top_k(torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]]), torch.tensor([2.0, 0.0]))
    tensor([[-inf, 3., 2.],
            [1., 3., 2.]])
    """
    ordered = scores.sort(descending=True).values
    last = ordered.gather(1, k.clamp(1, max(1, scores.shape[1]))[:, None].long() - 1)
    return scores.masked_fill(scores < last.where(k[:, None] > 0, -torch.inf), -torch.inf)


@keep_top_k.kernel
def keep_top_k_triton(scores, k):
    """One launch."""
    return _launch(scores, k, by_mass=False)


@op(fake=_as_scores)
def keep_top_p(scores: Tensor, rest: Tensor) -> Tensor:
    """Of scores [R, V] the largest, where those that go have at most rest [R] of the probability; -inf for these.

    A negative rest: all stay.

    >>> keep_top_p(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([0.1]))
    tensor([[-inf, 3., 2.]])
    """
    ordered, place = scores.sort()  # as transformers does, so that of equal ones the same stay
    p = ordered.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    gone = p.cumsum(-1) <= rest[:, None]
    gone[:, -1:] = False
    return scores.masked_fill(gone.scatter(1, place, gone), -torch.inf)


@keep_top_p.kernel
def keep_top_p_triton(scores, rest):
    """One launch."""
    return _launch(scores, rest, by_mass=True)


def _launch(scores: Tensor, number: Tensor, *, by_mass: bool) -> Tensor:
    out = _as_scores(scores)
    R, V = scores.shape
    options = {"BY_MASS": by_mass, "NOTHING": NOTHING, "BLOCK": BLOCK, "num_warps": 8, **pdl_options(scores.device)}
    _keep_top_kernel[(R,)](scores, number, out, scores.stride(), number.stride(0), V, **options)
    return out
