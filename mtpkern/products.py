"""Linear layers that read the same tensor (q, k and v; gate and up), as one product over all their weights.

A pass of few rows takes the time of reading the weights, and each product begins and ends with some in which it reads
less than it could: one product instead of three, one instead of two. Which layers read the same, the first prefill of a
run shows (mtpkern.siblings).

Nothing is held twice: the weights of such layers move into one buffer, and each layer's parameter becomes a view of its
rows, the same object with the same values. Only the addresses are others; as captured graphs hold those, weights stay
where they are between calls, until `mtpkern.release_graphs`. That they lie together is seen in the weights themselves,
at each pass that is no replay: what has moved since, or been replaced, is a product of its own again.

The A of a gated adapter reads what its layer does. Those of the adapter that is active at that prefill ride along,
behind the weights of siblings as of single layers, [W_q; W_k; W_v; A_q; A_k; A_v]: x A^T comes with the base's product,
and of the adapter's two launches one remains (kernels/gated_lora.py). A pass of the base alone reads the weights alone.
Another adapter takes the place at the first prefill of a run in which it is the active one.

`save_pretrained` of transformers and of peft, and `save_adapter`, write a view's own rows. What takes its memory for
the tensor does not: torch.save writes all of that memory, with an adapter the base's weights; safetensors' save_model
refuses; accelerate's save_model and save_state leave all of siblings but the first out, with a warning. Call
`mtpkern.release_graphs(model)` before these.

A product of few rows can be our kernel's (kernels/linear.py), siblings' and single layers', the head's too: in the same
passes, for as long as one runs, and without moving anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from mtpkern.attention import ended_by_interrupts, exclusive
from mtpkern.kernels.linear import few_rows_linear, new_counters
from mtpkern.model import is_tested, models_of, trains
from mtpkern.siblings import Group, adapter_of, disjoint, together, watched

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
    are a storage of their own, all of one dtype, device and width. wanted=False leaves siblings apart and lets nothing
    ride along, few_rows=0 leaves all products to torch. Keeps no model; the caller holds it (see `exclusive`), and
    passes inside such blocks of one object do not overlap on the device.
    """

    def __init__(self, wanted: bool = True, few_rows: int = 0) -> None:
        self.found: list[tuple[ref[nn.Linear], ...]] | None = None if wanted else []
        # The LoRA layers around those that were found.
        self.adapted: list[ref[Any]] = []
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
        taken = {layer for layers in siblings for layer in layers}
        adapted = _adapted_layers(model)
        single = [(layer,) for layer in adapted if layer not in taken]
        groups = [(layers, riders_of(layers, adapted)[0]) for layers in [*siblings, *single]]
        join(model, groups)
        self.adapted = [ref(lora) for lora in adapted.values()]
        self.found = [tuple(map(ref, layers)) for layers, riders in groups if len(layers) > 1 or riders]

    def __call__(self) -> AbstractContextManager[None]:
        """A pass of this thread inside the block makes one product of siblings whose weights lie together."""
        few = (self.few_rows, self.counters)
        adapted = {lora.base_layer: lora for r in self.adapted if (lora := r()) is not None}
        groups: list[Group] = []
        for refs in self.found or ():
            layers = tuple(layer for r in refs if (layer := r()) is not None)
            if len(layers) < len(refs):
                continue
            riders, gate = riders_of(layers, adapted)
            whole = whole_of(layers, riders)
            if whole is None and riders:
                riders, whole = (), whole_of(layers)
            group = (*layers, *riders)
            if whole is not None and len(group) > 1:
                joint = Joint(*whole, _rows(group), *few, len(riders), gate)
                groups.append((group, _product, {"mtpkern_joint": joint}))
        taken = {layer for layers, *_ in groups for layer in layers}
        for layer in (layer for r in self.plain if (layer := r()) is not None and layer not in taken):
            if is_plain(layer) and self.counters is not None and layer.weight.device == self.counters.device:
                groups.append(([layer], _product, {"mtpkern_joint": Joint(*_own(layer), _rows([layer]), *few)}))
        return together(groups)


class Joint(NamedTuple):
    """What the first of some layers holds while a pass runs: their weights as one, and how their product is made."""

    weight: Tensor  # [N + M, K]
    bias: Tensor | None  # [N + M]
    rows: list[int]  # of each layer's weight, N in all, and of each rider's, M in all
    few_rows: int
    counters: Tensor | None
    riders: int = 0  # the last of the layers, A of an adapter
    gate: Any = None  # before them

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """In a copy of the model that is made then, nothing: it would hold the weights a second time."""
        return type(None), ()


