"""LoRA layers that read the same tensor (q, k and v; gate and up), adapted together: one pair of launches for all.

Which layers those are, a first pass shows, whatever their names: children of one module that were called with the very
same tensor. From then on the first of them runs the base's layers of all, in their order, adapts their outputs at once
and leaves the others theirs. Each of these looks whether it is called with that very tensor, and gives out what was
left for it, once; called with any other, it runs by itself, as do layers whose adapters have been changed.

In a pass without mask rows, where the host knows that it is one, each layer is the base's alone: what peft does around
it took a tenth of a pass of one row on a CPU.

A layer has a forward of its own only while a pass runs, and what was left and not fetched goes with the pass. Taken for
granted is that nothing is written into a tensor between its readers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn

from mtpkern.kernels.gated_lora import gated_lora

if TYPE_CHECKING:
    from peft.tuners.lora import Linear


class Siblings:
    """The siblings of a model that carries a gated adapter; a pass inside the block that a call opens runs them so.

        siblings = Siblings(model)
        with gate.open(input_ids == gate.mask_token_id), siblings():
            logits = model(input_ids=input_ids, ...).logits

    The first such pass runs as it is and is watched. The caller holds the model (see `exclusive`).
    """

    def __init__(self, model: nn.Module) -> None:
        from peft.tuners.lora import Linear

        def fits(layer: nn.Module) -> bool:
            # LoRA layers of quantised ones have a forward of their own.
            plain = isinstance(layer, Linear) and type(layer).forward is Linear.forward
            return plain and isinstance(layer.base_layer, nn.Linear)

        self.layers = [layer for layer in model.modules() if fits(layer)]
        families = [[layer for layer in parent.children() if fits(layer)] for parent in model.modules()]
        # Layers that may have siblings, and a number for their parent.
        self.parents = {layer: i for i, family in enumerate(families) if len(family) > 1 for layer in family}
        self.found: list[tuple[Linear, ...]] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """A pass of this thread inside the block runs siblings together."""
        if self.found is None:
            with self._watched():
                yield
            return
        # Where somebody else has put a forward, it stays, and its siblings go without, too.
        free = [group for group in self.found if not any("forward" in vars(layer) for layer in group)]
        try:
            for group in free:
                for layer in group:
                    # Past nn.Module's own way to set an attribute, which takes longer than all else here. Methods are
                    # of one kind to torch.compile, so that its forms serve many layers.
                    others = group[1:] if layer is group[0] else ()
                    vars(layer).update(forward=MethodType(_forward, layer), mtpkern_others=others, mtpkern_left=None)
            yield
        finally:
            for group in free:
                for layer in group:
                    for name in ("forward", "mtpkern_others", "mtpkern_left"):
                        vars(layer).pop(name, None)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A pass of this thread inside the block, without mask rows, runs the base's layers past peft's."""
        # Methods of one kind, as above; a forward that somebody else has put stays.
        free = [layer for layer in self.layers if "forward" not in vars(layer)]
        try:
            for layer in free:
                vars(layer)["forward"] = MethodType(_base_forward, layer)
            yield
        finally:
            for layer in free:
                vars(layer).pop("forward", None)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Note who reads what inside the block; behind it the siblings are known, if anybody was seen."""
        readers: dict[int, list[tuple[ref[Tensor], list[Linear]]]] = {}

        def note(layer: Any, args: tuple[Any, ...]) -> None:
            if torch.compiler.is_compiling() or not args:
                return
            known = readers.setdefault(self.parents[layer], [])
            for x, layers in known:
                if x() is args[0] and layer not in layers:
                    layers.append(layer)
                    return
            known.append((ref(args[0]), [layer]))

        handles = [layer.register_forward_pre_hook(note) for layer in self.parents]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if readers or not self.parents:
            self.found, taken = [], set[nn.Module]()
            for _, layers in (reader for known in readers.values() for reader in known):
                # A layer that is called several times in a pass has the same siblings each time, or one time's.
                if len(layers) > 1 and taken.isdisjoint(layers):
                    taken.update(layers)
                    self.found.append(tuple(layers))


def _base_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a LoRA layer while no row is a mask: the base's, where the gated adapter is all it would add."""
    if args or kwargs or _adapter(layer) is None:
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    return layer.base_layer(x)  # type: ignore[no-any-return]


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a LoRA layer that has siblings, while a pass runs.

    Such a layer holds those behind it, where it is the first, and what the first has read and made for it.
    """
    left = layer.mtpkern_left
    layer.mtpkern_left = None
    if not args and not kwargs:
        if left is not None and left[0] is x:
            return left[1]
        if layer.mtpkern_others:
            y = _together((layer, *layer.mtpkern_others), x)
            if y is not None:
                return y
    return type(layer).forward(layer, x, *args, **kwargs)


def _together(layers: Sequence[Any], x: Tensor) -> Tensor | None:
    """The first one's output, and those of the others left with them; None where they do not go together."""
    names = [_adapter(layer) for layer in layers]
    if None in names or torch.is_grad_enabled():
        return None
    gates = [layer.lora_variant[name].gate for layer, name in zip(layers, names)]
    rows = gates[0].rows
    if not isinstance(rows, Tensor) or any(gate is not gates[0] for gate in gates):
        return None
    dtypes = [(layer.lora_A[name].weight.dtype, layer.base_layer.weight.dtype) for layer, name in zip(layers, names)]
    if any(pair != dtypes[0] for pair in dtypes):
        return None
    outs = [layer.base_layer(x) for layer in layers]
    adapt(outs, x, rows, layers, names)
    for layer, y in zip(layers[1:], outs[1:]):
        layer.mtpkern_left = x, y
    return outs[0]


def _adapter(layer: Any) -> str | None:
    """The name of the gated adapter, where it is all that a layer has to add."""
    if layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    # None but ours know a gate.
    return names[0] if len(names) == 1 and hasattr(layer.lora_variant.get(names[0]), "gate") else None


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
