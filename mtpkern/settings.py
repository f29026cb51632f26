"""Settings: processors with a number that each sequence of a pass has of its own, as requests of a server have.

The number is a tensor beside the pass, and no part of what a captured step has baked in: one step serves every
temperature, and a sequence that asks for none has the number that changes nothing. So requests with different settings
share passes, and `united` says which list of processors does for two of them.

What they make of the scores is what transformers' do, bit by bit on a CPU; on a GPU nothing is sorted for top-k and
top-p (kernels/keep_top.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mtpkern.kernels.keep_top import keep_top_k, keep_top_p
from mtpkern.texts import Processor, Texts, among


def may_look(x: Tensor) -> bool:
    """Whether the host may look at a tensor's values without waiting for a device; none would it see in a capture."""
    return x.device.type == "cpu"


@dataclass(frozen=True)
class Setting(Processor):
    """One that has a number of each sequence's own; where that is `neutral`, nothing changes."""

    number: float = field(compare=False)
    neutral: ClassVar[float]

    def __call__(self, scores: Tensor, texts: Texts, number: Tensor) -> Tensor:
        """Of all rows; where the host may look at the numbers [R], of those alone that ask for something."""
        if may_look(scores):
            asks = number != self.neutral
            if not asks.any():
                return scores
            if not asks.all():
                changed = scores.clone()
                changed[asks] = self.apply(scores[asks], texts.of(asks), number[asks, None])
                return changed
        return self.apply(scores, texts, number[:, None])

    def apply(self, scores: Tensor, texts: Texts, number: Tensor) -> Tensor:
        """What comes of scores [R, V] by each row's number [R, 1]."""
        raise NotImplementedError


@dataclass(frozen=True)
class RepetitionPenalty(Setting):
    """Logits of tokens that the text holds are divided by the penalty, or multiplied where they are negative."""

    reads_text: ClassVar[bool] = True
    neutral: ClassVar[float] = 1.0

    def apply(self, scores: Tensor, texts: Texts, number: Tensor) -> Tensor:
        """Which tokens have been seen, by a scatter of the text."""
        text = texts.tokens[texts.seq]
        known = torch.arange(text.shape[1], device=text.device) < texts.end[:, None]
        punished = torch.where(scores < 0, scores * number, scores / number)
        return torch.where(among(text, known, scores), punished, scores)


@dataclass(frozen=True)
class Temperature(Setting):
    """Scores are divided by it."""

    neutral: ClassVar[float] = 1.0

    def apply(self, scores: Tensor, texts: Texts, number: Tensor) -> Tensor:
        """A quotient."""
        return scores / number


@dataclass(frozen=True)
class TopK(Setting):
    """So many of the largest scores stay, and those equal to the last of them."""

    neutral: ClassVar[float] = 0.0

    def apply(self, scores: Tensor, texts: Texts, number: Tensor) -> Tensor:
        """By the op; where the host may look at the numbers, the last that stays is looked up in the largest."""
        if not may_look(scores):
            return keep_top_k(scores, number[:, 0])
        k = number.long().clamp_(max=scores.shape[1])
        last = scores.topk(int(k.max())).values.gather(1, k.sub(1).clamp_(min=0))
        return scores.masked_fill(scores < last.where(k > 0, -torch.inf), -torch.inf)


@dataclass(frozen=True)
class TopP(Setting):
    """Of the largest scores as many stay as have this probability together. The number: what the others may have.

    1 - p, taken in double precision as transformers takes it.
    """

    neutral: ClassVar[float] = -1.0

    def apply(self, scores: Tensor, texts: Texts, number: Tensor) -> Tensor:
        """By the op, or on a CPU in less of its time."""
        return (top_p_of_values if may_look(scores) else keep_top_p)(scores, number[:, 0])


def top_p_of_values(scores: Tensor, rest: Tensor) -> Tensor:
    """`keep_top_p` of scores [R, V] by rest [R], bit by bit, in a tenth of the time on a CPU.

    Its time goes to the places of a sorted vocabulary, and only the score at the cut is needed, so that values are
    sorted alone: the same values in the same order, and the same sums of them. Where several tokens have the score at
    the cut and only some of them stay, which ones is up to the order of the places: those rows are sorted whole.

        top_p_of_values(torch.randn(4, 50_000), torch.full((4,), 0.1))
    """
    ordered = torch.from_numpy(np.sort(scores.numpy(), axis=1))
    # How many tokens are removed: those up to which the sum is at most the rest.
    cut = torch.searchsorted(ordered.softmax(-1).cumsum(-1), rest[:, None].to(scores.dtype).contiguous(), right=True)
    cut.clamp_(max=max(0, scores.shape[1] - 1))
    least = ordered.gather(1, cut)
    kept = scores.masked_fill(scores < least, -torch.inf)
    tied = (cut > 0) & (ordered.gather(1, (cut - 1).clamp_(min=0)) == least)
    if tied.any():
        rows = tied[:, 0]
        kept[rows] = keep_top_p(scores[rows], rest[rows])
    return kept


@dataclass(frozen=True)
class MinP(Setting):
    """Tokens stay whose probability is at least this share of the likeliest one's."""

    neutral: ClassVar[float] = 0.0

    def apply(self, scores: Tensor, texts: Texts, number: Tensor) -> Tensor:
        """Compared as probabilities; the likeliest always stays."""
        p = scores.softmax(-1)
        return scores.masked_fill(p < number * p.amax(-1, keepdim=True), -torch.inf)


# In the order in which transformers applies them.
_ORDER = (RepetitionPenalty, Temperature, TopK, TopP, MinP)


def united(a: Sequence[Processor], b: Sequence[Processor]) -> tuple[Processor, ...] | None:
    """A list that holds both in their order, where what one of them lacks are settings; None where there is none.

    united([Temperature(0.7)], [Temperature(0.2), TopP(0.1)])    # Temperature, TopP
    """
    left, merged = (list(a), list(b)), []
    while any(left):
        x, y = left
        if x and y and x[0] == y[0]:
            merged.append(x.pop(0))
            del y[0]
            continue
        heads = [z for z in left if z and isinstance(z[0], Setting)]
        if not heads:
            return None
        merged.append(min(heads, key=lambda z: _ORDER.index(type(z[0]))).pop(0))  # type: ignore[arg-type]
    return tuple(merged)


def numbers_in(run: Sequence[Processor], own: Sequence[Processor]) -> list[float]:
    """The number that a sequence with processors of its own has for each of a run's, which hold those (`united`).

    numbers_in([Temperature(0.7), TopP(0.1)], [TopP(0.2)])    # 1, 0.2
    """
    left, numbers = list(own), []
    for processor in run:
        mine = left.pop(0) if left and left[0] == processor else None
        number = 0.0
        if isinstance(processor, Setting):
            number = mine.number if isinstance(mine, Setting) else processor.neutral
        numbers.append(number)
    assert not left
    return numbers
