"""Layers that read the same tensor (q, k and v; gate and up), run together: LoRA layers in two launches, or in one.

Which layers those are, a first pass shows, whatever their names: children of one module that were called with the very
same tensor. From then on the first of them runs all, in their order, and leaves the others their outputs. Each of these
looks whether it is called with that very tensor, and gives out what was left for it, once; called with any other, or in
another thread's pass, it runs by itself. `Siblings` runs the base's layers one by one and adapts their outputs at once;
`mtpkern.products` makes one product of plain layers, and of the A of LoRA layers with them, so that one launch is left.

In a pass without mask rows, where the host knows that it is one, each layer is the base's alone: what peft does around
it took a tenth of a pass of one row on a CPU.

A layer has a forward of its own only while a pass runs, and what was left and not fetched goes with the pass, by Ctrl-C
in the midst of going too. Taken for granted is that nothing is written into a tensor between its readers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from types import MethodType
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mtpkern.kernels.gated_lora import gated_expand, gated_lora
from mtpkern.recorder import apart

if TYPE_CHECKING:
    from peft.tuners.lora import Linear


class Siblings:
    """Runs the siblings of a model with a gated adapter together, in a block; the caller holds the model (`exclusive`).

    siblings = Siblings(model)
    with gate.open(input_ids == gate.mask_token_id), siblings():
        logits = model(input_ids=input_ids, ...).logits
    """

    def __init__(self, model: nn.Module) -> None:
        from peft.tuners.lora import Linear

        def fits(layer: nn.Module) -> bool:
            # LoRA layers of quantised ones have a forward of their own.
            plain = isinstance(layer, Linear) and type(layer).forward is Linear.forward
            return plain and isinstance(layer.base_layer, nn.Linear)

        self.layers = [layer for layer in model.modules() if fits(layer)]
        families = [[layer for layer in parent.children() if fits(layer)] for parent in model.modules()]
        self.families = [family for family in families if len(family) > 1]
        self.found: list[tuple[Linear, ...]] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """A pass of this thread inside the block runs siblings together."""
        if self.found is None:
            with watched(self.families) as readers:
                yield
            if readers or not self.families:
                self.found = disjoint(readers)
            return
        with together((group, _adapted, {}) for group in self.found):
            yield

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A pass of this thread inside the block, without mask rows, runs the base's layers past peft's."""
        # A forward that somebody else has put stays.
        free = [layer for layer in self.layers if "forward" not in vars(layer)]
        try:
            for layer in free:
                vars(layer)["forward"] = MethodType(_base_forward, layer)
            yield
        finally:
            try:
                _strip(free, "forward")
            except BaseException:
                _strip(free, "forward")
                raise


