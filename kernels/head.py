"""Head: a language-model head as plain tensors, rows of states under it, and how many of their logits live at once.

    z_rv  = softcap(logit_scale * (h_r . w_v + b_v)),  z_r,banned = -inf       softcap(x) = c tanh(x / c), or x

Shapes   hidden [R, H];  weight [V, H];  bias [V];  product [R, V], in a `buffer_for` it
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Bytes of the logits alive at once (`room`): with a part of d weight (kernels/distill.py) and the workspace of products
# LOGITS stay below 0.5 GiB. The torch form's logits, about four copies of them in float32, stay in a CPU's cache.
LOGITS, SHARE, CACHE = 384 << 20, 48, 8 << 20


@dataclass(frozen=True)
class Head:
    """A language-model head: weight [V, H], bias [V], then a factor, then a soft cap; `banned` is never predicted.

    `narrow` is the weight in the dtype of products, where it has been made once for several calls (`narrowed`).
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    banned: int | None = None
    narrow: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, V], in at least float32."""
        return self.finish(hidden @ self.weight.t())

    def finish(self, z: Tensor) -> Tensor:
        """The logits [R, V] of a product [R, V], in at least float32; they may take its place."""
        if self.bias is not None:
            z = z + self.bias
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if self.logit_scale != 1:
            z = z * self.logit_scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        if self.banned is not None:
            # A slice: a teacher may lack the token. No backward of the above keeps what is written over here.
            z[:, self.banned : self.banned + 1] = float("-inf")
        return z

    def narrowed(self, hidden: Tensor) -> Head:
        """The same for several calls with such states, where autocast computes in another dtype than the weight's."""
        dtype = product_dtype(hidden, self)
        return self if dtype == self.weight.dtype else replace(self, narrow=self.weight.detach().to(dtype))

    def within(self, dtype: torch.dtype) -> Head:
        """The same with the weight in the dtype of a product, cast unless it has been."""
        kept = self.narrow if self.narrow is not None and self.narrow.dtype == dtype else self.weight.to(dtype)
        return replace(self, weight=kept, narrow=None)

    def options(self) -> tuple[Tensor | None, int, float, float | None, int | None]:
        """The fields, as kernels take them."""
        return self.bias, self.weight.shape[0], self.logit_scale, self.softcap, self.banned


class Rows(NamedTuple):
    """States [R, H] under a head, and room for their product, which `head_readout` fills and one `distill_loss` spends.

    rows = Rows.sharing(hidden, Head(model.lm_head.weight))
    loss = distill_loss(*rows, target=head_readout(*rows).token)
    """

    hidden: Tensor
    head: Head
    product: Tensor | None = None

    @classmethod
    def sharing(cls, hidden: Tensor, head: Head, products: int = 1) -> Rows:
        """With room for the product, R V elements until the loss, if so many of them keep to the bound.

        Without, the loss multiplies again: more work than writing and reading fresh memory, on a CPU from H = 100 on.
        """
        dtype, rows, vocabulary = product_dtype(hidden, head), hidden.shape[0], head.weight.shape[0]
        fits = products * rows * vocabulary * dtype.itemsize <= room(hidden.device)
        return cls(hidden, head, buffer_for(hidden, rows, vocabulary, dtype) if fits else None)


def product_dtype(hidden: Tensor, head: Head, product: Tensor | None = None) -> torch.dtype:
    """The dtype of the product: autocast's where it is on, else that of both operands."""
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    elif dtype != head.weight.dtype:
        raise ValueError(
            f"hidden states and head must have one dtype; got {dtype} and {head.weight.dtype}: cast one of them or "
            "switch autocast on"
        )
    rows, vocabulary = hidden.shape[0], head.weight.shape[0]
    # Kernels write to the end of a row's room.
    form = dtype, (rows, vocabulary), (_apart(vocabulary), 1)
    if product is not None and (product.dtype, product.shape, product.stride()) != form:
        raise ValueError(
            f"a product must be {[rows, vocabulary]} in {dtype}, its rows {_apart(vocabulary)} elements apart; got "
            f"{list(product.shape)} in {product.dtype}, strides {product.stride()}: take it from Rows.sharing, with "
            "the same rows, under the same autocast"
        )
    return dtype


def room(device: torch.device) -> int:
    """Bytes of logits alive at once on a device: LOGITS, or one in SHARE of a GPU's memory, free or not, if it is more.

    So chunks, and with them bits, depend on the kind of the device alone. Of 80 GiB it is 2,560 rows of 152k tokens in
    2 bytes, twice.
    """
    has = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return max(LOGITS, has // SHARE)


def chunk_rows(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device, triton: bool) -> int:
    """Rows whose logits may live at once: equal parts, of at least 128 rows where there are as many."""
    logits = room(device) // dtype.itemsize if triton else CACHE // 16
    most = max(logits // vocabulary // 128, 1) * 128
    parts = max(-(-rows // most), 1)
    return max(-(-rows // (16 * parts)), 1) * 16


def buffer_for(hidden: Tensor, rows: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Room for a product [rows, V], rows a multiple of 16 elements apart, aligned for any V; all is written."""
    return hidden.new_empty(rows, _apart(vocabulary), dtype=dtype)[:, :vocabulary]


def _apart(vocabulary: int) -> int:
    return -(-vocabulary // 16) * 16


def multiply(hidden: Tensor, head: Head, out: Tensor) -> Tensor:
    """The product of states with the head, in the dtype of its weight and the first rows of a buffer."""
    return torch.mm(hidden.to(head.weight.dtype), head.weight.t(), out=out[: len(hidden)])


def products(hidden: Tensor, head: Head, kept: Tensor | None, most: int) -> Callable[[Any], Tensor]:
    """What gives the product of some rows: out of one that is kept, else anew, in room for so many of them."""
    if kept is not None:
        return lambda part: kept[part]
    buffer = buffer_for(hidden, most, len(head.weight), head.weight.dtype)
    return lambda part: multiply(hidden[part], head, buffer)
