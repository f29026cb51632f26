"""Products on a CPU, over a copy of the weights that is laid out for few rows.

The product of 2 to 32 rows that torch calls first rearranges the weights, in each call, and so reads and writes them
several times: a pass of two rows took 1.6 to 1.8 times as long as one of one row, where two rows are read as fast as
one. oneDNN rearranges once and for all: 2 rows then take 0.9 of what one row takes torch with one thread and 0.7 with
two, 8 rows 1.3 and 1.05 (bench/results/packed.md, and docs/log.md, "Weights laid out for few rows"). With hundreds of
rows, as prompts have, the rearranging no longer counts, but on some processors the arithmetic does: with AVX-512 on
AMD's torch takes 2.3 times as long (bench/results/avx512/packed.md), on others as long. Compilers use these operations
of torch for weights that they take as constants. Here a model stays what it is, which costs a second copy of its linear
layers' weights, and a look at each call whether they still are what was copied.

That look is a product with one row that never changes, over all weights: it costs what one pass of one row does, and
sees what no version of a tensor tells (a write to `weight.data`). The copies are kept with the model and go with it, or
with `mtpkern.release_graphs`. Weights that somebody writes to while a call runs are taken up by the next one. A call
inside of somebody's mode of torch, which would see other operations, goes without, and so does one without oneDNN
(`torch.backends.mkldnn.flags(enabled=False)`).

Weights of 16 bits are copied as they are where the processor has products of 16 bits: up to twelve rows take 0.38 to
0.58 of what torch takes for one there (bench/results/avx512/packed.md). Where it has none (AVX2 and nothing later, say)
they are copied as float32: torch takes 1.7, 3.2 and 6.5 times as long for 2, 4 and 8 rows as for one, over the copies
it is 1.4, 1.8 and 2.3 (bench/results/bfloat16/packed.md). One row stays torch's there, which reads half as many bytes
for it; all other numbers of rows read the copies, from the first pass on.

Siblings (mtpkern.siblings) are one product here as well, and so is what a gated adapter adds to them: its matrices are
small, and each call joins them anew. In a pass of five rows of SmolLM2 the adapter took 25 ms, most of it for starting
some twenty operations a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from transformers import PreTrainedModel

from mtpkern.kernels.form import has_products
from mtpkern.kernels.gated_lora import gated_rows
from mtpkern.memory import available_memory
from mtpkern.model import is_tested
from mtpkern.products import families, is_plain
from mtpkern.recorder import apart
from mtpkern.recordings import forget
from mtpkern.siblings import Group, adapt, adapter_of, disjoint, together, watched

P = ParamSpec("P")
T = TypeVar("T")

# Rows that the copies are laid out for; with others they serve as well.
ROWS = 16
# Numbers of rows are filled up to so many binary digits, as prompts may have any: for each of them, and each form of a
# layer, oneDNN keeps 0.2 to 0.6 MB, a thousand times over. Passes have three digits at most.
DIGITS = 4
# Weights of fewer elements lie in a cache, and the call itself takes longest.
LEAST_WEIGHT = 1 << 18
# Tokens that a model's runs must be to make for the first copies to be worth it, which take as long as some 14 passes
# of one row; and a run for the look at them, which takes as long as one, or in 16 bits for anything.
LEAST_TOKENS = 64
LEAST_OF_A_RUN = 4
# Copies take no more than this part of the memory that is free.
FREE_PART = 4


def packs(model: PreTrainedModel, new_tokens: int) -> bool:
    """Whether a run of so many tokens, which is counted, may read packed weights."""
    if model.device.type != "cpu" or new_tokens < LEAST_OF_A_RUN or _dtype_of_copies(model.dtype) is None:
        return False
    if torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.enabled or _in_a_mode():
        return False  # whose products are others
    if not (_is_widened(model.dtype) or _has_large_layers(model)):
        return False
    _asked[model] = _asked.get(model, 0) + new_tokens
    return _is_widened(model.dtype) or _asked[model] >= LEAST_TOKENS


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


def _dtype_of_copies(dtype: torch.dtype) -> torch.dtype | None:
    """What copies of such weights are made of, and products over them computed in; None for what stays torch's."""
    has = dtype == torch.float32 or has_products(dtype)
    if has is None:
        return None
    copied = dtype if has else torch.float32
    return copied if _has_packed_products(copied) else None


def _is_widened(dtype: torch.dtype) -> bool:
    """Whether copies are float32 of 16 bits, so that torch takes long over everything but one row."""
    return _dtype_of_copies(dtype) not in (dtype, None)


@cache
def _has_packed_products(dtype: torch.dtype) -> bool:
    """Whether this build of torch has them, and they do what is expected: their names are no promise of torch's."""
    if not torch.backends.mkldnn.is_available():
        return False
    # On the host, whatever device the caller has made the default.
    x, weight, bias = (torch.arange(n, dtype=dtype, device="cpu") for n in (6, 12, 4))
    x, weight = x.view(1, 2, 3), weight.view(4, 3)
    with suppress(Exception), torch.autocast("cpu", enabled=False):
        found = _product(x, _rearranged(weight), bias)
        return found.shape == (1, 2, 4) and torch.allclose(found, nn.functional.linear(x, weight, bias))
    return False


