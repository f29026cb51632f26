"""Weights of linear layers on a CPU, copied and laid out for few rows.

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
with `mtpkern.release_graphs`.

Weights of 16 bits are copied as they are where the processor has products of 16 bits: up to twelve rows take 0.38 to
0.58 of what torch takes for one there (bench/results/avx512/packed.md). Where it has none (AVX2 and nothing later, say)
they are copied as float32: torch takes 1.7, 3.2 and 6.5 times as long for 2, 4 and 8 rows as for one, over the copies
it is 1.4, 1.8 and 2.3 (bench/results/bfloat16/packed.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import ParamSpec, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mtpkern.kernels.form import has_products
from mtpkern.memory import available_memory
from mtpkern.recordings import forget

P = ParamSpec("P")
T = TypeVar("T")

# Rows that the copies are laid out for; with others they serve as well.
ROWS = 16
# Numbers of rows are filled up to so many binary digits, as prompts may have any: for each of them, and each form of a
# layer, oneDNN keeps 0.2 to 0.6 MB, a thousand times over. Passes have three digits at most.
DIGITS = 4
# Elements of weights that lie in a cache.
CACHED = 1 << 18
# Copies take no more than this part of the memory that is free.
FREE_PART = 4

# The copies of each model.
packed_of: WeakKeyDictionary[PreTrainedModel, list[Packed]] = WeakKeyDictionary()


def dtype_of_copies(dtype: torch.dtype) -> torch.dtype | None:
    """What copies of such weights are made of, and products over them computed in; None for what stays torch's."""
    has = dtype == torch.float32 or has_products(dtype)
    if has is None:
        return None
    copied = dtype if has else torch.float32
    return copied if has_packed_products(copied) else None


def is_widened(dtype: torch.dtype) -> bool:
    """Whether copies are float32 of 16 bits, so that torch takes long over everything but one row."""
    return dtype_of_copies(dtype) not in (dtype, None)


@cache
def has_packed_products(dtype: torch.dtype) -> bool:
    """Whether this build of torch has them, and they do what is expected: their names are no promise of torch's."""
    if not torch.backends.mkldnn.is_available():
        return False
    # On the host, whatever device the caller has made the default.
    x, weight, bias = (torch.arange(n, dtype=dtype, device="cpu") for n in (6, 12, 4))
    x, weight = x.view(1, 2, 3), weight.view(4, 3)
    with suppress(Exception), torch.autocast("cpu", enabled=False):
        found = product(x, _rearranged(weight), bias)
        return found.shape == (1, 2, 4) and torch.allclose(found, nn.functional.linear(x, weight, bias))
    return False


def _rearranged(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight.default(weight, ROWS)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., H] by copied weights [N, H], plus the bias [N]: [..., N], contiguous."""
    rows = x.numel() // x.shape[-1]
    more = -rows % (1 << max(0, (rows - 1).bit_length() - DIGITS))
    given = nn.functional.pad(x.flatten(0, -2), (0, 0, 0, more)) if more else x
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(given, weight, bias, "none", [], "")
    return y[:rows].view(*x.shape[:-1], -1) if more else y


def lasting(make: Callable[P, T]) -> Callable[P, T]:
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
        dtype = dtype_of_copies(weights[0].dtype) or weights[0].dtype
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
        alike = same and self.dtype == dtype_of_copies(layers[0].weight.dtype)
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
            n = max(1, CACHED // len(row))
            for piece, of_piece in zip(x.split(n), seen.split(n)):
                torch.mv(piece.float(), row, out=of_piece)
    return found.view(torch.int32)


@cache
@lasting
def _row(n: int) -> Tensor:
    """As irregular as random values, and the same ever after."""
    return torch.arange(1, n + 1, dtype=torch.float32, device="cpu").sin_().add_(2)


@lasting
def pack(model: PreTrainedModel, groups: Sequence[Sequence[nn.Linear]]) -> list[Packed | None]:
    """The packed weights of these groups: those that are kept and still right, new ones, None where memory is short."""
    known = {packed.layers[0](): packed for packed in packed_of.pop(model, ())}
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
    packed_of[model] = [packed for packed in found if packed is not None]
    return found


def _bytes_of_copy(weight: Tensor) -> int:
    return weight.numel() * (dtype_of_copies(weight.dtype) or weight.dtype).itemsize