def _product(layers: Sequence[Any], x: Tensor) -> Sequence[Tensor]:
    joint: Joint = layers[0].mtpkern_joint
    weight, bias, rows = joint.weight, joint.bias, joint.rows
    if joint.riders and joint.gate.rows is False:
        # A pass of the base alone.
        rows = rows[: -joint.riders]
        weight, bias = weight[: sum(rows)], None if bias is None else bias[: sum(rows)]
    if joint.counters is None or x.numel() > joint.few_rows * x.shape[-1] or weight.numel() < LEAST_WEIGHT:
        return linear(x, weight, bias).split(rows, -1)
    return few_rows_linear(x, weight, bias, joint.counters).split(rows, -1)


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


def _adapted_layers(model: PreTrainedModel) -> dict[nn.Linear, Any]:
    """The plain layers that have LoRA layers around them, and these."""
    if not is_tested(model) or not hasattr(model, "mtpkern_siblings"):
        return {}
    return {lora.base_layer: lora for lora in model.mtpkern_siblings.layers if is_plain(lora.base_layer)}


def riders_of(layers: Siblings, adapted: dict[nn.Linear, Any]) -> tuple[Siblings, Any]:
    """The A of the gated adapter that is active around layers, and its gate; none where one of them may not ride."""
    named = [(adapted[layer], adapter_of(adapted[layer])) for layer in layers if layer in adapted]
    active = [(lora, name) for lora, name in named if name is not None]
    riders = tuple(lora.lora_A[name] for lora, name in active)
    gates = {lora.lora_variant[name].gate for lora, name in active}
    if len(gates) != 1 or not all(map(is_plain, (*layers, *riders))) or any(a.bias is not None for a in riders):
        return (), None
    kinds = {(layer.weight.dtype, layer.weight.device) for layer in (*layers, *riders)}
    return (riders, gates.pop()) if len(kinds) == 1 else ((), None)


def is_plain(layer: Any) -> bool:
    """Whether a layer is a product with weights of its own and nothing else, now and as long as nobody touches it."""
    if type(layer) is not nn.Linear or trains(layer) or "forward" in vars(layer) or not _are_torchs():
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


def _are_torchs() -> bool:
    """Whether linear layers do what torch does for them, and nobody has put another function in its place."""
    own = getattr(nn.Linear.forward, "__globals__", None) is vars(nn.modules.linear)
    return own and nn.functional.linear is torch._C._nn.linear


def _rows(layers: Sequence[nn.Linear]) -> list[int]:
    return [len(layer.weight) for layer in layers]


def _parameters(layers: Siblings, riders: Siblings) -> list[list[Tensor | None]]:
    """Their weights, with those of the riders, and their biases, which riders do not have."""
    named = (("weight", (*layers, *riders)), ("bias", layers))
    return [[layer._parameters.get(name) for layer in of] for name, of in named]


