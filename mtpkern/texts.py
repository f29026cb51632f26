"""Texts: what a logits processor sees of the packed rows of a pass, and what a processor is here.

transformers calls a processor with the text so far and the scores of its next token. A pass has rows of several texts
of different length, among them drafts: the text of a row is what stands up to the row's own token, that included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Texts:
    """The texts of R rows; `end` tokens of `tokens[seq]` are known of each.

    tokens [B, C + 1]; seq, end [R]; length [R]: of the text as transformers has it, with the padding in front and the
    row's own token; new [R]: tokens behind the prompt in it, negative for rows of no text; known [R]: whether `end` is
    all of it, which it is not behind masks. prompts [B, T]: as given, padded on the left; None where each sequence is
    laid out as it is alone, without padding.
    """

    tokens: Tensor
    seq: Tensor
    end: Tensor
    length: Tensor
    new: Tensor
    known: Tensor
    prompts: Tensor | None

    def last(self, n: int) -> Tensor:
        """The last n known tokens of each row [R, n]; -1 in front of a text."""
        o = self.end[:, None] - n + torch.arange(n, device=self.end.device)
        return torch.where(o < 0, -1, self.tokens[self.seq[:, None], o.clamp(0, self.tokens.shape[1] - 1)])

    def of(self, rows: Tensor) -> Texts:
        """Those of some rows [R], true or false, in their order."""
        of_rows = {name: getattr(self, name)[rows] for name in ("seq", "end", "length", "new", "known")}
        return replace(self, **of_rows)


# Of scores [R, V], texts of R rows and each row's numbers [R, width] (mtpkern.settings) the scores that come of them.
Apply = Callable[[Tensor, Texts, Tensor], Tensor]


@dataclass(frozen=True)
class Processor:
    """What is asked of the scores; `on` makes an `Apply` of it for a device and a vocabulary."""

    # What each of its numbers is for a sequence that does not ask for it.
    neutral: ClassVar[float] = 0.0
    # Whether it looks at the tokens of the text, and whether it has to be called row by row.
    reads_text: ClassVar[bool] = False
    by_row: ClassVar[bool] = False

    @property
    def own(self) -> list[float]:
        """The numbers that a sequence has of its own (mtpkern.settings), as many for each that is equal to it."""
        return []

    @property
    def width(self) -> int:
        """How many they are."""
        return len(self.own)

    def require_known(self, vocabulary: int) -> None:
        """Raise ValueError where it names tokens that are not among so many."""

    def on(self, device: torch.device, vocabulary: int) -> Apply:
        """The function, made before any step is captured: itself, where there is nothing to make."""
        return self  # type: ignore[return-value]


def among(tokens: Tensor, where: Tensor, scores: Tensor) -> Tensor:
    """Which of the vocabulary [R, V] are among each row's tokens [R, n], of which those count that are true there."""
    R, V = scores.shape
    found = scores.new_zeros(R, V + 1, dtype=torch.bool)
    return found.scatter_(1, torch.where(where, tokens.clamp(max=V), V), True)[:, :V]


def require_tokens(name: str, tokens: Iterable[int], vocabulary: int) -> None:
    """Raise ValueError where some of these, of an argument of this name, are not among so many.

    require_tokens("bad_words_ids", [3, 9], vocabulary=286)
    """
    outside = sorted({token for token in tokens if token >= vocabulary})
    if outside:
        raise ValueError(
            f"{name} must hold ids from 0 to {vocabulary - 1}, the model's vocabulary; got {outside}; use the model's "
            "own tokenizer"
        )
