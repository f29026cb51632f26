"""LoRA layers that read the same tensor (q, k and v; gate and up), adapted together: one pair of launches for all.

Which layers those are, a first pass shows, whatever their names: children of one module that were called with the very
same tensor. From then on the first of them runs the base's layers of all, in their order, adapts their outputs at once
and leaves the others theirs. Each of these looks whether it is called with that very tensor, and gives out what was
left for it, once; called with any other, it runs by itself, as do layers whose adapters have been changed.

A layer has a forward of its own only while a pass runs, and what was left and not fetched goes with the pass. Taken for
granted is what holds of all models known: nothing is written into a tensor between its readers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn

from mtpkern.kernels.gated_lora import gated_lora

if TYPE_CHECKING:
    from peft.tuners.lora import Linear


class Opened(Protocol):
    """What is known of the running pass (see `mtpkern.adapter.Gate`)."""

    @property
    def rows(self) -> Tensor | bool:
        """The adapted rows [B, T] bool; True for all, False for none."""


class Siblings:
    """The siblings of a model that carries a gated adapter; a pass inside the block that a call opens runs them so.

        siblings = Siblings(model, gate)
        with gate.open(input_ids == gate.mask_token_id), siblings():
            logits = model(input_ids=input_ids, ...).logits

    The first such pass runs as it is and is watched. The caller holds the model (see `exclusive`).
    """

    def __init__(self, model: nn.Module, gate: Opened) -> None:
        from peft.tuners.lora import Linear

        self.gate = gate
        # LoRA layers that stand side by side in one module, candidates.
        self.families = [
            [
                child
                for child in parent.children()
                # Those of quantised layers have a forward of their own.
                if isinstance(child, Linear)
                and type(child).forward is Linear.forward
                and isinstance(child.base_layer, nn.Linear)
            ]
            for parent in model.modules()
        ]
        self.found: list[list[_Sibling]] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """A pass of this thread inside the block runs siblings together."""
        if self.found is None:
            with self._watched():
                yield
            return
        # Where somebody else has put a forward, it stays, and the others go without.
        free = [group for group in self.found if not any("forward" in vars(sibling.layer) for sibling in group)]
        mine = [sibling for group in free for sibling in group]
        try:
            for sibling in mine:
                # Past nn.Module's own way to set an attribute, which takes longer than all else here.
                vars(sibling.layer)["forward"] = sibling
            yield
        finally:
            for sibling in mine:
                vars(sibling.layer).pop("forward", None)
                sibling.left = None

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Note who reads what inside the block; known are the siblings behind it, if anybody was seen."""
        readers: dict[int, list[tuple[ref[Tensor], list[Linear]]]] = {}
        place = {layer: i for i, family in enumerate(self.families) if len(family) > 1 for layer in family}

        def note(layer: Any, args: tuple[Any, ...]) -> None:
            if torch.compiler.is_compiling() or not args:
                return
            known = readers.setdefault(place[layer], [])
            for x, layers in known:
                if x() is args[0] and layer not in layers:
                    layers.append(layer)
                    return
            known.append((ref(args[0]), [layer]))

        handles = [layer.register_forward_pre_hook(note) for layer in place]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if readers or not place:
            self.found, taken = [], set()
            for _, layers in (reader for known in readers.values() for reader in known):
                # A layer that is called several times in a pass has the same siblings each time, or one time's.
                if len(layers) > 1 and taken.isdisjoint(layers):
                    taken.update(layers)
                    group = [_Sibling(layer, self.gate) for layer in layers]
                    group[0].others = tuple(group[1:])
                    self.found.append(group)


class _Sibling:
    """The forward of a LoRA layer that has siblings, while a pass runs."""

    def __init__(self, layer: Linear, gate: Opened) -> None:
        self.layer = layer
        self.gate = gate
        # Those behind it, where it is the first.
        self.others: tuple[_Sibling, ...] = ()
        # What the first has read and made for this one.
        self.left: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        left, self.left = self.left, None
        if not args and not kwargs:
            if left is not None and left[0] is x:
                return left[1]
            rows = self.gate.rows
            if self.others and isinstance(rows, Tensor) and not torch.is_grad_enabled():
                outs = self._together(x, rows)
                if outs is not None:
                    return outs
        return type(self.layer).forward(self.layer, x, *args, **kwargs)

    def _together(self, x: Tensor, rows: Tensor) -> Tensor | None:
        """This one's output, and those of the others left with them; None where they do not go together."""
        siblings = (self, *self.others)
        layers = [sibling.layer for sibling in siblings]
        names = [sibling._adapter() for sibling in siblings]
        if None in names:
            return None
        kinds = [(layer.lora_A[name].weight.dtype, layer.base_layer.weight.dtype) for layer, name in zip(layers, names)]
        if any(kind != kinds[0] for kind in kinds):
            return None
        outs = [layer.base_layer(x) for layer in layers]
        adapt(outs, x, rows, layers, names)
        for sibling, y in zip(self.others, outs[1:]):
            sibling.left = x, y
        return outs[0]

    def _adapter(self) -> str | None:
        """The gated adapter's name, where it is all that this layer has to add."""
        layer = self.layer
        if layer.disable_adapters or layer.merged:
            return None
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if len(names) != 1 or names[0] not in layer.lora_variant:
            return None
        return names[0] if getattr(layer.lora_variant[names[0]], "gate", None) is self.gate else None


def adapt(outs: Sequence[Tensor], x: Tensor, rows: Tensor, layers: Sequence[Any], names: Sequence[Any]) -> None:
    """Add what LoRA layers of peft make of x [B, T, H] to outputs of their base [B, T, N_i], in place, in rows [B, T].

    names   of each layer's adapter

    adapt([y], x, rows, [layer], ["default"])
    """
    adapters = list(zip(layers, names))
    gated_lora(
        [y.flatten(0, -2) for y in outs],
        x.to(outs[0].dtype).flatten(0, -2),
        rows.flatten(),
        [layer.lora_A[name].weight for layer, name in adapters],
        [layer.lora_B[name].weight for layer, name in adapters],
        [layer.scaling[name] for layer, name in adapters],
    )
