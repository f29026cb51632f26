"""The gate of a gated adapter: which rows of the running pass are adapted, and what stands for the mask token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mtpkern.adapter_config import GatedSettings
from mtpkern.siblings import adapt


class Gate:
    """Which rows of the running pass are adapted, and the embedding row of the mask token [H]; one for a model.

    Closed, which it is wherever no block of this thread has opened it, adapters add nothing.

    with gate.open(input_ids == gate.mask_token_id):
        logits = model(input_ids=input_ids, ...).logits
    """

    def __init__(self, settings: GatedSettings, row: nn.Parameter) -> None:
        self.settings = settings
        self.mask_token_id = settings.mask_token_id
        self.row = row
        # A training pass, whose rows are masks all of them; seen by all threads, because activation checkpointing runs
        # the forward again in one of autograd's.
        self.all_rows = False
        # What torch.compile reads, which knows no context variables; the thread that holds the model has opened it.
        self.opened: Tensor | bool = False

    def record(self, **settings: Any) -> None:
        """Change what the adapter's folder will record."""
        self.settings = replace(self.settings, **settings)

    @property
    def rows(self) -> Tensor | bool:
        """The adapted rows [B, T] bool of this thread's pass; True for all, False for none."""
        if self.all_rows:
            return True
        if torch.compiler.is_compiling():
            return self.opened
        opened = _opened.get()
        return opened[1] if opened is not None and opened[0] is self else False

    @contextmanager
    def open(self, rows: Tensor) -> Iterator[None]:
        """Adapt these rows [B, T] of the passes inside the block."""
        before, opened = self.opened, _opened.get()
        try:
            self.opened = rows
            _opened.set((self, rows))
            yield
        finally:
            # One call and no more: behind each Ctrl-C may come.
            self.opened = before
            _opened.set(opened)

    @contextmanager
    def open_for_training(self, all_rows: bool = True) -> Iterator[None]:
        """Adapt all rows inside the block, which stays open around backward; other threads see it too."""
        before, self.all_rows = self.all_rows, all_rows
        try:
            yield
        finally:
            self.all_rows = before

    def closed(self) -> AbstractContextManager[None]:
        """A block that adapts none, which is the base's own part of a training pass."""
        return self.open_for_training(False)

    def hide_mask_tokens(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before the embedding: it has no row for the mask token, so any other stands in."""
        ids = args[0]
        return (ids.masked_fill(ids == self.mask_token_id, 0), *args[1:])

    def embed_mask_tokens(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Behind the embedding: the mask token's own row in its place."""
        rows = self.rows
        if rows is False:
            return output
        row = self.row.to(output.dtype).expand_as(output)
        # In memory as any other, so that what torch.compile makes of later layers serves the first.
        return row.contiguous() if rows is True else torch.where(rows.unsqueeze(-1), row, output)  # type: ignore[union-attr]


_opened: ContextVar[tuple[Gate, Tensor] | None] = ContextVar("mtpkern_gate", default=None)


@dataclass
class GatedLora:
    """What a LoRA layer of peft does in place of its plain update: one object for all layers of a model."""

    gate: Gate

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """result [B, T, N] of the base's layer for x [B, T, H], with the update in its gated rows."""
        rows = self.gate.rows
        if rows is False:
            return result
        a, b, scale = (part[active_adapter] for part in (module.lora_A, module.lora_B, module.scaling))
        if rows is True or torch.is_grad_enabled():  # the op has no backward
            low = a(module.lora_dropout[active_adapter](x))
            if rows is not True:
                low = torch.where(rows.unsqueeze(-1), low, 0.0)
            # Added by the product itself: nothing else of the update's size is made, or kept for backward.
            base = result.to(low.dtype)
            return torch.addmm(base.flatten(0, -2), low.flatten(0, -2), b.weight.T, alpha=scale).view_as(result)
        adapt([result], x, rows, [module], [active_adapter])
        return result

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("a gated adapter acts on mask rows only and cannot be merged into the weights; keep it apart")

    merge_safe = merge_unsafe = unmerge = _refuse
