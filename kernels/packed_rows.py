"""Packed rows: those of several sequences side by side, as decode attention takes them, and how they lie when padded.

Shapes   per row [R] int64;  start [B + 1] int64;  bias [B, 1, G W, C], W the most rows of a sequence, G the heads of
         queries that share keys
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def is_host(device: torch.device) -> bool:
    """Whether nobody waits for what tensors there hold."""
    return device.type == "cpu"


@dataclass(frozen=True)
class Spread:
    """How packed rows lie in a padded batch [S, W]: what they do not see, as bias [S, 1, G W, C], and which are unused.

    sequences: the S of B that take part, all of them but on a CPU, where those without rows are left out. bring
    [S Hq W]: which row of [R Hq] goes to a place, any to one without; back [R Hq]: the places that rows come back from.
    Neither where B is 1 and rows stand there already; with one of several left torch.compile would meet other strides.
    unused [R]: a mask over rows, or on a CPU their numbers.
    """

    bias: Tensor
    unused: Tensor
    sequences: slice | Tensor
    bring: Tensor | None = None
    back: Tensor | None = None


@dataclass(frozen=True)
class PackedRows:
    """Rows of B sequences side by side, and what each sees of its sequence's cache of C + 1 slots, the last one trash.

    seq, slot              [R] int64: the sequence of a row and the slot it stands in; a row in slot C is unused
    start                  [B + 1] int64: sequence b owns the rows start[b] .. start[b + 1] - 1, in consecutive slots
    max_rows               the most rows that a sequence owns, 2k - 1 in decoding
    prefix_end, span_start [R] int64, both or neither: they bring the whole rule, and then
    scratch                so many slots hold no token; rows there come last of their sequence, in consecutive slots too
    memo                   what layers of a pass share in the torch form: a dict that lives as long as these rows

        PackedRows(torch.tensor([0, 0, 1]), torch.tensor([7, 8, 3]), torch.tensor([0, 2, 3]), max_rows=2)
    """

    seq: Tensor
    slot: Tensor
    start: Tensor
    max_rows: int
    prefix_end: Tensor | None = None
    span_start: Tensor | None = None
    scratch: int = 0
    memo: dict[tuple[object, ...], Spread] = field(default_factory=dict, compare=False, repr=False)

    def spread(self, window: int | None, capacity: int, dtype: torch.dtype, heads: tuple[int, int]) -> Spread:
        """How they lie in a padded batch under this window, of so many slots, with heads of queries and of keys."""
        key = window, capacity, dtype, *heads
        if key not in self.memo:
            spread = self._spread_on_host if is_host(self.slot.device) else self._spread
            self.memo[key] = spread(window, capacity, dtype, *heads)
        return self.memo[key]

    def _spread(self, window: int | None, capacity: int, dtype: torch.dtype, Hq: int, Hkv: int) -> Spread:
        B, R, device = len(self.start) - 1, len(self.slot), self.slot.device
        W = R if B == 1 else max(1, self.max_rows)
        unused = self.slot >= capacity
        # A row that sees nothing ends at 0, and so do what it sees before and its span.
        seen = torch.stack(self._bounds()).masked_fill_(unused, 0)
        bring = back = None
        if B > 1:
            o_r, o_w, o_h = (torch.arange(n, device=device) for n in (R, W, Hq))
            begin, stop = self.start[:-1, None], self.start[1:, None]
            row = begin + o_w
            no_row = row >= stop
            row = row.masked_fill_(no_row, 0)
            seen = seen[:, row].masked_fill_(no_row, 0)
            bring = (row[:, None, :] * Hq + o_h[:, None]).flatten()
            # Of unused rows, which are nobody's here, any.
            first = torch.arange(B, device=device) * (Hq * W) - self.start[:-1]
            place = (o_r + first[self.seq]).masked_fill_(unused, 0)
            back = (place[:, None] + o_h * W).flatten()
        bias = self._bias(seen.view(-1, B, W), window, capacity, dtype)
        return Spread(bias.repeat(1, Hq // Hkv, 1)[:, None], unused, slice(None), bring, back)

    def _spread_on_host(self, window: int | None, capacity: int, dtype: torch.dtype, Hq: int, Hkv: int) -> Spread:
        """The same of the sequences that have rows, in numpy, whose small operations take a third of torch's time."""
        start, slot = self.start.numpy(), self.slot.numpy()
        B, R, G = len(start) - 1, len(slot), Hq // Hkv
        S, W = B, R if B == 1 else max(1, self.max_rows)
        unused = slot >= capacity
        seen = np.where(unused, 0, [x.numpy() for x in self._bounds()])
        sequences: slice | np.ndarray = slice(None)
        bring = back = None
        if B > 1:
            sequences = _with_rows(start.tolist())
            begin, stop = start[:-1][sequences], start[1:][sequences]
            S = len(begin)
            o_h = np.arange(Hq)
            row = begin[:, None] + np.arange(W)
            is_row = row < stop[:, None]
            row *= is_row
            seen = seen[:, row] * is_row
            bring = _tensor(row[:, None, :] * Hq + o_h[:, None])
            first = np.zeros(B, np.int64)
            first[sequences] = np.arange(S) * (Hq * W) - begin
            place = np.where(unused, 0, np.arange(R) + first[self.seq.numpy()])
            back = _tensor(place[:, None] + o_h * W)
        if len(seen) > 1:
            bias = self._bias(torch.from_numpy(seen.reshape(-1, S, W)), window, capacity, dtype).repeat(1, G, 1)
        else:
            # Each row is a piece of one line, whose zeros end where the row does.
            line, n = _line(window, capacity, dtype)
            piece = np.tile(n - seen.reshape(S, W), G)
            bias = line.index_select(0, _tensor(piece)).view(S, G * W, capacity)
        some = sequences if isinstance(sequences, slice) else torch.from_numpy(sequences)
        return Spread(bias[:, None], _tensor(np.flatnonzero(unused)), some, bring, back)

    def _bounds(self) -> list[Tensor]:
        """Where what a row sees ends, and where there is more to the rule, its prefix and its span: [R] each."""
        end = self.slot + 1
        if self.prefix_end is None or self.span_start is None:
            return [end]
        return [end, self.prefix_end, self.span_start]

    def _bias(self, seen: Tensor, window: int | None, capacity: int, dtype: torch.dtype) -> Tensor:
        """[S, W, C] of rows with bounds `seen` [1 or 3, S, W], which see span <= c < end and scratch <= c < prefix."""
        o_c = torch.arange(capacity, device=seen.device)
        end, *spans = seen[..., None]
        visible = o_c < end
        if window is not None:
            visible &= o_c >= end - window
        if spans:
            prefix, span = spans
            visible &= o_c >= span
            before = (o_c >= self.scratch) & (o_c < prefix)
            if window is not None:
                before &= o_c >= prefix + end - span - window
            visible |= before
        return torch.zeros((), dtype=dtype, device=seen.device).where(visible, -torch.inf)


def _with_rows(start: list[int]) -> slice | np.ndarray:
    """The sequences that have rows: from the first to the last, or where those are few among them, their numbers.

    Their numbers have keys and values copied, which takes as long as some two more sequences.
    """
    some = [b for b, n in enumerate(start[1:]) if n > start[b]]
    if not some:
        return slice(None)
    first, last = some[0], some[-1] + 1
    return np.array(some) if 3 * len(some) <= last - first else slice(first, last)


def _tensor(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x.reshape(-1))


@lru_cache(32)
@torch.inference_mode(False)
def _line(window: int | None, capacity: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """The pieces [n + 1, C] of a line of -inf with zeros in the midst: piece n - end is 0 below end, in the window."""
    zeros = capacity if window is None else min(window, capacity)
    line = torch.full((2 * capacity + zeros,), -torch.inf, dtype=dtype, device="cpu")
    line[capacity : capacity + zeros] = 0
    return line.unfold(0, capacity, 1), capacity + zeros
