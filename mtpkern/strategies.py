"""Strategies: what a pass keeps of the k tokens that it predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Strategy:
    """A rule of acceptance; use `Static`, `ConfAdapt` or `Verified`.

    k is the number of tokens that one pass predicts. A prediction counts as sure when its confidence (top-1
    probability) is above `threshold`. A strategy that verifies keeps sure predictions as drafts only, and emits them
    once the next pass, which is fed with them anyway, has come to the same tokens.
    """

    k: int
    threshold: float
    verify: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"{type(self).__name__}: k must be a whole number of tokens from 1 up, got {self.k!r}")
        # Every confidence is above -1: that is Static, and nobody else may ask for it.
        number = isinstance(self.threshold, (int, float))
        if not (isinstance(self, Static) or (number and 0.0 <= self.threshold <= 1.0)):
            raise ValueError(
                f"{type(self).__name__}: threshold must be a probability from 0 to 1, got {self.threshold!r}"
            )


@dataclass(frozen=True)
class Static(Strategy):
    """Keep all k predictions of every pass. k = 1 is ordinary greedy decoding; more is fast and careless.

    mtpkern.generate(model, ids, strategy=mtpkern.Static(1))
    """

    k: int = 4
    threshold: float = -1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold != -1.0:
            raise ValueError(f"Static has no threshold, got {self.threshold!r}; use ConfAdapt(k, threshold)")


@dataclass(frozen=True)
class ConfAdapt(Strategy):
    """Keep the longest prefix of predictions with confidence above the threshold, at least one (arXiv 2602.06019).

    The knob between speed and quality: a lower threshold keeps more tokens, and more of them wrong.

        mtpkern.generate(model, ids, strategy=mtpkern.ConfAdapt(k=8, threshold=0.95))
    """

    k: int = 8
    threshold: float = 0.9


@dataclass(frozen=True)
class Verified(Strategy):
    """Emit exactly what the checkpoint's own greedy decoding emits, several tokens a pass.

    Predictions above the threshold become drafts. The next pass has to be fed with them anyway; its outputs at their
    places confirm them or put the model's own token there. The threshold changes the speed only, never the output.

        mtpkern.generate(model, ids, strategy=mtpkern.Verified(k=8, threshold=0.5))
    """

    k: int = 12
    threshold: float = 0.6
    verify: ClassVar[bool] = True