def whole_of(layers: Siblings, riders: Siblings = ()) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of all layers, and of riders, as one, where they lie one behind another from the beginning of a
    storage on; None where they do not.
    """
    weights, biases = _parameters(layers, riders)
    weight = _whole(weights)
    if weight is None or all(b is None for b in biases):
        return None if weight is None else (weight, None)
    bias = _whole(biases, zeros=sum(_rows(riders)))
    return None if bias is None else (weight, bias)


@torch.inference_mode(False)
@torch.no_grad()
def _whole(parts: Sequence[Tensor | None], zeros: int = 0) -> Tensor | None:
    """Tensors as one [sum of rows + zeros, ...], where they begin a storage, or with the zeros that follow fill it."""
    first, end = parts[0], 0
    for x in parts:
        # A quantised one has no address.
        if first is None or x is None or type(x) is not nn.Parameter or x.device.type == "meta":
            return None
        together = x.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and x.storage_offset() == end
        if not together or not x.is_contiguous() or (x.dtype, x.shape[1:]) != (first.dtype, first.shape[1:]):
            return None
        end += x.numel()
    if first is None or (zeros and first.untyped_storage().nbytes() != (end + zeros) * first.element_size()):
        return None
    size = (sum(len(x) for x in parts if x is not None) + zeros, *first.shape[1:])
    return first.detach().as_strided(size, first.stride(), 0)


# Whose weights have been moved together, for each model.
_joined: WeakKeyDictionary[PreTrainedModel, list[tuple[ref[nn.Linear], ...]]] = WeakKeyDictionary()


def join(model: PreTrainedModel, groups: Sequence[tuple[Siblings, Siblings]]) -> None:
    """Move weights together, of one group at a time, its riders' behind its layers'; where memory does not suffice the
    others stay.

    The caller holds the model; a thread that runs it at that moment all the same may read what is moving.
    """
    holders = _holders(model)
    groups = [(layers, riders if _can_ride(layers, riders, holders) else ()) for layers, riders in groups]
    moving = [(layers, riders) for layers, riders in groups if whole_of(layers, riders) is None]
    # The largest first: where one has been there is room for the next of its size.
    moving.sort(key=lambda group: -sum(layer.weight.nbytes for layer in group[0]))
    with suppress(torch.OutOfMemoryError):
        # Others have ridden there, perhaps.
        _clear(model, {layer for layers, _ in moving for layer in layers})
        holders = _holders(model)
        for layers, riders in moving:
            parameters = [xs for xs in _parameters(layers, riders) if any(x is not None for x in xs)]
            if all(_fit(xs, holders) for xs in parameters):
                _join(parameters, sum(_rows(riders)))
                _joined.setdefault(model, []).append(tuple(map(ref, (*layers, *riders))))


def _holders(model: PreTrainedModel) -> Counter[int]:
    """How many tensors of the model have each piece of memory, by its address."""
    modules = list(model.modules())
    tensors = (x for m in modules for x in (*m._parameters.values(), *m._buffers.values()))
    plain = (x for x in tensors if type(x) in (Tensor, nn.Parameter) and x.device.type != "meta")
    return Counter(x.untyped_storage().data_ptr() for x in plain)


def _is_own(x: Tensor, holders: Counter[int]) -> bool:
    """Whether nobody else has its memory, which would stay behind."""
    place = x.untyped_storage()
    return holders[place.data_ptr()] == 1 and place.nbytes() == x.nbytes


def _fit(xs: Sequence[Tensor | None], holders: Counter[int]) -> bool:
    """Whether all are there and alike, and have memory of their own."""
    kinds = [None if x is None else (x.dtype, x.device, x.shape[1:]) for x in xs]
    return None not in kinds and len(set(kinds)) == 1 and all(_is_own(x, holders) for x in xs if x is not None)


def _can_ride(layers: Siblings, riders: Siblings, holders: Counter[int]) -> bool:
    """Whether all can be moved, or are there already: for those who cannot no weight is moved, again and again."""
    there = layers[0].weight.untyped_storage().data_ptr()
    weights = [rider.weight for rider in riders]
    return all(x.untyped_storage().data_ptr() == there or _is_own(x, holders) for x in weights)


@torch.inference_mode(False)
@torch.no_grad()
def _join(groups: Sequence[Sequence[Any]], zeros: int) -> None:
    """Make weights, and biases with zeros behind them, views of one."""
    weights, *biases = groups
    wholes = [torch.cat(list(weights))] + [torch.cat([*xs, xs[0].new_zeros(zeros)]) for xs in biases]
    _synchronize(wholes[0].device)
    for xs, whole in zip(groups, wholes):
        for x, part in zip(xs, whole[: sum(map(len, xs))].split([len(x) for x in xs])):
            x.data = part


@ended_by_interrupts
def separate(model: PreTrainedModel | None = None) -> None:
    """Give each layer memory of its own again, in one model or in all; in those that no call is running."""
    for one in models_of(_joined) if model is None else [model]:
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


def _clear(model: PreTrainedModel, layers: set[nn.Linear]) -> None:
    """Give what lies with one of these layers memory of its own again."""
    groups = _joined.get(model, [])
    for group in [group for group in groups if not layers.isdisjoint(r() for r in group)]:
        _separate([layer for r in group if (layer := r()) is not None])
        groups.remove(group)


def _synchronize(device: torch.device) -> None:
    """Wait for what this thread has queued, before memory that it reads goes back to whom it was from."""
    if device.type != "cpu":
        torch.accelerator.current_stream(device).synchronize()
