"""Linear layers that read the same tensor (q, k and v; gate and up), as one product over all their weights.

A pass of few rows takes the time of reading the weights, and each product begins and ends with some in which it reads
less than it could: one product instead of three, one instead of two. Which layers read the same, the first prefill of a
run shows (mtpkern.siblings).

Nothing is held twice: the weights of such layers move into one buffer, and each layer's parameter becomes a view of its
rows, the same object with the same values. Only the addresses are others; as captured graphs hold those, weights stay
where they are between calls, until `mtpkern.release_graphs`. That they lie together is seen in the weights themselves,
at each pass that is no replay: what has moved since, or been replaced, is a product of its own again.

A product of few rows can be our kernel's (kernels/linear.py), siblings' and single layers', the head's too: in the same
passes, for as long as one runs, and without moving anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from mtpkern.attention import exclusive
from mtpkern.kernels.linear import few_rows_linear, new_counters
from mtpkern.model import is_tested
from mtpkern.siblings import Group, disjoint, together, watched

# Whether a captured pass makes one product of siblings: 3.48 ms instead of 3.95 with 16 rows of Qwen3-4B on an H200.
CAPTURED = True
# Up to so many rows the products of a captured pass are our kernel's, where that has been timed: a layer's four 58
# instead of 66 us on an H200 (bench/results/h200/linear.md).
FEW_ROWS = 16
# Weights of fewer elements are torch's: smaller than these 16 MB none has been timed.
LEAST_WEIGHT = 1 << 23
# What torch calls around a module's forward.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Siblings = tuple[nn.Linear, ...]


def wants_one_product(captured: bool) -> bool:
    """Whether siblings are one product in the passes of a decoder."""
    return CAPTURED and captured


def few_rows(captured: bool, device: torch.device) -> int:
    """Up to how many rows the products in the passes of a decoder are our kernel's; 0: none are."""
    return FEW_ROWS if captured and _is_hopper(device) else 0


@cache
def _is_hopper(device: torch.device) -> bool:
    nvidia = device.type == "cuda" and torch.version.cuda is not None
    return nvidia and torch.cuda.get_device_capability(device)[0] == 9


class Products:
    """The siblings of a model as one product each, inside the block that a call opens; and those of few rows as ours.

        products = Products()
        with products.sought(model):
            model(input_ids=prompt, ...)    # the first time, this shows them and moves their weights together
        with products():
            logits = model(input_ids=ids, ...).logits

    Plain layers alone: `torch.nn.Linear` itself without hooks, at rest, of a model that the tests cover, weights that
    are a storage of their own, all of one dtype, device and width. wanted=False leaves siblings apart, few_rows=0 all
    products to torch. Keeps no model; the caller holds it (see `exclusive`), and passes inside such blocks of one
    object do not overlap on the device.
    """

    def __init__(self, wanted: bool = True, few_rows: int = 0) -> None:
        self.found: list[tuple[ref[nn.Linear], ...]] | None = None if wanted else []
        self.few_rows = few_rows
        # What kernels count with; there before a capture, and as long as its graph.
        self.counters: Tensor | None = None
        self.plain: list[ref[nn.Linear]] = []

    @contextmanager
    def sought(self, model: PreTrainedModel) -> Iterator[None]:
        """See in a pass inside the block, where none has been seen yet, who reads the same, and join their weights."""
        if self.few_rows and self.counters is None and is_tested(model):
            with torch.inference_mode(False):
                self.counters = new_counters(model.device)
            self.plain = [ref(layer) for layer in model.modules() if is_plain(layer)]
        if self.found is not None:
            yield
            return
        with watched(families(model)) as readers:
            yield
        siblings: list[Siblings] = disjoint(readers)
        join(model, siblings)
        self.found = [tuple(map(ref, layers)) for layers in siblings]

    def __call__(self) -> AbstractContextManager[None]:
        """A pass of this thread inside the block makes one product of siblings whose weights lie together."""
        few = (self.few_rows, self.counters)
        groups: list[Group] = []
        for refs in self.found or ():
            layers = [layer for r in refs if (layer := r()) is not None]
            whole = whole_of(layers) if len(layers) == len(refs) else None
            if whole is not None:
                rows = [len(layer.weight) for layer in layers]
                groups.append((layers, _product, {"mtpkern_whole": (*whole, rows, *few)}))
        taken = {layer for layers, *_ in groups for layer in layers}
        for layer in (layer for r in self.plain if (layer := r()) is not None and layer not in taken):
            if is_plain(layer) and self.counters is not None and layer.weight.device == self.counters.device:
                groups.append(([layer], _product, {"mtpkern_whole": (*_own(layer), [len(layer.weight)], *few)}))
        return together(groups)


def _product(layers: Sequence[Any], x: Tensor) -> Sequence[Tensor]:
    weight, bias, rows, few, counters = layers[0].mtpkern_whole
    if counters is None or x.numel() > few * x.shape[-1] or weight.numel() < LEAST_WEIGHT:
        return linear(x, weight, bias).split(rows, -1)
    return few_rows_linear(x, weight, bias, counters).split(rows, -1)


