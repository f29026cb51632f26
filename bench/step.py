"""A step at the shapes of real models: a decoder in the middle of a text, and the floor of its pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mtpkern.attention import attention_context
from mtpkern.bench.models import MASK
from mtpkern.bench.timing import peak
from mtpkern.decoder import Decoder
from mtpkern.memory import kv_bytes
from mtpkern.strategies import Strategy

PROMPT = 8
NO_STOP = torch.tensor([-1])  # no token
# Passes that the device state has room for between two resets: warming up, and the calls of one graph.
PASSES = 24


class Body:
    """An attention that costs nothing: what is left of a pass is the model."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, _: object) -> Tensor:
        """Query [B, Hq, T, D] -> itself as [B, T, Hq, D]."""
        return query.transpose(1, 2)


@dataclass(frozen=True)
class Point:
    """B sequences with a context of L tokens, k predictions a pass, R rows."""

    B: int
    L: int
    k: int
    R: int


class Stand:
    """A decoder in the middle of a long text: every row of its pass is in use, and it can be put back there.

    The prompt is short; length and positions are then moved up and the caches filled with noise, which costs the
    same to read as text. Static(k) accepts everything, so that each pass brings k pending tokens and as many masks as
    the rows hold. A stand of the same B and L may share the caches of another, from its prefill on: at 16 texts of 16k
    tokens a second set would fit no GPU. `room` is how many tokens may come before a reset; other options are the
    decoder's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        at: Point,
        strategy: Strategy,
        *,
        share: Stand | None = None,
        room: int = PASSES * 16,
        **options: Any,
    ) -> None:
        self.at = at
        assert share is None or (share.at.B, share.at.L) == (at.B, at.L)
        self.decoder = endless(model, strategy, at.B, at.L, room, rows=at.R, **options)
        if share is not None:
            self.decoder.cache.layers = share.decoder.cache.layers
        self.decoder.prefill(torch.randint(2, model.config.vocab_size, (at.B, PROMPT), device=model.device))
        with torch.inference_mode():
            if share is None:
                fill(self.decoder)
            move_up(self.decoder, at.L - PROMPT)
        cache, sequences, rows = self.decoder.cache, self.decoder.sequences, self.decoder.rows
        self.state = [*vars(sequences).values(), *vars(rows).values()]
        self.before = [x.clone() for x in self.state]

        with attention_context(model, cache):
            for _ in range(2):
                self.step(0)
        # A sequence that has ended, in a fault say, would cost nothing and look fast.
        used = int((rows.slot < cache.capacity).sum())
        if used != at.R:
            raise RuntimeError(f"expected all rows in use, got {used} of {at.R} at {at}")
        reset([self])

    def step(self, i: int) -> Tensor:
        """One pass, inside the attention context of any stand of the model."""
        return self.decoder.step({"mtpkern": self.decoder.cache})

    @torch.inference_mode()
    def body(self, i: int) -> Tensor:
        """The model on the rows of the pass, attention left out, and nothing taken in: logits."""
        return self.decoder._forward({"mtpkern": Body()}, *self.decoder.inputs)


def endless(model: PreTrainedModel, strategy: Strategy, batch: int, context: int, room: int, **options: Any) -> Decoder:
    """A decoder of texts without an end, with `room` for so many tokens behind a context of L."""
    how: dict[str, Any] = {"mask_token_id": MASK, "stop_ids": NO_STOP, "batch": batch, **options}
    return Decoder(model, strategy, capacity=context + room, max_new_tokens=room, **how)


def fill(decoder: Decoder) -> None:
    """Noise for keys and values: it costs the same to read as text."""
    for buffers in decoder.cache.layers.values():
        for buffer in buffers:
            buffer.normal_()


def move_up(decoder: Decoder, by: int) -> None:
    """Behind a prefill: as if so many tokens more stood before what is pending."""
    rows, masks = decoder.all_rows, decoder.strategy.masks
    in_use = rows.slot < decoder.cache.capacity
    for place in (decoder.sequences.length, decoder.sequences.limit):
        place.add_(by)
    for place in (rows.position, rows.slot, *((rows.prefix_end, rows.span_start) if masks else ())):
        place.add_(by * in_use)


def reset(stands: Sequence[Stand]) -> None:
    """Put all of them back to where they began."""
    for stand in stands:
        for x, was in zip(stand.state, stand.before, strict=True):
            x.copy_(was)


def weights(model: PreTrainedModel) -> int:
    """Parameters that a pass reads whole: all but an embedding of its own, of which it takes a few rows."""
    count = sum(p.numel() for p in model.parameters())
    return count if model.config.tie_word_embeddings else count - model.get_input_embeddings().weight.numel()


def bytes_read(model: PreTrainedModel, B: int, L: int) -> int:
    """What a pass cannot do without: weights, and keys and values of B texts of L tokens, once."""
    # Of the slot more that is counted no row is read.
    return model.dtype.itemsize * weights(model) + (kv_bytes(model, B, L - 1) or 0)


def work(model: PreTrainedModel, at: Point) -> dict[str, float]:
    """Bytes and FLOPs of a pass, as `Peak.floor` takes them."""
    c = model.config
    pairs = 4 * at.R * at.L * c.num_hidden_layers * c.num_attention_heads * c.head_dim
    return {"bytes": bytes_read(model, at.B, at.L), "flops": 2 * weights(model) * at.R + pairs}


def floor(model: PreTrainedModel, at: Point) -> float:
    """Microseconds of a pass: weights and the cached keys and values at bandwidth, or the products at peak."""
    return peak(model.device).floor(**work(model, at))
