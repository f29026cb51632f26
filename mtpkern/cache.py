"""The KV buffers of a decoding run, and the transformers cache that fills them during the prefill.

Slot = position: a token's key and value stand where the token stands in its own text, whatever padding came before
it. Nothing is ever removed: the next pass overwrites the slots that masks and dropped drafts have used, and until
then no row sees them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from mtpkern.kernels.advance import Rows
from mtpkern.kernels.decode_attention import decode_attention
from mtpkern.kernels.kv_write import kv_write


class KVCache:
    """Keys and values [B, Hkv, C + 1, D] of every layer; slot C is trash. The attention context of a decoding step.

    Buffers are made from the first keys that arrive, so local heads under tensor parallelism and models with layers of
    different widths are right by construction.
    """

    def __init__(self, capacity: int, rows: Rows, max_rows: int, *, batch_invariant: bool = False) -> None:
        self.capacity = capacity
        # Slots that hold anything, where the host knows: attention need not look behind them.
        self.slots = capacity
        self.rows = rows
        self.max_rows = max_rows
        self.batch_invariant = batch_invariant
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.attended: set[int] = set()
        # What the layers of one pass share; whoever changes the rows empties it.
        self.memo: dict = {}

    def fill(self, layer: int, key: Tensor, value: Tensor, slot: Tensor) -> None:
        """Store the prefill's key and value [B, Hkv, T, D] at slot [B, T] int64 (C for what is not to be kept)."""
        if layer not in self.layers:
            B, Hkv, _, D = key.shape
            # Zeros, because a reference that multiplies by zero weights must not meet NaN.
            self.layers[layer] = (
                key.new_zeros(B, Hkv, self.capacity + 1, D),
                value.new_zeros(B, Hkv, self.capacity + 1, value.shape[-1]),
            )
        k_cache, v_cache = self.layers[layer]
        seq = torch.arange(slot.shape[0], device=slot.device)[:, None].expand_as(slot)
        kv_write(
            k_cache,
            v_cache,
            key.transpose(1, 2).flatten(0, 1),
            value.transpose(1, 2).flatten(0, 1),
            seq.flatten(),
            slot.flatten(),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(x.nbytes for pair in self.layers.values() for x in pair)

    def clear(self) -> None:
        """Zero all buffers in place, whatever an earlier run has left there; they keep their addresses."""
        for pair in self.layers.values():
            for x in pair:
                x.zero_()

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Write key and value [1, Hkv, R, D] of this pass, then attend with query [1, Hq, R, D]: [1, R, Hq, D]."""
        if layer not in self.layers:
            raise ValueError(f"attention layer {layer} runs in a decoding step but cached nothing during the prefill")
        self.attended.add(layer)
        k_cache, v_cache = self.layers[layer]
        rows = self.rows
        kv_write(k_cache, v_cache, key[0].transpose(0, 1), value[0].transpose(0, 1), rows.seq, rows.slot)
        return decode_attention(
            query[0].transpose(0, 1),
            k_cache[:, :, : self.slots + 1],
            v_cache[:, :, : self.slots + 1],
            rows.seq,
            rows.slot,
            rows.start,
            max_rows=self.max_rows,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            batch_invariant=self.batch_invariant,
            memo=self.memo,
        )[None]


class PrefillCache(Cache):
    """A transformers cache that hands every layer's keys and values to a `KVCache`, for a prompt in one or more chunks.

    A chunk's keys are written to slot [B, T] int64 of all columns of the padded prompts (C for what is not to be kept),
    of which `seen` have gone before. The model gets back the keys of all columns so far, in their places: the new ones
    as they are in a first chunk, else gathered from the buffers, a layer at a time. So it runs its own attention, with
    its own masks for left padding, sliding windows and sinks, on what a cache of transformers would hold, and no second
    copy of the prompt's keys and values exists.
    """

    def __init__(self, kv: KVCache, slot: Tensor) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.kv = kv
        self.slot = slot
        self.seen = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a chunk's keys and values [B, Hkv, n, D]; returns those of all columns so far [B, Hkv, seen + n, D]."""
        end = self.seen + key_states.shape[2]
        self.kv.fill(layer_idx, key_states, value_states, self.slot[:, self.seen : end])
        if not self.seen:
            return key_states, value_states
        slot = self.slot[:, :end]
        seq = torch.arange(len(slot), device=slot.device)[:, None]
        k_cache, v_cache = self.kv.layers[layer_idx]
        return k_cache[seq, :, slot].transpose(1, 2), v_cache[seq, :, slot].transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before the chunk that runs."""
        return self.seen

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """Columns that a chunk's mask covers, and the first of them. Older versions of transformers pass positions."""
        n = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.seen + n, 0
