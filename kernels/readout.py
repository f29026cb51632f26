"""Readout: each row's argmax and its probability, in one pass over the vocabulary.

    token_r = argmax_v z_rv        confidence_r = 1 / sum_v exp(z_rv - max_v z_rv)

The mask token stands outside of both: its logit counts as -inf, so it is never emitted and takes no probability.

Shapes   z [R, V] logits;  token [R] int64;  confidence [R] float32 (float64 for float64 logits)
Traffic  reads z once, writes 12 bytes a row: bandwidth-bound
Ties     the lowest index wins
Faults   a row with a NaN, with +inf or without any finite logit: token -1 and confidence NaN, which `advance` reports
Source   arXiv 2602.06019, section "Static vs. Adaptive Decoding Strategies"

The kernel cuts each row into chunks of one size, whatever the batch, so that few rows fill a GPU too and a row's
result does not depend on its company. A chunk's triple is (top, total, index): its largest logit, the sum of
exp(z - top), the lowest index of the largest. A second launch, of R programs, merges the triples.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from mtpkern.kernels.form import pdl_options
from mtpkern.kernels.op import op

CHUNK = 4096

if find_spec("triton"):
    import triton
    import triton.language as tl

    from mtpkern.kernels.form import gdc_wait

    @triton.jit(do_not_specialize=["mask_token_id"])
    def _chunk_kernel(
        z_ptr,  # [R, V]
        top_ptr,  # [R, n], as the two below
        total_ptr,
        index_ptr,
        s_z,
        V,
        mask_token_id,
        CHUNK: tl.constexpr,
        PDL: tl.constexpr,
    ):
        gdc_wait(PDL)
        r = tl.program_id(0).to(tl.int64)  # R * V can pass 2^31
        i_chunk = tl.program_id(1)
        first = i_chunk * CHUNK
        o = tl.arange(0, CHUNK)
        p_z = z_ptr + r * s_z[0] + first.to(tl.int64) * s_z[1]
        z = tl.load(p_z + o * s_z[1], mask=first + o < V, other=-float("inf")).to(top_ptr.dtype.element_ty)
        z = tl.where(first + o == mask_token_id, -float("inf"), z)
        # Compiled, max passes NaN by, and the sum carries it on. A chunk of -inf adds nothing.
        top = tl.max(z, 0)
        total = tl.sum(tl.exp(z - tl.where(top == -float("inf"), 0.0, top)), 0)
        index = tl.min(tl.where(z == top, first + o, V), 0)
        o_out = r * tl.num_programs(1) + i_chunk
        tl.store(top_ptr + o_out, top)
        tl.store(total_ptr + o_out, total)
        tl.store(index_ptr + o_out, index)

    @triton.jit
    def _merge_kernel(
        top_ptr,  # [R, n], as the two below
        total_ptr,
        index_ptr,
        token_ptr,  # [R]
        confidence_ptr,  # [R]
        n,
        BLOCK: tl.constexpr,
        PDL: tl.constexpr,
    ):
        gdc_wait(PDL)
        r = tl.program_id(0).to(tl.int64)
        o = tl.arange(0, BLOCK)
        top = tl.load(top_ptr + r * n + o, mask=o < n, other=-float("inf"))
        total = tl.load(total_ptr + r * n + o, mask=o < n, other=0.0)
        index = tl.load(index_ptr + r * n + o, mask=o < n, other=0)
        highest = tl.max(top, 0)
        # exp(-inf - -inf) is NaN, as it should be: a row without any finite logit is a fault.
        confidence = 1.0 / tl.sum(total * tl.exp(top - highest), 0)
        lowest = tl.min(tl.where(top == highest, index, 2147483647), 0)
        tl.store(token_ptr + r, tl.where(confidence == confidence, lowest, -1))
        tl.store(confidence_ptr + r, confidence)


def no_values(logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """Token and confidence [R] of logits [R, V], not yet computed; what `readout` and `sample` bring back."""
    R, dtype = logits.shape[0], torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(R, dtype=torch.int64), logits.new_empty(R, dtype=dtype)


@op(fake=no_values)
def readout(logits: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """Token [R] and confidence [R] of logits [R, V]; the mask token, where it is among them, is left out.

    >>> readout(torch.tensor([[0.0, 2.0, 9.0]]), mask_token_id=2)
    (tensor([1]), tensor([0.8808]))
    """
    # In float32, or in float64 for float64 logits.
    z = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    z[:, mask_token_id : mask_token_id + 1] = -torch.inf  # behind the vocabulary there is nothing to leave out
    top, token = z.max(dim=-1)
    confidence = z.sub_(top[:, None]).exp_().sum(dim=-1).reciprocal()
    return token.masked_fill(confidence.isnan(), -1), confidence


def chunks_triton(logits: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """The triples of each row's chunks: top and total [R, n], index [R, n] int32."""
    R, V = logits.shape
    n = triton.cdiv(V, CHUNK)
    top, total = logits.new_empty(2, R, n, dtype=torch.promote_types(logits.dtype, torch.float32))
    index = logits.new_empty(R, n, dtype=torch.int32)
    pdl = pdl_options(logits.device)
    _chunk_kernel[(R, n)](logits, top, total, index, logits.stride(), V, mask_token_id, CHUNK=CHUNK, **pdl)
    return top, total, index


@readout.kernel
def readout_triton(logits, mask_token_id):
    """Two launches."""
    chunks, read = chunks_triton(logits, mask_token_id), no_values(logits)
    R, n = chunks[0].shape
    options = {"BLOCK": triton.next_power_of_2(n), "num_warps": 1, **pdl_options(logits.device)}
    _merge_kernel[(R,)](*chunks, *read, n, **options)
    return read