@contextmanager
def watched(families: Iterable[Sequence[nn.Module]]) -> Iterator[list[list[Any]]]:
    """Note which layers of a family read the same tensor inside the block: a list of them for each such tensor.

    with watched([[q, k, v]]) as readers:
        q(x), k(x), v(y)
    readers  # [[q, k], [v]]
    """
    readers: list[list[Any]] = []
    hooks: list[RemovableHandle] = []

    def note(known: list[tuple[ref[Tensor], list[Any]]], layer: Any, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or not args:
            return
        for x, layers in known:
            if x() is args[0] and layer not in layers:
                layers.append(layer)
                return
        readers.append([layer])
        known.append((ref(args[0]), readers[-1]))

    def unhook() -> None:
        for hook in hooks:
            hook.remove()

    try:
        for family in families:
            noted = partial(note, [])
            for layer in family:
                hooks.append(layer.register_forward_pre_hook(noted))
        yield readers
    finally:
        try:
            unhook()
        except BaseException:
            unhook()
            raise


def disjoint(readers: Iterable[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Those that are several, each layer once: called several times in a pass it has one time's siblings."""
    found, taken = [], set[nn.Module]()
    for layers in readers:
        if len(layers) > 1 and taken.isdisjoint(layers):
            taken.update(layers)
            found.append(tuple(layers))
    return found


# Layers, what runs them together, and what it looks up as attributes of the first.
Group = tuple[Sequence[nn.Module], Callable[[Sequence[Any], Tensor], Sequence[Tensor] | None], dict[str, Any]]


class _Turn:
    """What a layer that is run with others holds while a pass runs; no attributes of a module, which take µs to set.

    thread   whose pass it is
    run      of the first of them, what runs all; of the others None
    others   of the first, those behind it
    left     of the others, the tensor that the first has read and what this one makes of it, until it is fetched

    In a copy of the model that is made then, nothing: whose layers run by themselves.
    """

    def __init__(self, thread: int, run: Callable[..., Any] | None, others: Sequence[nn.Module]) -> None:
        self.thread, self.run, self.others = thread, run, others
        self.left: tuple[Tensor, Tensor] | None = None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


@contextmanager
def together(groups: Iterable[Group]) -> Iterator[None]:
    """A pass of this thread inside the block runs the layers of each group at once.

    run(layers, x) returns their outputs, or None where each is to run by itself. Where somebody else has put a forward,
    it stays, and its siblings go without, too.
    """
    free = [group for group in groups if not any("forward" in vars(layer) for layer in group[0])]
    thread = get_ident()
    try:
        for layers, run, more in free:
            first, *others = layers
            # Methods are of one kind to torch.compile, so that its forms serve many layers.
            vars(first).update(forward=MethodType(_forward, first), mtpkern_turn=_Turn(thread, run, others), **more)
            for layer in others:
                vars(layer).update(forward=MethodType(_forward, layer), mtpkern_turn=_Turn(thread, None, ()))
        yield
    finally:
        try:
            for layers, _, more in free:
                _strip(layers, "forward", "mtpkern_turn", *more)
        except BaseException:
            for layers, _, more in free:
                _strip(layers, "forward", "mtpkern_turn", *more)
            raise


def _strip(layers: Iterable[nn.Module], *names: str) -> None:
    """Take from layers what a pass has put there, where it still is."""
    for layer in layers:
        for name in names:
            vars(layer).pop(name, None)


def _base_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a LoRA layer while no row is a mask: the base's, where the gated adapter is all it would add."""
    if args or kwargs or adapter_of(layer) is None:
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    return layer.base_layer(x)  # type: ignore[no-any-return]


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a layer that has siblings, or is run so by itself, while a pass runs."""
    turn = vars(layer).get("mtpkern_turn")
    # What torch.compile makes runs in this thread alone.
    if turn is not None and not args and not kwargs and (torch.compiler.is_compiling() or turn.thread == get_ident()):
        left, turn.left = turn.left, None
        if left is not None and left[0] is x:
            return left[1]  # type: ignore[no-any-return]
        if turn.run is not None:
            outs = turn.run((layer, *turn.others), x)
            if outs is not None:
                for other, y in zip(turn.others, outs[1:]):
                    other.mtpkern_turn.left = x, y
                return outs[0]  # type: ignore[no-any-return]
    return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]


def _adapted(layers: Sequence[Any], x: Tensor) -> list[Tensor] | None:
    """Outputs of LoRA layers; None where they do not go together."""
    names = [adapter_of(layer) for layer in layers]
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
    return outs


def adapter_of(layer: Any) -> str | None:
    """The name of the gated adapter, where it is all that a layer has to add."""
    if layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    # None but ours know a gate.
    return names[0] if len(names) == 1 and hasattr(layer.lora_variant.get(names[0]), "gate") else None


def adapt(outs: Sequence[Tensor], x: Tensor, rows: Tensor, layers: Sequence[Any], names: Sequence[Any]) -> None:
    """Add what LoRA layers make of x [B, T, H] to outputs of their base [B, T, N_i], in place, in rows [B, T] bool.

    adapt([y], x, rows, [layer], ["default"])
    """
    apart(_adapt, outs, x, rows, layers, names)


def _adapt(outs: Sequence[Tensor], x: Tensor, rows: Tensor, layers: Sequence[Any], names: Sequence[Any]) -> None:
    adapters, dtype = list(zip(layers, names)), outs[0].dtype
    if layers[0].lora_A[names[0]].weight.dtype == torch.float32:
        dtype = torch.float32  # as peft loads adapters, whatever the base is in; the op takes them so
    lows = [left_for(layer.lora_A[name], x) for layer, name in adapters]
    flat, gate = [y.flatten(0, -2) for y in outs], rows.flatten()
    bs = [layer.lora_B[name].weight.to(dtype) for layer, name in adapters]
    scales = [layer.scaling[name] for layer, name in adapters]
    if all(low is not None for low in lows):
        gated_expand(flat, [low.flatten(0, -2) for low in lows if low is not None], gate, bs, scales)
        return
    as_ = [layer.lora_A[name].weight.to(dtype) for layer, name in adapters]
    gated_lora(flat, x.to(outs[0].dtype).flatten(0, -2), gate, as_, bs, scales)


def left_for(layer: Any, x: Tensor) -> Tensor | None:
    """What the first of its siblings has left for a layer of this very x, once."""
    turn = vars(layer).get("mtpkern_turn")
    left = None if turn is None else turn.left
    if left is None or left[0] is not x:
        return None
    turn.left = None
    return left[1]  # type: ignore[no-any-return]
