"""The decoder layers of a model through torch.compile, one by one, which fuses what lies between their products.

Layers are alike: a few forms, made in the time of one layer, serve all of them. Attention is kept out: it writes the
caches of its own layer, and a form that looked inside would be one layer's. So a layer is compiled in the parts before
and behind its attention, which costs nothing in a CUDA graph. It has a forward of its own only while a pass of this
thread runs; other threads, `fingerprint`, saving and whoever looks at the model meanwhile know nothing of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mtpkern.output import first_line
from mtpkern.routing import attention_apart

# Whether `compile=None` means yes for a captured pass: on an H200 one of Qwen3-4B with 16 rows takes 1.78 times as long
# without, one of SmolLM2-135M with one row twice as long (bench/results/h200). No CPU gains by it.
COMPILE_CAPTURED = True
# Of torch.compile.
BACKEND = "inductor"
# Forms of one piece of code, for models and shapes; torch's own limit is eight. Behind it nothing runs as it is unsaid.
_LIMIT: dict[str, Any] = {"recompile_limit": 256, "fail_on_recompile_limit_hit": True}


def wants_compile(compile: bool | None, captured: bool) -> bool:
    """Whether layers are compiled: what was asked for, or None for where it pays."""
    return COMPILE_CAPTURED and captured if compile is None else compile


class CompiledLayers:
    """The decoder layers of a model, compiled for fixed shapes inside the block that a call opens.

    Compiling takes place in the first passes of a shape. A model without layers of the kind that transformers
    checkpoints, or with one that torch.compile cannot take, runs as it is, which a RuntimeWarning announces.

        layers = CompiledLayers(model)
        with attention_context(model, context) as route, layers():
            logits = model(input_ids=ids, position_ids=positions, use_cache=False, **route).logits
    """

    def __init__(self, model: nn.Module) -> None:
        self.thread: int | None = None
        self.failed = False
        self.calls = [(layer, self._call(layer.forward)) for layer in decoder_layers(model)]
        if not self.calls:
            self._announce(f"{type(model).__name__} has no decoder layers of the kind that transformers can checkpoint")

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """A pass of this thread inside the block runs compiled. The caller holds the model (see `exclusive`)."""
        if self.failed:
            yield
            return
        # Past nn.Module's own way to set an attribute, which takes longer than all else here.
        before = [vars(layer).get("forward") for layer, _ in self.calls]
        self.thread = get_ident()

        def undo() -> None:
            for (layer, _), forward in zip(self.calls, before):
                if forward is None:
                    vars(layer).pop("forward", None)
                else:
                    vars(layer)["forward"] = forward
            self.thread = None

        try:
            for layer, call in self.calls:
                vars(layer)["forward"] = call
            with attention_apart(), torch._dynamo.config.patch(_LIMIT):
                yield
        finally:
            try:
                undo()
            except BaseException:  # Ctrl-C in the middle of it
                undo()
                raise

    def _call(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        fast = torch.compile(forward, dynamic=False, backend=BACKEND)
        return or_as_it_is(fast, forward, self._announce, lambda: not self.failed and get_ident() == self.thread)

    def _announce(self, reason: str) -> None:
        self.failed = True
        warnings.warn(
            "torch.compile could not compile the model's layers, which run uncompiled; pass compile=False, or look "
            f"into it: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )


def or_as_it_is(
    fast: Callable[..., Any], forward: Callable[..., Any], announce: Callable[[str], None], runs: Callable[[], bool]
) -> Callable[..., Any]:
    """A layer's compiled form where it `runs()`, else its own; so where it cannot be compiled, which is announced."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not runs():
            return forward(*args, **kwargs)
        try:
            return fast(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler's may be anything
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise  # of the capture, and announced there
            error = getattr(error, "inner_exception", error)  # what torch wraps says more
            announce(first_line(error))
        return forward(*args, **kwargs)

    return call


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the kind that transformers checkpoints, those inside of another left out."""
    found: list[nn.Module] = []
    for module in model.children():
        found += [module] if isinstance(module, GradientCheckpointingLayer) else decoder_layers(module)
    return found
