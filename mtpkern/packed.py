"""Products on a CPU over weights that are laid out for few rows (mtpkern.packed_weights): who reads them, and when.

Passes of a run that is long enough do, and prompts once one has shown which layers read the same tensor, or from the
first on where copies are wider than the weights; one row stays torch's there, which reads half as many bytes for it.
Weights that somebody writes to while a call runs are taken up by the next one. A call inside of somebody's mode of
torch, which would see other operations, goes without, and so does one without oneDNN
(`torch.backends.mkldnn.flags(enabled=False)`).

Siblings (mtpkern.siblings) are one product here as well, and so is what a gated adapter adds to them: its matrices are
small, and each call joins them anew, which takes less than to start some twenty operations a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from transformers import PreTrainedModel

from mtpkern.kernels.gated_lora import gated_rows
from mtpkern.model import is_tested, models_of
from mtpkern.packed_weights import CACHED, Packed, dtype_of_copies, is_widened, lasting, pack, packed_of, product
from mtpkern.products import families, is_plain
from mtpkern.recorder import apart
from mtpkern.siblings import Group, adapt, adapter_of, disjoint, together, watched

# Of fewer elements the call itself takes longest.
LEAST_WEIGHT = CACHED
# Tokens that a model's runs must be to make for the first copies to be worth it, which take as long as some 14 passes
# of one row; and a run for the look at them, which takes as long as one, or in 16 bits for anything.
LEAST_TOKENS = 64
LEAST_OF_A_RUN = 4


def packs(model: PreTrainedModel, new_tokens: int) -> bool:
    """Whether a run of so many tokens, which is counted, may read packed weights."""
    if model.device.type != "cpu" or new_tokens < LEAST_OF_A_RUN or dtype_of_copies(model.dtype) is None:
        return False
    if torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.enabled or _in_a_mode():
        return False  # whose products are others
    if not (is_widened(model.dtype) or _has_large_layers(model)):
        return False
    _asked[model] = _asked.get(model, 0) + new_tokens
    return is_widened(model.dtype) or _asked[model] >= LEAST_TOKENS


def _in_a_mode() -> bool:
    """Whether somebody's mode of torch sees each operation, or makes another of it; a default device does not."""
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return any(type(mode) is not DeviceContext for mode in modes) or torch._C._len_torch_dispatch_stack() > 0


def _has_large_layers(model: PreTrainedModel) -> bool:
    """Whether layers that may read the same tensor are large enough together; soon seen where they are."""
    for parent in model.modules():
        layers = [getattr(child, "base_layer", child) for child in parent.children()]
        if sum(x.numel() for layer in layers for x in layer._parameters.values() if x is not None) >= LEAST_WEIGHT:
            return True
    return False


# Layers that a prefill has shown to read the same tensor, and all plain ones there were then; with copies or without.
_siblings: WeakKeyDictionary[PreTrainedModel, tuple[list[tuple[ref[nn.Linear], ...]], WeakSet[Any]]] = (
    WeakKeyDictionary()
)
# Tokens that the runs of a model were to make at most.
_asked: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()


class GatedRows:
    """Which rows of a pass are gated, looked up once a pass."""

    def __init__(self, gate: Any) -> None:
        self.gate = gate
        self.forget()

    def forget(self) -> None:
        """A new pass begins, whose rows may lie where those of the last did."""
        self._known: tuple[Tensor | bool, slice | Tensor | None] = (False, None)

    def of(self, opened: Tensor | bool) -> slice | Tensor | None:
        """Those for which the gate is opened, counted through its sequences; None for none."""
        if self._known[0] is not opened:
            found = gated_rows(opened.flatten()) if isinstance(opened, Tensor) else None
            self._known = opened, None if isinstance(found, Tensor) and not len(found) else found
        return self._known[1]


