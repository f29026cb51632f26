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

    def __init__(self, capacity: int, rows: Rows, max_rows: int) -> None:
        self.capacity = capacity
        # Slots that hold anything, where the host knows: attention need not look behind them.
        self.slots = capacity
        self.rows = rows
        self.max_rows = max_rows
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
            memo=self.memo,
        )[None]


class PrefillCache(Cache):
    """A transformers cache that stays empty to the model and hands every layer's keys and values to a `KVCache`.

    Empty, so the model's own masks are right for left padding and sliding layers; the scatter by `slot` [B, T] drops
    the padding, so ragged prompts come out compact.
    """

    def __init__(self, kv: KVCache, slot: Tensor) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.kv = kv
        self.slot = slot

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store [B, Hkv, T, D] keys and values of a layer; returns them as they are."""
        self.kv.fill(layer_idx, key_states, value_states, self.slot)
        return key_states, value_states
