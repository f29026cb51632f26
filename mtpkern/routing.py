"""What a config answers when transformers asks for the attention function: ours in a routed thread, its own elsewhere.

Configs are shared, by threads and by models, so nothing is written into them. For the length of a block a config's
class is a subclass that differs in one property, which looks up whether this thread has the block open:
`_attn_implementation`. Copies, pickles, comparisons and JSON are those of the plain class.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from mtpkern.kernels.scoring import Scoring

# The names that a config answers in a block: of our attention, of the same where torch.compile may not look inside, of
# the model's own with its keys and values taken, and of none, whose masks are looked at.
NAME = "mtpkern"
APART = "mtpkern_apart"
CAPTURE = "mtpkern_capture"
MASKS = "mtpkern_masks"


class AttentionContext(Protocol):
    """What a pass brings along: the one object that knows which keys a row sees."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Attend with query [B, Hq, T, D] to key and value [B, Hkv, T, D] of this pass; returns [B, T, Hq, D]."""
        ...


@dataclass(eq=False)
class _Block:
    """A block that is open; bare: as far as seen, the model hands no keyword arguments on to its layers."""

    context: Any
    name: str
    trains: bool = field(default_factory=torch.is_grad_enabled)
    bare: bool = False


# The blocks that this thread has open, and those of all threads, by the config's id: the innermost of a config last.
_here: ContextVar[dict[int, _Block]] = ContextVar("mtpkern_blocks")
_apart: ContextVar[bool] = ContextVar("mtpkern_apart", default=False)
_everywhere: dict[int, list[_Block]] = {}
_lock = Lock()


def _after_fork() -> None:
    """A thread that held the lock at a fork is not there to let it go."""
    global _lock
    _lock = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def routed_config(config: PreTrainedConfig, context: Any, name: str = NAME) -> Iterator[None]:
    """Have the config answer `name` to this thread inside the block, and its layers find `context`."""
    block, outer = _Block(context, name), _here.get({}).get(id(config))
    try:
        with _lock:
            plain: Any = _plain_kind(type(config))
            _everywhere.setdefault(id(config), []).append(block)
            config.__class__ = _answering(plain)
        _here.set({**_here.get({}), id(config): block})
        yield
    finally:
        try:
            _close(config, block, outer)
        except BaseException:  # Ctrl-C in the middle of it
            _close(config, block, outer)
            raise


def _close(config: PreTrainedConfig, block: _Block, outer: _Block | None) -> None:
    """End a block; `outer` is the one of the same config that it stands in. Twice is as good as once."""
    here = _here.get({})
    if here.get(id(config)) is block:
        others = {key: other for key, other in here.items() if key != id(config)}
        _here.set(others if outer is None else {**others, id(config): outer})
    with _lock:
        left = [other for other in _everywhere.get(id(config), ()) if other is not block]
        if left:
            _everywhere[id(config)] = left
        else:
            _everywhere.pop(id(config), None)
            plain: Any = _plain_kind(type(config))
            config.__class__ = plain


@contextmanager
def attention_apart() -> Iterator[None]:
    """Inside the block our attention is no part of what torch.compile makes of the layers around it, in this thread."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def route_of(config: PreTrainedConfig | None) -> Any:
    """The context for a layer that has been handed none: of the block that this thread, or its backward, runs in."""
    block = _here.get({}).get(id(config))
    if block is not None:
        block.bare = True
    elif _in_backward():
        block = next((x for x in reversed(_everywhere.get(id(config), [])) if x.trains and x.bare), None)
    return None if block is None else block.context


def plain_name(config: PreTrainedConfig | None) -> str | None:
    """The attention function that a config names where nobody is routed."""
    return getattr(config, "_attn_implementation_internal", None)


# To torch.compile the answer is a constant of what it compiles, which it looks up anew for each class of the config and
# each set of keyword arguments: inside of a block and outside.
@torch.compiler.assume_constant_result
def asks(config: PreTrainedConfig) -> str | None:
    """The name for the one who asks, if routed: this thread has a block open, or is autograd's at work for one.

    Autograd's threads know nothing of whose backward they run. There the answer is ours for all, and the attention
    function looks at what the layer has been called with: only a routed forward has brought a context.
    """
    block = _here.get({}).get(id(config))
    if block is not None:
        return APART if block.name == NAME and _apart.get() else block.name
    trains = _in_backward() and any(block.trains for block in _everywhere.get(id(config), ()))
    return NAME if trains else None


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _plain_kind(kind: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The class of a config where nobody has a block open."""
    return vars(kind).get("mtpkern_plain", kind)


@cache
def _answering(plain: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The subclass of a config's class that answers by the thread; to pickle and copy it is the plain one."""
    own: Any = plain._attn_implementation

    def answer(self: PreTrainedConfig) -> str | None:
        return asks(self) or own.fget(self)

    def equal(self: PreTrainedConfig, other: object) -> bool:
        return as_plain(self) == as_plain(other)

    def as_plain(config: Any) -> Any:
        if not isinstance(config, routing):
            return config
        same = object.__new__(plain)
        same.__dict__.update(vars(config))
        return same

    def reduce(self: PreTrainedConfig, protocol: Any) -> tuple[Any, ...]:
        return object.__new__, (plain,), dict(vars(self))

    kept = ("__module__", "__qualname__", "__doc__", "__init__", "__hash__")
    held = {name: getattr(plain, name) for name in kept} | {"__eq__": equal, "__reduce_ex__": reduce}
    held["_attn_implementation"] = property(answer, own.fset)
    held["mtpkern_plain"] = plain
    routing: type[PreTrainedConfig] = type(plain.__name__, (plain,), held)
    return routing
