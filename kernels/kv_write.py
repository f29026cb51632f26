"""KV write: put the keys and values of a pass's rows into the caches of their sequences.

    cache[seq_r, :, slot_r, :] = new_r

Shapes   k_cache, v_cache [B, Hkv, C + 1, D];  key, value [R, Hkv, D];  row_seq, row_slot [R] int64
Traffic  reads and writes 2 * R * Hkv * D elements: pure latency, one launch for keys and values together
Trash    rows that nobody needs have slot C: it is written (in any order) and never read
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

from mtpkern.kernels.form import pdl_options, strides
from mtpkern.kernels.op import op

if find_spec("triton"):
    import triton
    import triton.language as tl

    from mtpkern.kernels.form import gdc_wait

    @triton.jit
    def _kv_write_kernel(
        k_cache_ptr,  # [B, Hkv, C + 1, D_K]
        v_cache_ptr,  # [B, Hkv, C + 1, D_V]
        key_ptr,  # [R, Hkv, D_K]
        value_ptr,  # [R, Hkv, D_V]
        row_seq_ptr,  # [R]
        row_slot_ptr,  # [R]
        s_k_cache,  # the strides of each, as tuples
        s_v_cache,
        s_key,
        s_value,
        Hkv,
        D_K: tl.constexpr,
        D_V: tl.constexpr,
        BLOCK_H: tl.constexpr,
        BLOCK_K: tl.constexpr,
        BLOCK_V: tl.constexpr,
        PDL: tl.constexpr,
    ):
        gdc_wait(PDL)
        # A row's offset in a large batch and a slot's in a long cache can each pass 2^31 elements: 64 bits for both.
        r = tl.program_id(0).to(tl.int64)
        b = tl.load(row_seq_ptr + r)
        c = tl.load(row_slot_ptr + r)
        o_h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]

        o_k = tl.arange(0, BLOCK_K)[None, :]
        m_k = (o_h < Hkv) & (o_k < D_K)
        p_k = k_cache_ptr + b * s_k_cache[0] + o_h * s_k_cache[1] + c * s_k_cache[2] + o_k * s_k_cache[3]
        tl.store(p_k, tl.load(key_ptr + r * s_key[0] + o_h * s_key[1] + o_k * s_key[2], mask=m_k), mask=m_k)

        o_v = tl.arange(0, BLOCK_V)[None, :]
        m_v = (o_h < Hkv) & (o_v < D_V)
        p_v = v_cache_ptr + b * s_v_cache[0] + o_h * s_v_cache[1] + c * s_v_cache[2] + o_v * s_v_cache[3]
        tl.store(p_v, tl.load(value_ptr + r * s_value[0] + o_h * s_value[1] + o_v * s_value[2], mask=m_v), mask=m_v)


@op(mutates=["k_cache", "v_cache"])
def kv_write(k_cache: Tensor, v_cache: Tensor, key: Tensor, value: Tensor, row_seq: Tensor, row_slot: Tensor) -> None:
    """Write key and value [R, Hkv, D] in place to caches [B, Hkv, C + 1, D] at (row_seq, row_slot), int64 [R] each.

    Slots lie in [0, C]; C is the trash slot. Two rows may share no other slot.

        kv_write(k_cache, v_cache, key, value, torch.tensor([0, 0, 1]), torch.tensor([7, 8, 3]))
    """
    for cached, x in ((k_cache, key), (v_cache, value)):
        if len(cached) == 1:  # in half of the time, on a CPU
            cached.index_copy_(2, row_slot, x.transpose(0, 1)[None])
        else:
            cached[row_seq, :, row_slot] = x


@kv_write.kernel
def kv_write_triton(k_cache, v_cache, key, value, row_seq, row_slot):
    """One launch: a program copies a row's heads, all of them up to 4,096 elements."""
    R, Hkv, D_K = key.shape
    D_V = value.shape[-1]
    # One sequence's index may come expanded, with a stride of 0, which the kernel would not know.
    row_seq, row_slot = row_seq.contiguous(), row_slot.contiguous()
    BLOCK_K, BLOCK_V = triton.next_power_of_2(D_K), triton.next_power_of_2(D_V)
    BLOCK_H = min(triton.next_power_of_2(Hkv), max(1, 4096 // max(BLOCK_K, BLOCK_V)))
    tensors = k_cache, v_cache, key, value
    sizes = {"D_K": D_K, "D_V": D_V, "BLOCK_H": BLOCK_H, "BLOCK_K": BLOCK_K, "BLOCK_V": BLOCK_V}
    _kv_write_kernel[(R, triton.cdiv(Hkv, BLOCK_H))](
        *tensors, row_seq, row_slot, *strides(*tensors), Hkv, **sizes, **pdl_options(key.device)
    )