@torch.inference_mode(False)
@torch.no_grad()
def _own(layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one layer, as `whole_of` has several's."""
    return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()


def families(model: PreTrainedModel) -> list[list[nn.Linear]]:
    """Plain layers that may read the same tensor: children of one module, or the base's layers in such."""
    if not is_tested(model):
        return []  # may do to a layer's output what is not done to a part of a greater one
    children = ([getattr(child, "base_layer", child) for child in parent.children()] for parent in model.modules())
    found = [[layer for layer in layers if is_plain(layer)] for layers in children]
    return [family for family in found if len(family) > 1]


def is_plain(layer: Any) -> bool:
    """Whether a layer is a product with weights of its own and nothing else, now and as long as nobody touches it."""
    if type(layer) is not nn.Linear or layer.training or "forward" in vars(layer):
        return False
    if any(vars(layer).get(name) for name in _HOOKS):
        return False
    # Of quantised and distributed weights the parameter is of another type.
    if layer._parameters.get("weight") is None:
        return False
    parameters = [p for p in layer._parameters.values() if p is not None]
    if any(type(p) is not nn.Parameter or p.device.type == "meta" for p in parameters):
        return False
    return all(p.is_contiguous() and not p.is_inference() and p.grad is None for p in parameters)


def _parameters(layers: Sequence[nn.Linear]) -> list[list[Tensor | None]]:
    return [[layer._parameters.get(name) for layer in layers] for name in ("weight", "bias")]


def whole_of(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of all layers as one, where they fill one storage in this order; None where they do not."""
    weights, biases = _parameters(layers)
    weight, bias = _whole(weights), _whole(biases)
    plain = all(b is None for b in biases)
    return None if weight is None or (bias is None and not plain) else (weight, bias)


@torch.inference_mode(False)
@torch.no_grad()
def _whole(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Tensors as one [sum of rows, ...], where they fill one storage one behind another."""
    first, end = parts[0], 0
    for x in parts:
        # A quantised one has no address.
        if first is None or x is None or type(x) is not nn.Parameter or x.device.type == "meta":
            return None
        together = x.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and x.storage_offset() == end
        if not together or not x.is_contiguous() or (x.dtype, x.shape[1:]) != (first.dtype, first.shape[1:]):
            return None
        end += x.numel()
    if first is None or first.untyped_storage().nbytes() != end * first.element_size():
        return None
    size = (sum(len(x) for x in parts if x is not None), *first.shape[1:])
    return first.detach().as_strided(size, first.stride(), 0)


# Whose weights have been moved together, for each model.
_joined: WeakKeyDictionary[PreTrainedModel, list[tuple[ref[nn.Linear], ...]]] = WeakKeyDictionary()


def join(model: PreTrainedModel, siblings: Sequence[Siblings]) -> None:
    """Move weights together, those of one group at a time; where memory does not suffice the others stay.

    The caller holds the model; a thread that runs it at that moment all the same may read what is moving.
    """
    modules = list(model.modules())
    tensors = (x for m in modules for x in (*m._parameters.values(), *m._buffers.values()))
    plain = (x for x in tensors if type(x) in (Tensor, nn.Parameter) and x.device.type != "meta")
    holders = Counter(x.untyped_storage().data_ptr() for x in plain)

    def fits(xs: Sequence[Tensor | None]) -> bool:
        """Whether all are there and alike, and nobody else has their memory, which would stay behind."""
        kinds = [None if x is None else (x.dtype, x.device, x.shape[1:]) for x in xs]
        places = [x.untyped_storage() for x in xs if x is not None]
        own = all(holders[place.data_ptr()] == 1 for place in places)
        whole = sum(place.nbytes() for place in places) == sum(x.nbytes for x in xs if x is not None)
        return None not in kinds and len(set(kinds)) == 1 and own and whole

    # The largest first: where one has been there is room for the next of its size.
    with suppress(torch.OutOfMemoryError):
        for layers in sorted(siblings, key=lambda layers: -sum(layer.weight.nbytes for layer in layers)):
            parameters = [xs for xs in _parameters(layers) if any(x is not None for x in xs)]
            if whole_of(layers) is None and all(map(fits, parameters)):
                _join(parameters)
                _joined.setdefault(model, []).append(tuple(map(ref, layers)))


@torch.inference_mode(False)
@torch.no_grad()
def _join(groups: Sequence[Sequence[Any]]) -> None:
    """Make the tensors of each group views of one."""
    wholes = [torch.cat(list(xs)) for xs in groups]
    _synchronize(wholes[0].device)
    for xs, whole in zip(groups, wholes):
        for x, part in zip(xs, whole.split([len(x) for x in xs])):
            x.data = part


def separate(model: PreTrainedModel | None = None) -> None:
    """Give each layer memory of its own again, in one model or in all; in those that no call is running."""
    for one in list(_joined) if model is None else [model]:
        with ExitStack() as stack:
            try:
                stack.enter_context(exclusive(one, wait=False))
            except RuntimeError:
                continue  # a call has it, whose graph holds addresses
            groups = _joined.pop(one, [])
            try:
                while groups:
                    _separate([layer for r in groups[-1] if (layer := r()) is not None])
                    groups.pop()
            except torch.OutOfMemoryError:
                _joined[one] = groups


@torch.inference_mode(False)
@torch.no_grad()
def _separate(layers: Sequence[nn.Linear]) -> None:
    """One group's."""
    parts = [x for layer in layers for x in layer._parameters.values() if type(x) is nn.Parameter]
    parts = [x for x in parts if x.device.type != "meta" and x.untyped_storage().nbytes() != x.nbytes]
    own = [x.clone() for x in parts]
    if own:
        _synchronize(own[0].device)
    for x, data in zip(parts, own):
        x.data = data


def _synchronize(device: torch.device) -> None:
    """Wait for what this thread has queued, before memory that it reads goes back to whom it was from."""
    if device.type != "cpu":
        torch.accelerator.current_stream(device).synchronize()