@dataclass(frozen=True)
class Update:
    """What a gated adapter adds to layers that read the same tensor: their matrices as two."""

    names: list[str | None]  # of each layer's adapter, where it has one
    gated: GatedRows
    a: Tensor  # [H, M], M the sum of their ranks
    b: Tensor  # [M, N], a block for each layer, with its scale

    @classmethod
    @lasting
    def of(cls, layers: Sequence[Any], names: list[str | None], gated: GatedRows) -> Update:
        """The adapters of these layers, of which others than LoRA layers have none."""
        adapted = [(layer, name) for layer, name in zip(layers, names) if name is not None]
        downs = [layer.lora_A[name].weight.float() for layer, name in adapted]
        ups = [
            torch.zeros(0, layer.out_features, dtype=torch.float32, device="cpu")
            if name is None
            else layer.lora_B[name].weight.float().T * layer.scaling[name]
            for layer, name in zip(layers, names)
        ]
        return cls(names, gated, torch.cat(downs).T.contiguous(), torch.block_diag(*ups))

    def add(self, y: Tensor, x: Tensor, opened: Tensor | bool) -> None:
        """Add it to y [..., N], in place, in the rows for which the gate is opened; x [..., H] is what they have read.

        In float32: products of so few rows take a CPU twice as long in 16 bits, where it has such products.
        """
        rows = self.gated.of(opened)
        if rows is None:
            return
        y, x = y.flatten(0, -2), x.flatten(0, -2)
        low = torch.mm(x[rows].float(), self.a)
        if not isinstance(rows, slice):
            y.index_add_(0, rows, torch.mm(low, self.b).to(y.dtype))
        elif y.dtype == torch.float32:
            y[rows].addmm_(low, self.b)
        else:
            y[rows].add_(torch.mm(low, self.b))


@dataclass(frozen=True)
class Reading:
    """What the first of some layers holds while a pass runs; in a copy of the model that is made then, nothing."""

    packed: Packed | None = None
    update: Update | None = None
    dtype: torch.dtype = torch.float32

    def __reduce__(self) -> tuple[type[Reading], tuple[()]]:
        return Reading, ()


class PackedProducts:
    """As `mtpkern.products.Products`, over packed weights on a CPU; with what a gated adapter adds.

    products = PackedProducts()
    with products.sought(model):
        model(input_ids=prompt, ...)    # the first time, this shows who reads the same
    with products():
        logits = model(input_ids=ids, ...).logits
    """

    def __init__(self) -> None:
        self.groups: list[Group] | None = None

    @property
    def _readings(self) -> list[Reading]:
        return [more["mtpkern_packed"] for *_, more in self.groups or ()]

    @property
    def baked(self) -> list[Any]:
        """What a recorded pass (mtpkern.recordings) holds of this: the weights, and where adapters add to them."""
        return [x for reading in self._readings for x in (reading.packed, type(reading.update))]

    def updates(self) -> list[Update | None]:
        """What adapters add in a pass that begins now, group by group."""
        found = [reading.update for reading in self._readings]
        # All look their rows up in one place.
        gated = next((update.gated for update in found if update is not None), None)
        if gated is not None:
            gated.forget()
        return found

    @contextmanager
    def sought(self, model: PreTrainedModel) -> Iterator[None]:
        """See in a prefill inside the block, where it is not known, who reads the same, and copy their weights.

        A prefill in 16 bits, which takes as much longer as other passes, reads copies from the first on.
        """
        plain = _plain_layers(model) if self.groups is None else []
        if self.groups is None and (known := _known(model, plain)) is not None:
            self.groups = _groups(model, known, plain)
        if self.groups is not None:
            with self():
                yield
            return
        # Each by itself until it is seen which are siblings, and inside its adapter's layer.
        alone = [((layer,), (layer,), None) for layer in plain] if is_widened(model.dtype) else []
        with watched(families(model)) as readers, together(_read(model, alone) if alone else ()):
            yield
        _siblings[model] = [tuple(map(ref, group)) for group in disjoint(readers)], WeakSet(plain)
        plain = _plain_layers(model)
        self.groups = _groups(model, _known(model, plain) or [], plain)

    def __call__(self) -> AbstractContextManager[None]:
        """A pass of this thread inside the block reads packed weights."""
        return together(self.groups or ())


def _known(model: PreTrainedModel, plain: Sequence[nn.Linear]) -> list[tuple[Any, ...]] | None:
    """Layers that have been seen to read the same tensor and are alike; None where the plain ones are others by now."""
    if model not in _siblings:
        return None
    found, seen = _siblings[model]
    groups: list[tuple[Any, ...]] = [tuple(r() for r in group) for group in found]
    own = set(plain)
    same = own.issubset(seen) and all(map(own.issuperset, groups))
    return [group for group in groups if _are_alike(group)] if same else None


def _loras(model: PreTrainedModel) -> list[Any]:
    return model.mtpkern_siblings.layers if hasattr(model, "mtpkern_siblings") else []


