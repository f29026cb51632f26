"""Packed rows: those of several sequences side by side, as decode attention takes them, and how they lie when padded.

Shapes   per row [R] int64;  start [B + 1] int64;  bias [B, 1, G W, C], W the most rows of a sequence, G the heads of
         queries that share keys
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
    memo                   what all layers of a pass share in the torch form: a dict that lives as long as these rows

        PackedRows(torch.tensor([0, 0, 1]), torch.tensor([7, 8, 3]), torch.tensor([0, 2, 3]), max_rows=2)
    """

    seq: Tensor
    slot: Tensor
    start: Tensor
    max_rows: int
    prefix_end: Tensor | None = None
    span_start: Tensor | None = None
    scratch: int = 0
    memo: dict[tuple[int | None, int, int], Spread] = field(default_factory=dict, compare=False, repr=False)

    def spread(self, window: int | None, capacity: int, dtype: torch.dtype, heads: tuple[int, int]) -> Spread:
        """How they lie in a padded batch under this window, of so many slots, with heads of queries and of keys."""
        key = (window, *heads)
        if key not in self.memo:
            self.memo[key] = self._spread(window, capacity, dtype, *heads)
        return self.memo[key]

    def _spread(self, window: int | None, capacity: int, dtype: torch.dtype, Hq: int, Hkv: int) -> Spread:
        B, R, device = len(self.start) - 1, len(self.slot), self.slot.device
        sequences = self._with_rows() if B > 1 and is_host(device) else slice(None)
        S, W = B, R if B == 1 else max(1, self.max_rows)
        o_c = torch.arange(capacity, device=device)
        unused = self.slot >= capacity
        # A row sees span <= c < end and scratch <= c < prefix: nothing, where all are 0.
        bounds = [self.slot + 1]
        if self.prefix_end is not None and self.span_start is not None:
            bounds += [self.prefix_end, self.span_start]
        seen = torch.stack(bounds).masked_fill_(unused, 0)
        bring = back = None
        if B > 1:
            begin, stop = self.start[:-1][sequences], self.start[1:][sequences]
            S = len(begin)
            o_r, o_w = torch.arange(R, device=device), torch.arange(W, device=device)
            row = begin[:, None] + o_w
            no_row = row >= stop[:, None]
            row = row.masked_fill_(no_row, 0)
            seen = seen[:, row].masked_fill_(no_row, 0)
            o_h = torch.arange(Hq, device=device)
            bring = (row[:, None, :] * Hq + o_h[:, None]).flatten()
            # Of unused rows, which are nobody's here, any.
            first = torch.zeros_like(self.start[1:])
            first[sequences] = torch.arange(S, device=device) * (Hq * W) - begin
            place = (o_r + first[self.seq]).masked_fill_(unused, 0)
            back = (place[:, None] + o_h * W).flatten()
        end, *spans = seen.view(len(bounds), S, W, 1)
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
        bias = torch.zeros((), dtype=dtype, device=device).where(visible, -torch.inf)
        if is_host(device):
            unused = unused.nonzero().flatten()
        return Spread(bias.repeat(1, Hq // Hkv, 1)[:, None], unused, sequences, bring, back)

    def _with_rows(self) -> slice | Tensor:
        """The sequences that have rows: from the first to the last, or where those are few among them, their numbers.

        Their numbers have keys and values copied, which takes as long as some two more sequences.
        """
        start = self.start.tolist()
        some = [b for b, n in enumerate(start[1:]) if n > start[b]]
        if not some:
            return slice(None)
        first, last = some[0], some[-1] + 1
        return self.start.new_tensor(some) if 3 * len(some) <= last - first else slice(first, last)
