"""Settings: processors with numbers that each sequence of a pass has of its own, as requests of a server have.

The numbers are a tensor beside the pass, and no part of what a captured step has baked in: one step serves every
temperature and every ban, and a sequence that asks for none has numbers that change nothing. So requests with different
settings share passes, and `united` says which list of processors does for two of them.

What they make of the scores is what transformers' do, bit by bit on a CPU; on a GPU nothing is sorted for top-k and
top-p (kernels/keep_top.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtpkern.kernels.keep_top import keep_top_k, keep_top_p
from mtpkern.texts import Processor, Texts, among, require_tokens

# Room for biases of a sequence's own, as many as OpenAI's API knows, for tokens that may not come early, and for the
# length of a run of tokens that may not come twice.
BIASES, EARLY, RUN = 300, 16, 8


def room_for(needed: int, usual: int) -> int:
    """Who needs more has more, of few sizes, so that those who do share it: `room_for(301, BIASES)` is 512."""
    return usual if needed <= usual else 1 << (needed - 1).bit_length()


def may_look(x: Tensor) -> bool:
    """Whether the host may look at a tensor's values without waiting for a device; none would it see in a capture."""
    return x.device.type == "cpu"


class Setting(Processor):
    """One that has numbers of each sequence's own; where all of them are `neutral`, nothing changes."""

    def __call__(self, scores: Tensor, texts: Texts, numbers: Tensor) -> Tensor:
        """Of all rows; where the host may look at the numbers [R, width], of those alone that ask for something."""
        if may_look(scores):
            asks = (numbers != self.neutral).any(1)
            if not asks.any():
                return scores
            if not asks.all():
                changed = scores.clone()
                changed[asks] = self.apply(scores[asks], texts.of(asks), numbers[asks])
                return changed
        return self.apply(scores, texts, numbers)

    def apply(self, scores: Tensor, texts: Texts, numbers: Tensor) -> Tensor:
        """What comes of scores [R, V] by each row's numbers [R, width]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Number(Setting):
    """A setting of one number."""

    number: float = field(compare=False)

    @property
    def own(self) -> list[float]:
        """The number alone."""
        return [float(self.number)]


@dataclass(frozen=True)
class TokenBias(Setting):
    """Biases of single tokens are added to their logits; minus infinity is a ban. name: of what asks for them, if any.

    Numbers: tokens, each one higher, so that 0 is none, and behind them their biases.
    """

    biases: tuple[tuple[int, float], ...] = field(compare=False)
    name: str | None = field(default=None, compare=False)
    room: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "room", room_for(len(self.biases), BIASES))

    def require_known(self, vocabulary: int) -> None:
        """Raise ValueError where a bias is that of a token which is not among so many; a ban of none bans none."""
        if self.name is not None:
            require_tokens(self.name, (token for token, _ in self.biases), vocabulary)

    @property
    def own(self) -> list[float]:
        """Filled up with none."""
        filled = self.biases + ((-1, 0.0),) * (self.room - len(self.biases))
        return [token + 1.0 for token, _ in filled] + [bias for _, bias in filled]

    def apply(self, scores: Tensor, texts: Texts, numbers: Tensor) -> Tensor:
        """The sum with a bias for the vocabulary, which is 0 nearly everywhere."""
        V = scores.shape[1]
        tokens, biases = numbers.chunk(2, dim=1)
        place = torch.where(tokens > 0, tokens.long() - 1, V).clamp(max=V)
        of_all = scores.new_zeros(len(scores), V + 1).scatter_(1, place, biases)[:, :-1]
        return torch.where(of_all == -torch.inf, -torch.inf, scores + of_all)


@dataclass(frozen=True)
class RepetitionPenalty(Number):
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
class NoRepeatNGram(Number):
    """No so many tokens in a row twice."""

    room: int = field(init=False)
    reads_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "room", room_for(int(self.number), RUN))

    def apply(self, scores: Tensor, texts: Texts, number: Tensor) -> Tensor:
        """What stands in front of each place of the text is compared with its end, as far back as the number asks."""
        text = texts.tokens[texts.seq]
        n = min(self.room - 1, text.shape[1])  # no text is as long, so that none repeats what is longer
        before = F.pad(text, (n, 0), value=-2).unfold(1, n, 1)[:, :-1]
        back = torch.arange(n, 0, -1, device=text.device)
        alike = (before == texts.last(n)[:, None]) | (back >= number)[:, None]
        known = torch.arange(text.shape[1], device=text.device) < texts.end[:, None]
        return scores.masked_fill(among(text, alike.all(-1) & known & (number > 0), scores), -torch.inf)


@dataclass(frozen=True)
class MinTokens(Setting):
    """These may not come while there are fewer tokens than `fewest`: new ones, or with `in_all` the prompt's too.

    Numbers: the fewest, and the tokens, each one higher, so that 0 is none.
    """

    fewest: int = field(compare=False)
    tokens: tuple[int, ...] = field(compare=False)
    in_all: bool = False
    room: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "room", room_for(len(self.tokens), EARLY))

    @property
    def own(self) -> list[float]:
        """Filled up with none."""
        filled = self.tokens + (-1,) * (self.room - len(self.tokens))
        return [float(self.fewest), *(token + 1.0 for token in filled)]

    def apply(self, scores: Tensor, texts: Texts, numbers: Tensor) -> Tensor:
        """A ban while it is early."""
        fewest, tokens = numbers[:, :1], numbers[:, 1:]
        early = (texts.length if self.in_all else texts.new)[:, None] < fewest
        return scores.masked_fill(among(tokens.long() - 1, early & (tokens > 0), scores), -torch.inf)


@dataclass(frozen=True)
class Temperature(Number):
    """Scores are divided by it."""

    neutral: ClassVar[float] = 1.0

    def apply(self, scores: Tensor, texts: Texts, number: Tensor) -> Tensor:
        """A quotient."""
        return scores / number


@dataclass(frozen=True)
class TopK(Number):
    """So many of the largest scores stay, and those equal to the last of them."""

    def apply(self, scores: Tensor, texts: Texts, number: Tensor) -> Tensor:
        """By the op; where the host may look at the numbers, the last that stays is looked up in the largest."""
        if not may_look(scores):
            return keep_top_k(scores, number[:, 0])
        k = number.clamp(max=scores.shape[1]).long()  # in this order: the largest floats are no whole numbers
        last = scores.topk(int(k.max())).values.gather(1, k.sub(1).clamp_(min=0))
        return scores.masked_fill(scores < last.where(k > 0, -torch.inf), -torch.inf)


@dataclass(frozen=True)
class TopP(Number):
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
class MinP(Number):
    """Tokens stay whose probability is at least this share of the likeliest one's."""

    def apply(self, scores: Tensor, texts: Texts, number: Tensor) -> Tensor:
        """Compared as probabilities; the likeliest always stays."""
        p = scores.softmax(-1)
        return scores.masked_fill(p < number * p.amax(-1, keepdim=True), -torch.inf)


# In the order in which transformers applies them.
_ORDER = (TokenBias, RepetitionPenalty, NoRepeatNGram, MinTokens, Temperature, TopK, TopP, MinP)


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
    """The numbers that a sequence with processors of its own has for those of a run, which hold them all (`united`).

    numbers_in([Temperature(0.7), TopP(0.1)], [TopP(0.2)])    # 1, 0.2
    """
    left, numbers = list(own), []
    for processor in run:
        mine = left.pop(0) if left and left[0] == processor else None
        numbers += [processor.neutral] * processor.width if mine is None else mine.own
    assert not left
    return numbers
