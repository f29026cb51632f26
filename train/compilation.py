"""torch.compile for a training step: each decoder layer of student and teacher, and nothing else.

Layers are alike: one form serves all of them. Between the steps they have their own forward again, so that evaluation,
decoding and saving know nothing of it. Where rows attend to keys of their layer that another pass has read, a form that
looked into attention would be one layer's: there it is kept out, as in decoding (mtpkern.layers).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mtpkern.layers import or_as_it_is
from mtpkern.routing import attention_apart
from mtpkern.train.arguments import refuse
from mtpkern.train.objective import forward_as

CUDA_GRAPH_MODES = {"reduce-overhead", "max-autotune"}
# With gradients and without, adapters on and off, windows, a batch of one: torch's own limit of eight could end it.
FORMS = 64


class CompiledLayers:
    """The decoder layers of models, compiled inside the context that a call opens.

    backend     of torch.compile, as mode; none that makes CUDA graphs, because a step's shape changes
    apart       whether attention is kept out of the forms
    if_it_can   layers that cannot be compiled run as they are, which a RuntimeWarning announces; else that is an error

    Forms are made for any shape from the start. One for the first shape alone would round differently from the one
    that later replaces it, and a resumed run would not equal an uninterrupted one. Raises ValueError for a model
    without the layers that transformers checkpoints; a layer that cannot be compiled whole is torch's own error.

        layers = CompiledLayers(student, teacher)
        with layers():
            mtp_loss(...).span.backward()
    """

    def __init__(
        self,
        *models: nn.Module,
        backend: str = "inductor",
        mode: str | None = None,
        apart: bool = False,
        if_it_can: bool = False,
    ) -> None:
        self.apart = apart
        self.failed = False
        self.forwards = []
        for model in models:
            layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
            if not layers:
                says = f"{type(model).__name__} has no decoder layers of the kind that transformers can checkpoint"
                refuse(not if_it_can, f"{says}: expected some to compile; leave out torch_compile")
                self._announce(says)
            for layer in layers:
                compiled = torch.compile(layer.forward, dynamic=True, fullgraph=not apart, backend=backend, mode=mode)
                if if_it_can:
                    compiled = or_as_it_is(compiled, layer.forward, self._announce, lambda: not self.failed)
                self.forwards.append((layer, compiled))

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Keep it open around backward, in which activation checkpointing runs the layers again."""
        if self.failed:
            yield
            return
        # For any sizes, not for those that happen to be equal in the first step.
        any_shape = torch.fx.experimental._config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
        with ExitStack() as stack:
            stack.enter_context(any_shape)
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=FORMS, fail_on_recompile_limit_hit=True))
            if self.apart:
                stack.enter_context(attention_apart())
            for layer, compiled in self.forwards:
                stack.enter_context(forward_as(layer, compiled))
            yield

    def _announce(self, reason: str) -> None:
        self.failed = True
        warnings.warn(
            "torch.compile could not compile the model's layers, which train uncompiled; set torch_compile: false, or "
            f"look into it: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
