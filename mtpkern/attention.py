"""The attention function that transformers calls, and the switch that makes it call ours.

A Hugging Face model looks its attention function up by the name that its config answers. Inside a `with` block of
`attention_context(model, context)` that name is "mtpkern", and every attention layer hands its rotated queries, keys
and values to `context.attend(...)`. Decoding brings a context that writes the KV cache and reads it (mtpkern.cache),
training one that holds a layout of spans (mtpkern.train.objective).

Neither model nor settings are modified (mtpkern.routing). "mtpkern" is registered as an attention function only, not as
a mask function: transformers then builds no mask, and skips checks on packed sequences that would wait for the device.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from threading import Lock, get_ident
from traceback import clear_frames
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mtpkern.kernels.scoring import Scoring
from mtpkern.routing import APART, CAPTURE, MASKS, NAME, AttentionContext, plain_name, route_of, routed_config

P = ParamSpec("P")
T = TypeVar("T")

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
    attention dropout, a tensor argument that nobody here knows. Contexts of training are `without_dropout`, which the
    trainer has said.
    """
    context = mtpkern if mtpkern is not None else route_of(getattr(module, "config", None))
    if context is None:
        plain = _plain_attention(module)
        options = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux, **kwargs}
        given = {name: value for name, value in options.items() if value is not None}
        return plain(module, query, key, value, attention_mask, dropout=dropout, **given)
    who = type(module).__name__
    if attention_mask is not None:
        raise ValueError(
            f"{who} builds an attention mask of its own {tuple(attention_mask.shape)}; mtpkern cannot honour it"
        )
    if dropout and not getattr(context, "without_dropout", False):
        raise ValueError(f"{who} asks for attention dropout {dropout}, and mtpkern has none: call model.eval()")
    unknown = [name for name, x in kwargs.items() if isinstance(x, Tensor) and name not in _KNOWN_TENSORS]
    if unknown:
        raise ValueError(
            f"{who} passes {', '.join(unknown)} to its attention, which mtpkern does not know how to honour"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    # Not through typing.cast, for which torch.compile would look at the number and compile every layer anew.
    layer: Any = module.layer_idx
    out = context.attend(layer, query, key, value, Scoring(scale, sliding_window, softcap, s_aux))
    return out.contiguous(), None  # as of transformers' own functions, since some layers view it


def _plain_attention(module: torch.nn.Module) -> Callable[..., Any]:
    """The attention function of a layer that nobody routes, but whose config has answered as if: see `routing.asks`."""
    name = plain_name(getattr(module, "config", None))
    if name in (None, NAME, APART):
        raise RuntimeError(
            f"attention {NAME!r} is mtpkern's own and runs only inside mtpkern.generate or attention_context; "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    plain = ALL_ATTENTION_FUNCTIONS.get(name, eager)
    assert plain is not None, f"{type(module).__name__} has no {name} attention"
    return plain


def capturing_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    """The layer's own attention; the context of the block gets its key and value [B, Hkv, T, D] besides."""
    route_of(module.config).take(module.layer_idx, key, value)
    return _plain_attention(module)(module, query, key, value, attention_mask, **kwargs)


def _plain_mask(*args: Any, config: Any, **kwargs: Any) -> Any:
    """The mask for the model's own attention."""
    return ALL_MASK_ATTENTION_FUNCTIONS[plain_name(config)](*args, config=config, **kwargs)


def _looked_at(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """In the place of attention nothing: the context of the block gets a layer's mask and the window that it tells."""
    route_of(module.config).look(module.layer_idx, attention_mask, sliding_window)
    return query.new_zeros(*query.shape[:1], query.shape[2], query.shape[1], value.shape[-1]), None


def _whole_mask(*args: Any, **kwargs: Any) -> Any:
    """A mask [B, 1, T, S] of bools, also where sdpa would go without."""
    return AttentionMaskInterface()["sdpa"](*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(NAME, mtpkern_attention)
AttentionInterface.register(APART, torch.compiler.disable(mtpkern_attention))
AttentionInterface.register(CAPTURE, capturing_attention)
AttentionMaskInterface.register(CAPTURE, _plain_mask)
AttentionInterface.register(MASKS, _looked_at)
AttentionMaskInterface.register(MASKS, _whole_mask)


class _Turn:
    """Whose turn a model's run is."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.thread: int | None = None
        # Whether the run was a thread's that this process, a fork, has not got.
        self.lost = False


_turns: WeakKeyDictionary[torch.nn.Module, _Turn] = WeakKeyDictionary()
_turns_lock = Lock()


def _after_fork() -> None:
    """In a child there is the thread that forked, and no other: what those held would be waited for in vain."""
    global _turns_lock
    _turns_lock = Lock()
    for turn in list(_turns.values()):
        turn.lost |= turn.lock.locked() and turn.thread != get_ident()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def exclusive(model: PreTrainedModel, *, wait: bool = True) -> Iterator[None]:
    """Keep the model to one run, which has its buffers, graphs and hooks to itself; others wait in line.

    Raises RuntimeError where the same thread holds the model already, which would wait for itself, and with wait=False
    where any other does; and in a forked process, where another thread ran the model at the fork: it is half-way in it.
    """
    with _turns_lock:
        turn = _turns.setdefault(model, _Turn())
    if turn.lost:
        raise RuntimeError(
            f"this {type(model).__name__} was in the middle of a run of mtpkern, in another thread, when this process "
            "was forked from its parent; decode with a copy (copy.deepcopy), or fork where nothing runs"
        )
    if turn.thread == get_ident():
        raise RuntimeError(
            f"this {type(model).__name__} is already running inside mtpkern, in this very thread: end that run, or "
            "leave its attention_context, before the next begins"
        )
    # By `with`, which Ctrl-C cannot come between, as between a call of `acquire` and what follows it.
    with turn.lock if wait else _at_once(turn.lock, model):
        try:
            turn.thread = get_ident()
            yield
        finally:
            turn.thread = None


@contextmanager
def _at_once(lock: Lock, model: PreTrainedModel) -> Iterator[None]:
    """A lock that nobody else has."""
    if not lock.acquire(blocking=False):
        raise RuntimeError(
            f"this {type(model).__name__} is already running inside mtpkern, in another thread; run one call at a time "
            "or leave out wait=False to wait in line"
        )
    try:
        yield
    finally:
        lock.release()


def ended_by_interrupts(run: Callable[P, T]) -> Callable[P, T]:
    """`run`, of which Ctrl-C leaves no context open: one that it has kept from ending ends before the caller is told.

    It would end when the traceback goes, which a notebook keeps, or in the middle of the next run.
    """

    @wraps(run)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return run(*args, **kwargs)
        except BaseException as error:
            if not isinstance(error, Exception):
                clear_frames(error.__traceback__)
            raise

    return call


@contextmanager
def routed(model: PreTrainedModel, context: AttentionContext) -> Iterator[dict[str, AttentionContext]]:
    """`attention_context` for those who already hold the model."""
    with routed_config(model.config.get_text_config(decoder=True), context):
        yield {"mtpkern": context}


def captured(model: PreTrainedModel, context: Any) -> AbstractContextManager[None]:
    """Inside the block `context.take(layer, key, value)` gets what the model's own attention works on."""
    return routed_config(model.config.get_text_config(decoder=True), context, CAPTURE)


def masks_shown(model: PreTrainedModel, context: Any) -> AbstractContextManager[None]:
    """Inside the block no layer attends; `context.look(layer, mask, window)` gets what each would have gone by."""
    return routed_config(model.config.get_text_config(decoder=True), context, MASKS)


def unrouted(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Inside the block, which may lie in one of `routed`, this thread runs the model with its own attention."""
    config = model.config.get_text_config(decoder=True)
    own = plain_name(config)
    return nullcontext() if own is None else routed_config(config, None, own)


@contextmanager
def attention_context(model: PreTrainedModel, context: AttentionContext) -> Iterator[dict[str, AttentionContext]]:
    """Route the model's attention through `context` inside the block; yields the keyword arguments for the model call.

        with attention_context(model, context) as route:
            logits = model(input_ids=ids, position_ids=positions, use_cache=False, **route).logits

    Only calls of this thread are routed, and of activation checkpointing the second forward, which autograd may run in
    a thread of its own: a block that was opened where gradients are recorded, and stays open around backward, covers
    it. Another run of the same model is waited for; raises RuntimeError where this thread has one open itself.
    """
    with exclusive(model), routed(model, context) as route:
        yield route
