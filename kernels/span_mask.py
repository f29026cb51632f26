"""Span mask: the one rule that says which keys a row sees.

Rows and keys of a sequence are laid out as [tokens][span 1][span 2]...: first the real tokens in order, then the
mask tokens, span by span, spans sorted by their prefix. Three integers a row say everything:

    position     the row's place in the text, for RoPE; spans repeat the positions of the tokens behind their prefix
    prefix_end   it sees the real tokens with index < prefix_end
    span_start   it sees its own span, from index span_start up to itself; r + 1 (an empty range) for a real token

    visible(r, j) = lower_r <= j < prefix_end_r   or   span_start_r <= j < span_end_r and j > r - window
    lower_r       = prefix_start_r + max(0, position_r - window + 1)
    prefix_start_r = prefix_end_r - position_r + (r - span_start_r)
    span_end_r     = r + 1, unless a fourth integer is given: spans whose rows see one another in both directions

`prefix_start` is where the row's document begins when several are packed into one sequence. It needs no fourth
integer: r - span_start counts the row's steps behind its prefix (-1 for the prefix' last token itself), so the prefix
has position - (r - span_start) tokens and ends at prefix_end. A row of padding has prefix_end = 0 and span_start > r:
it sees nothing.

Shapes   position, prefix_end, span_start, span_end [..., T] int32;  mask [..., T, T] bool
Source   arXiv 2602.06019, the figures of the mask-replicated layout; spans in both directions are its ablation
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mtpkern.kernels.scoring import require_window


class Rule(NamedTuple):
    """What the rows of a layout see: the integers at the head of this file, each [..., T]."""

    position: Tensor
    prefix_end: Tensor
    span_start: Tensor
    span_end: Tensor | None = None


def span_mask(
    position: Tensor,
    prefix_end: Tensor,
    span_start: Tensor,
    span_end: Tensor | None = None,
    *,
    window: int | None = None,
) -> Tensor:
    """Which keys each row sees: bool [..., T, T], rows first, True where visible.

    position, prefix_end, span_start   [..., T] integers, as the head of this file defines them
    span_end                           [..., T], behind the last key of each row's span; None: the row itself is last
    window                             keys further back than window - 1 positions are hidden; None hides none

    Raises ValueError where the shapes differ or window is below 1. Source: arXiv 2602.06019, section on
    training with replicated, block-masked spans.

        # Two tokens, then the one mask of a span behind the first token:
        span_mask(torch.tensor([0, 1, 1]), torch.tensor([1, 2, 1]), torch.tensor([1, 2, 2])).int()
        # [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    rule = [x for x in (position, prefix_end, span_start, span_end) if x is not None]
    if any(x.shape != position.shape for x in rule):
        raise ValueError(
            "position, prefix_end, span_start and span_end must have one shape [..., T]; got "
            + ", ".join(str(tuple(x.shape)) for x in rule)
        )
    require_window(window)
    key = torch.arange(position.shape[-1], device=position.device)
    row = key.unsqueeze(-1)
    position, prefix_end, span_start = (x.unsqueeze(-1) for x in (position, prefix_end, span_start))
    own_upper = row + 1 if span_end is None else span_end.unsqueeze(-1)
    lower = prefix_end - position + row - span_start
    own_lower = span_start
    if window is not None:
        lower = lower + (position - window + 1).clamp(min=0)
        own_lower = torch.maximum(span_start, row - window + 1)
    return ((key >= lower) & (key < prefix_end)) | ((key >= own_lower) & (key < own_upper))


def draw_mask(*rule: Tensor | None, window: int | None = None) -> str:
    """The mask of one sequence, by `span_mask`'s tensors [T], as text: `■` a visible token, `▪` one of the own span.

    print(draw_mask(torch.tensor([0, 1, 1]), torch.tensor([1, 2, 1]), torch.tensor([1, 2, 2])))
    """
    one = Rule(*rule)  # type: ignore[arg-type]
    visible = span_mask(*one, window=window)
    lines = ["row  position  keys"]
    for row, keys in enumerate(visible.tolist()):
        own = int(one.span_start[row])
        marks = " ".join(("▪" if j >= own else "■") if seen else "·" for j, seen in enumerate(keys))
        lines.append(f"{row:3d}  {int(one.position[row]):8d}  {marks}")
    return "\n".join(lines)
