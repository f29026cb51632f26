"""Sample: one token of each row, drawn from its distribution by a number that its place in its text decides.

    p_rv = exp(z_rv - max_v z_rv) / sum_v exp(z_rv - max_v z_rv)      confidence_r = max_v p_rv
    token_r = min {v : p_r0 + ... + p_rv > u_r}      u_r = uniform(key, stream_r, position_r), in (0, 1)

The argmax instead, where confidence_r > greedy_above_r. The mask token's logit counts as -inf, as in `readout`.

u is a hash of the call's key, the sequence's stream and the position that the token will stand at, and of nothing else:
whatever rows come along, and however often a row comes, it draws the same. So a draft is right where it is what its
row draws: that happens with the draft's own probability, and what the row draws is distributed as it is without drafts.

Shapes   z [R, V] logits;  key [1], stream, position [R] int64;  greedy_above [R] float;  token [R] int64;
         confidence [R] float32 (float64 for float64 logits)
Traffic  reads z once and one chunk of each row again: bandwidth-bound, as `readout`
Ties     the lowest index wins; of the forms, tokens may differ where u is within rounding of a token's border
Faults   as in `readout`: token -1 and confidence NaN
Source   inverse transform sampling; the hash is the finaliser of SplitMix64 (Steele, Lea, Flood 2014), applied twice

Sums go by chunks of one size: those of whole chunks in float32, what is summed up from them in float64, so that a token
of probability 1e-12 still has its share. Only the chunk that u falls into is looked at token by token.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from mtpkern.kernels.form import pdl_options
from mtpkern.kernels.op import op
from mtpkern.kernels.readout import CHUNK, chunks_triton, no_values

# Odd multipliers of 64 bits, as signed numbers: two of the finaliser's, one to spread the places over all bits.
M1, M2, SPREAD = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB
# A fraction of a chunk's sum stays below one.
BELOW_ONE = 1 - 2.0**-40

if find_spec("triton"):
    import triton
    import triton.language as tl

    from mtpkern.kernels.form import gdc_wait

    @triton.jit
    def _mixed(x, M1: tl.constexpr, M2: tl.constexpr):
        # Shifts of signed numbers, with what they bring in from the left cut off.
        x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * M1
        x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * M2
        return x ^ ((x >> 31) & 0x1FFFFFFFF)

    @triton.jit(do_not_specialize=["mask_token_id"])
    def _draw_kernel(
        z_ptr,  # [R, V]
        top_ptr,  # [R, n], as the two below
        total_ptr,
        index_ptr,
        key_ptr,  # [1]
        stream_ptr,  # [R], as all below
        position_ptr,
        above_ptr,
        token_ptr,
        confidence_ptr,
        s_z,
        s_above,
        V,
        n,
        mask_token_id,
        M1: tl.constexpr,
        M2: tl.constexpr,
        SPREAD: tl.constexpr,
        BELOW_ONE: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK: tl.constexpr,
        PDL: tl.constexpr,
    ):
        gdc_wait(PDL)
        r = tl.program_id(0).to(tl.int64)  # R * V can pass 2^31
        o = tl.arange(0, BLOCK)
        top = tl.load(top_ptr + r * n + o, mask=o < n, other=-float("inf"))
        total = tl.load(total_ptr + r * n + o, mask=o < n, other=0.0)
        index = tl.load(index_ptr + r * n + o, mask=o < n, other=0)
        highest = tl.max(top, 0)
        # exp(-inf - -inf) is NaN, as it should be: a row without any finite logit is a fault.
        total = total * tl.exp(top - highest)
        confidence = 1.0 / tl.sum(total, 0)
        best = tl.min(tl.where(top == highest, index, 2147483647), 0)

        x = _mixed(tl.load(key_ptr) + (tl.load(stream_ptr + r) + 1) * SPREAD, M1, M2)
        x = _mixed(x + (tl.load(position_ptr + r) + 1) * SPREAD, M1, M2)
        u = (((x >> 12) & 0xFFFFFFFFFFFFF).to(tl.float64) + 0.5) * 2.220446049250313e-16

        # The chunk that u falls into, and how far. Of a scan in parallel the sums may be off by a last bit, so that it
        # is asked besides whether there is anything.
        ends = tl.cumsum(total.to(tl.float64), 0)
        target = u * tl.max(ends, 0)
        chunk = tl.minimum(tl.min(tl.where((ends > target) & (total > 0), o, n - 1), 0), n - 1)
        here = o == chunk
        end, weight = tl.sum(tl.where(here, ends, 0.0), 0), tl.sum(tl.where(here, total.to(tl.float64), 0.0), 0)
        share = tl.minimum(tl.maximum(1 - (end - target) / weight, 0.0), BELOW_ONE)

        first = chunk * CHUNK
        o_v = tl.arange(0, CHUNK)
        p_z = z_ptr + r * s_z[0] + first.to(tl.int64) * s_z[1]
        z = tl.load(p_z + o_v * s_z[1], mask=first + o_v < V, other=-float("inf")).to(top_ptr.dtype.element_ty)
        z = tl.where(first + o_v == mask_token_id, -float("inf"), z)
        weight_v = tl.exp(z - highest)
        ends_v = tl.cumsum(weight_v.to(tl.float64), 0)
        reached = (ends_v > share * tl.max(ends_v, 0)) & (weight_v > 0)
        drawn = first + tl.min(tl.where(reached, o_v, CHUNK - 1), 0)
        token = tl.where(confidence > tl.load(above_ptr + r * s_above), best, drawn)
        tl.store(token_ptr + r, tl.where(confidence == confidence, token, -1))
        tl.store(confidence_ptr + r, confidence)


@op(fake=no_values)
def sample(
    logits: Tensor, key: Tensor, stream: Tensor, position: Tensor, greedy_above: Tensor, mask_token_id: int
) -> tuple[Tensor, Tensor]:
    """Token [R] and confidence [R] of logits [R, V], drawn by key [1], stream and position [R].

    greedy_above [R]: rows whose confidence is above it give their argmax; inf for none, -1 for all.

    >>> place = torch.zeros(1, dtype=torch.int64)
    >>> sample(torch.tensor([[0.0, 2.0, 9.0]]), place, place, place, torch.tensor([torch.inf]), mask_token_id=2)
    (tensor([1]), tensor([0.8808]))
    """
    # In float32, or in float64 for float64 logits.
    R, V = logits.shape
    W = min(V, CHUNK)
    n = -(-V // W)
    z = logits.new_full((R, n * W), -torch.inf, dtype=torch.promote_types(logits.dtype, torch.float32))
    z[:, :V] = logits
    z[:, mask_token_id : min(mask_token_id + 1, V)] = -torch.inf  # behind the vocabulary there is nothing to leave out
    top, best = z.max(dim=-1)
    weight = z.sub_(top[:, None]).exp_().view(R, n, W)
    total = weight.sum(-1)
    confidence = total.sum(-1).reciprocal()

    ends = total.double().cumsum(1)
    target = uniform(key, stream, position)[:, None] * ends[:, -1:]
    chunk = _first((ends > target) & (total > 0))
    share = 1 - (ends.gather(1, chunk) - target) / total.gather(1, chunk).double()
    weight = weight.gather(1, chunk[:, :, None].expand(-1, -1, W))[:, 0]
    ends = weight.double().cumsum(1)
    drawn = chunk * W + _first((ends > share.clamp(0, BELOW_ONE) * ends[:, -1:]) & (weight > 0))
    token = torch.where(confidence > greedy_above, best, drawn[:, 0])
    return token.masked_fill(confidence.isnan(), -1), confidence


@sample.kernel
def sample_triton(logits, key, stream, position, greedy_above, mask_token_id):
    """Two launches, the first of them `readout`'s."""
    chunks, read = chunks_triton(logits, mask_token_id), no_values(logits)
    R, n = chunks[0].shape
    numbers = {"M1": M1, "M2": M2, "SPREAD": SPREAD, "BELOW_ONE": BELOW_ONE}
    sizes = {"CHUNK": CHUNK, "BLOCK": triton.next_power_of_2(n)}
    _draw_kernel[(R,)](
        *(logits, *chunks, key, stream, position, greedy_above, *read, logits.stride(), greedy_above.stride(0)),
        *(logits.shape[1], n, mask_token_id),
        **numbers,
        **sizes,
        **pdl_options(logits.device),
    )
    return read


def uniform(key: Tensor, stream: Tensor, position: Tensor) -> Tensor:
    """A number in (0, 1) for each place [R], float64; the kernel has the same, bit for bit."""
    x = _mixed_reference(_mixed_reference(key + (stream + 1) * SPREAD) + (position + 1) * SPREAD)
    return ((x >> 12 & 0xFFFFFFFFFFFFF).double() + 0.5) * 2.0**-52


def _mixed_reference(x: Tensor) -> Tensor:
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * M1
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * M2
    return x ^ (x >> 31 & 0x1FFFFFFFF)


def _first(true: Tensor) -> Tensor:
    """The first column [R, 1] that is true, the last where none is."""
    columns = true.shape[1]
    return torch.where(true, torch.arange(columns, device=true.device), columns - 1).amin(1, keepdim=True)
