"""The KV buffers of a decoding run, and the transformers cache that fills them during the prefill.

Slot = position: a token's key and value stand where the token stands in its own text, whatever padding came before it.
Nothing is ever removed: the next pass overwrites the slots of masks and dropped drafts, which no row sees until then.
Masks behind drafts have scratch slots of their own, before the first token's: with S of them, slot = S + position.
Without a CUDA graph, which needs fixed addresses, the buffers hold what is in use and grow as the texts do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from mtpkern.kernels.decode_attention import decode_attention
from mtpkern.kernels.kv_write import kv_write
from mtpkern.kernels.packed_rows import PackedRows
from mtpkern.kernels.scoring import Scoring
from mtpkern.kernels.state import Rows
from mtpkern.recorder import apart


class KVCache:
    """Keys and values [B, Hkv, H + 1, D] of every layer; slot H is trash. The attention context of a decoding step.

    H = `held` slots are there, C = `capacity` at most: `reserve` makes more. Rows know the trash slot as C. The first
    `scratch` of them hold no token. Buffers are made from the first keys that arrive, so local heads under tensor
    parallelism and models with layers of different widths are right by construction.
    """

    def __init__(
        self,
        capacity: int,
        rows: Rows,
        max_rows: int,
        *,
        held: int | None = None,
        scratch: int = 0,
        batch_invariant: bool = False,
        model_name: str = "the model",
    ) -> None:
        self.capacity = capacity
        self.held = capacity if held is None else min(held, capacity)
        # Slots that hold anything, where the host knows: attention need not look behind them.
        self.slots = self.held
        self.scratch = scratch
        self.rows = rows
        self.max_rows = max_rows
        self.batch_invariant = batch_invariant
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.attended: set[int] = set()
        # Whether a whole pass has shown that every layer attends to what it has cached, once.
        self.proven = False
        self.model_name = model_name
        # What the layers of one pass share; whoever changes the rows empties it.
        self.memo: dict[str, PackedRows] = {}
        # Rows that stand behind these in a pass, of sequences that have none among them (mtpkern.prompt_rows).
        self.beside: PackedRows | None = None

    def fill(self, layer: int, key: Tensor, value: Tensor, slot: Tensor, seq: Tensor | None = None) -> None:
        """Store key and value [n, Hkv, T, D] of sequences seq [n] (None: all) at slot [n, T] int64; H is not kept."""
        seq = torch.arange(slot.shape[0], device=slot.device) if seq is None else seq
        seq = seq[:, None].expand_as(slot).flatten()
        key, value = (x.transpose(1, 2).flatten(0, 1) for x in (key, value))
        self.write(layer, key, value, seq, slot.flatten())

    def write(self, layer: int, key: Tensor, value: Tensor, seq: Tensor, slot: Tensor) -> None:
        """Store rows of keys and values [R, Hkv, D] at (seq, slot), int64 [R] each; the first make the buffers."""
        if layer not in self.layers:
            B, (_, Hkv, D) = len(self.rows.start) - 1, key.shape
            # Zeros, because a reference that multiplies by zero weights must not meet NaN.
            sizes = (B, Hkv, self.held + 1)
            self.layers[layer] = key.new_zeros(*sizes, D), value.new_zeros(*sizes, value.shape[-1])
        k_cache, v_cache = self.layers[layer]
        for name, x, cached in (("keys", key, k_cache), ("values", value, v_cache)):
            here, there = ((y.shape[1], y.shape[-1], y.dtype, y.device) for y in (x, cached))
            if here != there:
                raise ValueError(
                    f"{self.model_name}: layer {layer} caches {name} of {here[0]} heads of {here[1]} in {here[2]} on "
                    f"{here[3]}, and the buffers have been made for {there[0]} of {there[1]} in {there[2]} on "
                    f"{there[3]}; mtpkern decodes models whose layers keep to one form"
                )
        kv_write(k_cache, v_cache, key, value, seq, slot)

    def reserve(self, slots: int) -> None:
        """Make room for so many slots: new buffers of twice the size or more, a layer at a time."""
        if slots <= self.held:
            return
        assert slots <= self.capacity
        held = min(self.capacity, max(slots, 2 * self.held))
        for layer, pair in self.layers.items():
            self.layers[layer] = (_grown(pair[0], self.held, held), _grown(pair[1], self.held, held))
            del pair
        self.held = held

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(x.nbytes for pair in self.layers.values() for x in pair)

    def clear(self, seq: int | None = None) -> None:
        """Zero all buffers in place, or those of a sequence, whatever is left there; they keep their addresses."""
        for pair in self.layers.values():
            for x in pair:
                (x if seq is None else x[seq]).zero_()

    def copy_prefixes(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Give sequences the keys of the first tokens of others: (from, to, tokens) each; all read before any write."""
        for pair in self.layers.values():
            for x in pair:
                ends = [(source, seq, slice(self.scratch, self.scratch + n)) for source, seq, n in copies]
                read = [x[source, :, here].clone() for source, _, here in ends]
                for (_, seq, here), keys in zip(ends, read):
                    x[seq, :, here] = keys

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Write key and value [1, Hkv, R, D] of this pass, then attend with query [1, Hq, R, D]: [1, R, Hq, D]."""
        if not self.proven:
            self._require_as_cached(layer, key, value)
        return apart(self._attend, layer, query, key, value, scoring)  # type: ignore[no-any-return]

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        k_cache, v_cache = self.layers[layer]
        planned, beside = self.packed(), self.beside
        options: dict[str, Any] = {"batch_invariant": self.batch_invariant, "slots": self.slots}
        if beside is None:
            return decode_attention(q, k, v, k_cache, v_cache, planned, scoring, **options)[None]
        n = len(planned.seq)
        ours = decode_attention(q[:n], k[:n], v[:n], k_cache, v_cache, planned, scoring, **options)
        theirs = decode_attention(q[n:], k[n:], v[n:], k_cache, v_cache, beside, scoring, **options)
        return torch.cat([ours, theirs])[None]

    def packed(self) -> PackedRows:
        """The rows of this pass as the buffers have them, whose trash slot may not be C yet; one object for all layers.

        Not where torch.compile looks on, to which the layers are one form without a memory.
        """
        if not torch.compiler.is_compiling() and "rows" in self.memo:
            return self.memo["rows"]
        rows = self.rows
        slot = rows.slot if self.held == self.capacity else rows.slot.clamp(max=self.held)
        spans = (rows.prefix_end, rows.span_start, self.scratch) if self.scratch else ()
        packed = PackedRows(rows.seq, slot, rows.start, self.max_rows, *spans)
        if not torch.compiler.is_compiling():
            self.memo["rows"] = packed
        return packed

    def require_cached(self, config: PreTrainedConfig) -> None:
        """Raise ValueError where the layers that have cached keys are not those that the config tells of."""
        expected = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
        cached = sorted(self.layers)
        if cached != list(range(expected if isinstance(expected, int) else len(cached))) or not cached:
            raise ValueError(
                f"{self.model_name}: of {expected} layers, {len(cached)} cached keys and values during the prefill "
                f"({cached}); mtpkern decodes models all of whose layers do"
            )

    def require_attended(self) -> None:
        """Raise ValueError where a layer that cached keys did not come to our attention function in the first step."""
        missed = sorted(self.layers.keys() - self.attended)
        if missed:
            raise ValueError(
                f"{self.model_name}: attention layers {missed} cached keys during the prefill but did not call the "
                "attention interface in a decoding step; this architecture cannot be decoded by mtpkern"
            )
        self.proven = True

    def _require_as_cached(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Raise ValueError where a layer of a first pass does not attend, once, to the like of what it has cached."""
        if layer not in self.layers:
            raise ValueError(
                f"{self.model_name}: attention layer {layer} runs in a decoding step but cached nothing during the "
                "prefill; mtpkern decodes models that attend to what they cache"
            )
        if layer in self.attended:
            raise ValueError(
                f"{self.model_name}: layer {layer} calls attention more than once in a pass; mtpkern decodes models "
                "whose layers do so once, on the keys and values that they cache"
            )
        self.attended.add(layer)
        for name, x, cached in zip(("keys", "values"), (key, value), self.layers[layer]):
            here, there = (x.shape[1], x.shape[3]), (cached.shape[1], cached.shape[3])
            if here != there:
                raise ValueError(
                    f"{self.model_name}: layer {layer} attends to {name} of {here[0]} heads of {here[1]}, but has "
                    f"cached {there[0]} heads of {there[1]}; mtpkern decodes models that attend to what they cache"
                )


