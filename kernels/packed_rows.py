"""Packed rows: those of several sequences side by side, as decode attention takes them, and how they lie when padded.

Shapes   per row [R] int64;  start [B + 1] int64;  bias [B, 1, G W, C], W the most rows of a sequence, G the heads of
         queries that share keys
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spread:
    """Where packed rows go in [B, W] (None: they stand there already); what they do not see, as bias [B, 1, G W, C]."""

    place: Tensor | None
    bias: Tensor
    unused: Tensor


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
    memo: dict[tuple[int | None, int], Spread] = field(default_factory=dict, compare=False, repr=False)

    def spread(self, window: int | None, capacity: int, dtype: torch.dtype, heads: int = 1) -> Spread:
        """How they lie in a padded batch under this window, of so many slots, where so many heads share their keys."""
        if (window, heads) not in self.memo:
            self.memo[window, heads] = self._spread(window, capacity, dtype, heads)
        return self.memo[window, heads]

    def _spread(self, window: int | None, capacity: int, dtype: torch.dtype, heads: int) -> Spread:
        batch, device = len(self.start) - 1, self.slot.device
        o_r, o_c = torch.arange(len(self.slot), device=device), torch.arange(capacity, device=device)
        unused = self.slot >= capacity
        # Unused rows share one more place behind the end.
        place = None
        if batch > 1:
            row = self.seq * self.max_rows + o_r - self.start[self.seq]
            place = torch.where(unused, batch * self.max_rows, row)

        def spread(x: Tensor, nothing: int) -> Tensor:
            """[B, W, 1], with a value by which a row sees nothing where there is none."""
            x = torch.where(unused, nothing, x)
            if place is not None:
                x = x.new_full((batch * self.max_rows + 1,), nothing).index_copy_(0, place, x)[:-1]
            return x.view(batch, -1, 1)

        slot = spread(self.slot, -1)
        visible = o_c <= slot
        if window is not None:
            visible &= o_c > slot - window
        if self.prefix_end is not None and self.span_start is not None:
            prefix, span = spread(self.prefix_end, 0), spread(self.span_start, 0)
            visible &= o_c >= span
            seen = (o_c >= self.scratch) & (o_c < prefix)
            if window is not None:
                seen &= o_c > prefix + slot - span - window
            visible |= seen
        bias = torch.zeros((), dtype=dtype, device=device).where(visible, -torch.inf)
        return Spread(place, bias.repeat(1, heads, 1)[:, None], unused[:, None, None])