def _rearranged(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight.default(weight, ROWS)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.numel() // x.shape[-1]
    more = -rows % (1 << max(0, (rows - 1).bit_length() - DIGITS))
    given = nn.functional.pad(x.flatten(0, -2), (0, 0, 0, more)) if more else x
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(given, weight, bias, "none", [], "")
    return y[:rows].view(*x.shape[:-1], -1) if more else y


def _kept(make: Callable[P, T]) -> Callable[P, T]:
    """What makes tensors that outlive the call, and are float32 whatever the caller computes in."""
    for around in (torch.autocast("cpu", enabled=False), torch.no_grad(), torch.inference_mode(False)):
        make = around(make)
    return make


@dataclass(frozen=True)
class Packed:
    """Weights of layers that read the same tensor, one behind another, laid out for few rows.

    dtype: what they are copied as, and products computed in
    """

    layers: tuple[ref[nn.Linear], ...]
    weight: Tensor
    bias: Tensor | None
    widths: list[int]
    dtype: torch.dtype
    seen: Tensor  # what `_look` has made of the weights and biases that were copied

    @classmethod
    def of(cls, layers: Sequence[nn.Linear]) -> Packed:
        """A copy of their weights."""
        weights = [layer.weight.detach() for layer in layers]
        dtype = _dtype_of_copies(weights[0].dtype) or weights[0].dtype
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        return cls(
            tuple(map(ref, layers)),
            _rearranged((torch.cat(weights) if len(weights) > 1 else weights[0]).to(dtype)),
            torch.cat(biases).to(dtype) if biases else None,
            [len(weight) for weight in weights],
            dtype,
            _look(layers),
        )

    def is_of(self, layers: Sequence[nn.Linear]) -> bool:
        """Whether it still holds what these layers do."""
        same = len(layers) == len(self.layers) and all(r() is layer for r, layer in zip(self.layers, layers))
        # The look does not see columns of zeros go, nor rows from one layer to the next.
        weights = [layer.weight for layer in layers]
        same &= self.widths == [len(x) for x in weights] and self.weight.shape[1] == weights[0].shape[1]
        # Weights that have become wider hold the same values still.
        alike = same and self.dtype == _dtype_of_copies(layers[0].weight.dtype)
        return alike and torch.equal(self.seen, _look(layers))


def _look(layers: Sequence[nn.Linear]) -> Tensor:
    """A number for each row of their weights, which another value in it changes, and their biases, as bits."""
    row = _row(layers[0].weight.shape[1])
    tensors = [x.detach() for layer in layers for x in (layer.weight, layer.bias) if x is not None]
    found = torch.empty(sum(map(len, tensors)), dtype=torch.float32, device="cpu")
    for x, seen in zip(tensors, found.split([len(x) for x in tensors])):
        if x.dim() == 1:
            seen.copy_(x)
        elif x.dtype == torch.float32:
            torch.mv(x, row, out=seen)
        else:
            # 16 bits of a product would not tell of every value; made float32 in pieces that lie in a cache.
            n = max(1, LEAST_WEIGHT // len(row))
            for piece, of_piece in zip(x.split(n), seen.split(n)):
                torch.mv(piece.float(), row, out=of_piece)
    return found.view(torch.int32)


@cache
@_kept
def _row(n: int) -> Tensor:
    """As irregular as random values, and the same ever after."""
    return torch.arange(1, n + 1, dtype=torch.float32, device="cpu").sin_().add_(2)


_packed: WeakKeyDictionary[PreTrainedModel, list[Packed]] = WeakKeyDictionary()
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
    @_kept
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
        alone = [((layer,), (layer,), None) for layer in plain] if _is_widened(model.dtype) else []
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
    return alike and _dtype_of_copies(dtype) is not None and (large or _is_widened(dtype))


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
        y = _product(x, packed.weight, packed.bias)
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


@_kept
def pack(model: PreTrainedModel, groups: Sequence[Sequence[nn.Linear]]) -> list[Packed | None]:
    """The packed weights of these groups: those that are kept and still right, new ones, None where memory is short."""
    known = {packed.layers[0](): packed for packed in _packed.pop(model, ())}
    found: list[Packed | None] = []
    wrong = len(known)
    for layers in groups:
        packed = known.pop(layers[0], None)
        found.append(packed if packed is not None and packed.is_of(layers) else None)
        wrong -= found[-1] is not None
    # What is wrong goes before anything new comes, and what has recorded it.
    known.clear()
    if wrong:
        forget(model)
    missing = [i for i, packed in enumerate(found) if packed is None]
    needed = sum(_bytes_of_copy(layer.weight) for i in missing for layer in groups[i])
    if needed and needed * FREE_PART <= (available_memory(torch.device("cpu")) or 0):
        for i in missing:
            found[i] = Packed.of(groups[i])
    _packed[model] = [packed for packed in found if packed is not None]
    return found


def _bytes_of_copy(weight: Tensor) -> int:
    return weight.numel() * (_dtype_of_copies(weight.dtype) or weight.dtype).itemsize


def unpack(model: PreTrainedModel | None = None) -> None:
    """Let the packed weights of one model or of all go; a call that runs keeps its own until it ends."""
    for kept in (_packed, _siblings, _asked):
        for one in list(kept) if model is None else [model]:
            kept.pop(one, None)
