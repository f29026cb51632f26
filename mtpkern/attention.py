"""The attention function that transformers calls, and the switch that makes it call ours.

A Hugging Face model looks its attention function up by the name in its config. `attention_context(model, context)`
puts the name "mtpkern" there for the length of a `with` block; inside it every attention layer hands its rotated
queries, keys and values to `context.attend(...)`. Decoding brings a context that writes the KV cache and reads it
(mtpkern.cache), training one that holds a layout of spans (mtpkern.train.objective). The model is not modified.

The name is registered as an attention function only, not as a mask function: transformers then builds no mask, and
skips the checks on packed sequences that would wait for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

NAME = "mtpkern"


class AttentionContext(Protocol):
    """What a pass brings along: the one object that knows which keys a row sees."""

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
        """Attend with query [B, Hq, T, D] to key and value [B, Hkv, T, D] of this pass; returns [B, T, Hq, D]."""
        ...


# Models that do not forward keyword arguments to their attention layers (StableLM, Nemotron) find the context here.
_current: ContextVar[AttentionContext | None] = ContextVar("mtpkern_context", default=None)

# Keyword tensors that transformers hands to every attention function and that hold nothing our rows do not know.
_KNOWN_TENSORS = {"position_ids", "cache_position", "position_embeddings"}


def mtpkern_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    mtpkern: AttentionContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [B, Hq, T, D], key and value [B, Hkv, T, D] -> ([B, T, Hq, D], None).

    Raises ValueError where the model asks for something that the context would silently drop: a mask of its own,
    attention dropout, a tensor argument that nobody here knows.
    """
    context = mtpkern if mtpkern is not None else _current.get()
    if context is None:
        raise RuntimeError(f"attention {NAME!r} runs only inside mtpkern; reset the model's attn_implementation")
    who = type(module).__name__
    if attention_mask is not None:
        raise ValueError(
            f"{who} builds an attention mask of its own {tuple(attention_mask.shape)}; mtpkern cannot honour it"
        )
    if dropout:
        raise ValueError(f"{who} asks for attention dropout {dropout}; mtpkern has none: set attention_dropout=0")
    unknown = [name for name, x in kwargs.items() if isinstance(x, Tensor) and name not in _KNOWN_TENSORS]
    if unknown:
        raise ValueError(
            f"{who} passes {', '.join(unknown)} to its attention, which mtpkern does not know how to honour"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    # Not through typing.cast, for which torch.compile would look at the number and compile every layer anew.
    layer: Any = module.layer_idx
    out = context.attend(layer, query, key, value, scale=scale, window=sliding_window, softcap=softcap, sinks=s_aux)
    return out, None


AttentionInterface.register(NAME, mtpkern_attention)

_locks: WeakKeyDictionary[PreTrainedModel, Lock] = WeakKeyDictionary()


@contextmanager
def exclusive(model: PreTrainedModel) -> Iterator[None]:
    """Keep the model to one run: its config is shared. Raises RuntimeError where another run holds it already."""
    lock = _locks.setdefault(model, Lock())
    if not lock.acquire(blocking=False):
        raise RuntimeError(
            "this model is already running inside mtpkern; its config is shared, so run one call at a time"
        )
    try:
        yield
    finally:
        lock.release()


@contextmanager
def routed(model: PreTrainedModel, context: AttentionContext) -> Iterator[dict[str, AttentionContext]]:
    """`attention_context` for those who already hold the model."""
    config = model.config.get_text_config(decoder=True)
    # The private attribute, because the public setter validates and re-dispatches for a millisecond or two.
    before = config._attn_implementation_internal
    token = _current.set(context)
    try:
        config._attn_implementation_internal = NAME
        yield {"mtpkern": context}
    finally:
        config._attn_implementation_internal = before
        _current.reset(token)


@contextmanager
def attention_context(model: PreTrainedModel, context: AttentionContext) -> Iterator[dict[str, AttentionContext]]:
    """Route the model's attention through `context` inside the block; yields the keyword arguments for the model call.

        with attention_context(model, context) as route:
            logits = model(input_ids=ids, position_ids=positions, use_cache=False, **route).logits

    The keyword survives activation checkpointing, whose second forward runs after the block has been left in another
    thread; the attention name must then still be ours, so training keeps the block open around backward.
    Raises RuntimeError when the same model is already inside such a block: its config is shared.
    """
    with exclusive(model), routed(model, context) as route:
        yield route