def _grown(x: Tensor, held: int, more: int) -> Tensor:
    """x [B, Hkv, held + 1, D] with room for `more` slots, the trash behind them."""
    grown = x.new_zeros(*x.shape[:2], more + 1, x.shape[3])
    grown[:, :, :held] = x[:, :, :held]
    return grown


class _Chunks:
    """What the caches of a prefill have in common: they take the columns of padded prompts in one or more chunks.

    A chunk's keys are written to sequences seq [n], slot [n, T] int64 of all columns (C for what is not to be kept), of
    which `seen` have gone before.
    """

    def __init__(self, kv: KVCache, slot: Tensor, seq: Tensor | None = None, **of_theirs: Any) -> None:
        super().__init__(**of_theirs)
        self.kv = kv
        self.slot = slot.clamp(max=kv.held)
        self.seq = torch.arange(len(slot), device=slot.device) if seq is None else seq
        self.seen = 0
        # Layers that have brought this chunk.
        self.brought: set[int] = set()

    def next_chunk(self, end: int) -> None:
        """The chunk that ran has ended at this column."""
        self.seen = end
        self.brought.clear()

    def bring(self, layer: int, does: str) -> None:
        """A layer brings its keys and values of this chunk."""
        if layer in self.brought:
            raise ValueError(
                f"{self.kv.model_name}: layer {layer} {does} more than once in a pass; mtpkern decodes models whose "
                "layers do so once"
            )
        self.brought.add(layer)

    def _fill(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store a layer's keys and values [n, Hkv, columns, D] of this chunk."""
        self.kv.fill(layer, key, value, self.slot[:, self.seen : self.seen + key.shape[2]], self.seq)


class PrefillCache(_Chunks, Cache):
    """A transformers cache that hands every layer's keys and values to a `KVCache`, for a prompt in one or more chunks.

    The model gets back the keys of all columns so far, in their places: the new ones as they are in a first chunk, else
    gathered from the buffers, a layer at a time. So it runs its own attention, with its own masks, on what a cache of
    transformers would hold, and no second copy of the prompt's keys and values exists.
    """

    def __init__(self, kv: KVCache, slot: Tensor, seq: Tensor | None = None) -> None:
        super().__init__(kv, slot, seq, layer_class_to_replicate=DynamicLayer)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a chunk's keys and values [B, Hkv, n, D]; returns those of all columns so far [B, Hkv, seen + n, D]."""
        end = self.seen + key_states.shape[2]
        self.bring(layer_idx, "caches keys")
        self._fill(layer_idx, key_states, value_states)
        if not self.seen:
            return key_states, value_states
        seq, slot = self.seq[:, None], self.slot[:, :end]
        k_cache, v_cache = self.kv.layers[layer_idx]
        return k_cache[seq, :, slot].transpose(1, 2), v_cache[seq, :, slot].transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before the chunk that runs."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns that a chunk's mask covers, and the first of them."""
        return self.seen + query_length, 0


class CapturedPrefill(_Chunks, DynamicCache):
    """The prefill's cache of a model of latent attention, and the context of `captured` that fills a `KVCache`.

    Such a model caches what keys and values are made from, here; what its layers attend to is stored as it gets there.
    """

    def take(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store a chunk's keys and values; they come [B, Hkv, seen + n, D], behind those of all columns before."""
        self.bring(layer, "calls attention")
        self._fill(layer, key[:, :, self.seen :], value[:, :, self.seen :])


# What a model is given as its cache where it reads prompts.
Prefill = PrefillCache | CapturedPrefill
