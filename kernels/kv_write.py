"""KV write: put the keys and values of a pass's rows into the caches of their sequences.

    cache[seq_r, :, slot_r, :] = new_r

Shapes   k_cache, v_cache [B, Hkv, C + 1, D];  key, value [R, Hkv, D];  row_seq, row_slot [R] int64
Traffic  reads and writes 2 * R * Hkv * D elements: pure latency
Trash    rows that nobody needs have slot C: it is written (in any order) and never read
"""

from __future__ import annotations

from torch import Tensor


def kv_write(k_cache: Tensor, v_cache: Tensor, key: Tensor, value: Tensor, row_seq: Tensor, row_slot: Tensor) -> None:
    """Write key and value [R, Hkv, D] in place to caches [B, Hkv, C + 1, D] at (row_seq, row_slot), int64 [R] each.

    Slots lie in [0, C]; C is the trash slot. Two rows may share no other slot.

        kv_write(k_cache, v_cache, key, value, torch.tensor([0, 0, 1]), torch.tensor([7, 8, 3]))
    """
    kv_write_reference(k_cache, v_cache, key, value, row_seq, row_slot)


def kv_write_reference(
    k_cache: Tensor, v_cache: Tensor, key: Tensor, value: Tensor, row_seq: Tensor, row_slot: Tensor
) -> None:
    """`kv_write` in plain torch, any dtype."""
    k_cache[row_seq, :, row_slot] = key
    v_cache[row_seq, :, row_slot] = value