def _plain_layers(model: PreTrainedModel) -> list[Any]:
    """The base's, without what adapters are made of; none of a model of a kind that is not tested."""
    if not is_tested(model):
        return []
    own = {layer for lora in _loras(model) for low in (lora.lora_A, lora.lora_B) for layer in low.values()}
    return [layer for layer in model.modules() if is_plain(layer) and layer not in own]


def _groups(model: PreTrainedModel, siblings: Sequence[Sequence[nn.Linear]], plain: Sequence[Any]) -> list[Group]:
    """What is run together: siblings and single layers, or the LoRA layers around them."""
    loras = _loras(model)
    taken = {layer for group in siblings for layer in group}
    single = [(layer,) for layer in plain if layer not in taken]
    # What calls a base's layer: peft's, where it is adapted by ours.
    callers = {lora.base_layer: lora for lora in loras}
    gated = GatedRows(getattr(model, "mtpkern_gate", None))
    found = []
    for bases in [*siblings, *single]:
        layers = [callers.get(base, base) for base in bases]
        names = [None if layer is base else adapter_of(layer) for layer, base in zip(layers, bases)]
        if any(name is None and layer is not base for name, layer, base in zip(names, layers, bases)):
            continue  # an adapter that somebody has switched off, or changed
        update = Update.of(layers, names, gated) if any(names) else None
        found.append((bases, layers, update))
    return _read(model, found)


def _read(
    model: PreTrainedModel, groups: Iterable[tuple[Sequence[nn.Linear], Sequence[nn.Module], Update | None]]
) -> list[Group]:
    """Those of these layers, what calls them, and their adapters, that are to read packed weights."""
    groups = [group for group in groups if _fit(group[0])]
    return [
        (layers, _run, {"mtpkern_packed": Reading(packed, update, bases[0].weight.dtype)})
        for packed, (bases, layers, update) in zip(pack(model, [bases for bases, *_ in groups]), groups)
        if packed is not None
    ]


def _are_alike(layers: Sequence[nn.Linear]) -> bool:
    """Whether all have a bias, or none."""
    return len({layer.bias is None for layer in layers}) == 1


def _fit(layers: Sequence[nn.Linear]) -> bool:
    tensors = [x for layer in layers for x in (layer.weight, layer.bias) if x is not None]
    dtype = tensors[0].dtype
    alike = all(x.dtype == dtype and x.device.type == "cpu" for x in tensors)
    large = sum(layer.weight.numel() for layer in layers) >= LEAST_WEIGHT
    return alike and dtype_of_copies(dtype) is not None and (large or is_widened(dtype))


def _run(layers: Sequence[Any], x: Tensor) -> Sequence[Tensor] | None:
    reading: Reading = layers[0].mtpkern_packed
    packed, update, dtype = reading.packed, reading.update, reading.dtype
    gate = False if update is None else update.gated.gate.rows
    # Open for all rows it is in training alone.
    if packed is None or gate is True or x.dtype != dtype:
        return None
    if torch.is_autocast_enabled("cpu") or torch.is_grad_enabled():
        return None
    # Where copies are wider torch reads half as much for one row, and with more rows its arithmetic never catches up.
    if packed.dtype == dtype or x.numel() > x.shape[-1]:
        if packed.dtype != dtype:
            x = x.to(packed.dtype)
        y = product(x, packed.weight, packed.bias)
        if update is not None and gate is not False:
            apart(update.add, y, x, gate)
        if packed.dtype != dtype:
            y = y.to(dtype)
        return y.split_with_sizes(packed.widths, -1) if len(layers) > 1 else [y]
    if update is None:
        return None
    # Past peft, as `mtpkern.siblings` does it, and past the forward that layers have while a pass runs.
    outs = [nn.Linear.forward(getattr(layer, "base_layer", layer), x) for layer in layers]
    if isinstance(gate, Tensor):
        adapted = [(y, layer, name) for y, layer, name in zip(outs, layers, update.names) if name is not None]
        ys, of, names = zip(*adapted)
        adapt(ys, x, gate, of, names)
    return outs


def unpack(model: PreTrainedModel | None = None) -> None:
    """Let the packed weights of one model or of all go; a call that runs keeps its own until it ends."""
    for kept in (packed_of, _siblings, _asked):
        for one in models_of(kept) if model is None else [model]:
            kept.pop(one, None)
