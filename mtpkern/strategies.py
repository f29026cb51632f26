"""Strategies: what a pass keeps of the k tokens that it predicts."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar

# Every sequence's rows of a pass, up to 2k - 1 and masks, have logits over the whole vocabulary, and slots of the KV
# cache: 0.3 GB and 2,000 slots at a vocabulary of 150,000. Nobody trains for as many predictions.
LARGEST_K = 256
LARGEST_MASKS = 1024
# Of `Verified`, where none is given.
THRESHOLD = 0.6


@dataclass(frozen=True)
class Strategy:
    """A rule of acceptance; use `Static`, `ConfAdapt` or `Verified`.

    k is the number of tokens that one pass predicts, 256 at most; left out, `mtpkern.generate` takes it from the model
    (`for_model`). A prediction counts as sure when its confidence (top-1 probability) is above `threshold`. A strategy
    that verifies keeps sure predictions as drafts only, and emits them once the next pass, which is fed with them
    anyway, has come to the same tokens.
    """

    k: int
    threshold: float
    verify: ClassVar[bool] = False
    masks: ClassVar[int] = 0
    # Where no k is given: that of a model which records no k_max, and the largest for one that does.
    unrecorded_k: ClassVar[int]
    largest_k: ClassVar[int | None]

    def __post_init__(self) -> None:
        name = type(self).__name__
        if isinstance(self.k, bool) or not isinstance(self.k, int | None) or (self.k is not None and self.k < 1):
            raise ValueError(f"{name}: k must be a whole number of tokens from 1 up, got {self.k!r}")
        if self.k is not None and self.k > LARGEST_K:
            raise ValueError(
                f"{name}: k must be at most {LARGEST_K}, got {self.k}: a pass brings up to 2k - 1 rows "
                "of each sequence, all of them with logits over the vocabulary; give the k_max of training, or less"
            )
        # Every confidence is above -1: that is Static, and nobody else may ask for it.
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        probability = number and 0.0 <= self.threshold <= 1.0
        left_open = isinstance(self, Verified) and self.threshold is None
        if not (probability or left_open or isinstance(self, Static)):
            raise ValueError(f"{name}: threshold must be a probability from 0 to 1, got {self.threshold!r}")

    @property
    def most_rows(self) -> int:
        """Rows that a pass has for a sequence, at most: tokens to be read, masks behind the last and behind others."""
        return 2 * self.k - 1 + self.masks

    def for_model(self, k_max: int | None) -> Strategy:
        """With a k in any case: the one that was given, else what suits a model that was trained for k_max predictions.

        k_max: as training has recorded it, None where it has not. Warns of a k above it.

            ConfAdapt(threshold=0.8).for_model(16)  # ConfAdapt(k=16, threshold=0.8)
            Verified().for_model(16)                # Verified(k=12, threshold=0.6, masks=0)
        """
        if self.k:
            if k_max is not None and self.k > k_max:
                warnings.warn(
                    f"k={self.k} is more than the k_max={k_max} predictions that the model was trained for: those "
                    f"behind are worth little and cost time; give a k of at most {k_max}, or none",
                    stacklevel=2,
                )
            return self
        return replace(self, k=self.unrecorded_k if k_max is None else min(k_max, self.largest_k or k_max))


@dataclass(frozen=True)
class Static(Strategy):
    """Keep all k predictions of every pass. k = 1 is ordinary greedy decoding; more is fast and careless.

    Without k it is 4, or what the model was trained for where that is less: every further token costs accuracy.

        mtpkern.generate(model, ids, strategy=mtpkern.Static(1))
    """

    # None until it is fitted to a model, which the rest of the library need not know.
    k: int = None  # type: ignore[assignment]
    threshold: float = -1.0
    unrecorded_k: ClassVar[int] = 4
    largest_k: ClassVar[int | None] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold != -1.0:
            raise ValueError(f"Static has no threshold, got {self.threshold!r}; use ConfAdapt(k, threshold)")


@dataclass(frozen=True)
class ConfAdapt(Strategy):
    """Keep the longest prefix of predictions with confidence above the threshold, at least one (arXiv 2602.06019).

    The knob between speed and quality: a lower threshold keeps more tokens, and more of them wrong. Without k it is all
    that the model was trained for, or 8 where the model does not say: the threshold alone decides what is kept.

        mtpkern.generate(model, ids, strategy=mtpkern.ConfAdapt(threshold=0.95))
    """

    k: int = None  # type: ignore[assignment]
    threshold: float = 0.9
    unrecorded_k: ClassVar[int] = 8
    largest_k: ClassVar[int | None] = None


@dataclass(frozen=True)
class Verified(Strategy):
    """Emit exactly what the checkpoint's own greedy decoding emits, several tokens a pass.

    Predictions above the threshold become drafts. The next pass has to be fed with them anyway; its outputs at their
    places confirm them or put the model's own token there. The threshold changes the speed only, never the output; so
    does k, which is 12 unless given, or what the model was trained for where that is less. The threshold is 0.6 unless
    given; with no k either it follows, on a CPU, what drafts have been worth (mtpkern.load).

    A draft that is corrected leaves its pass without predictions for the next, unless masks stood behind the token
    before it: `masks` is how many rows more a pass may bring for each sequence to that end, in groups of up to k - 1,
    where the chain of drafts is likeliest to break. The output stays the same. It pays where a pass takes hardly longer
    for them, at small batches, and where drafts are often corrected. With neither k nor masks given, each pass has as
    many as are worth their time (mtpkern.load); with a k there are none unless asked for. More than (k - 1)² have no
    use and are refused.

        mtpkern.generate(model, ids, strategy=mtpkern.Verified(k=8, threshold=0.5))
        mtpkern.generate(model, ids, strategy=mtpkern.Verified(k=4, threshold=0.2, masks=9))
    """

    k: int = None  # type: ignore[assignment]
    threshold: float = None  # type: ignore[assignment]
    masks: int = None  # type: ignore[assignment,misc]
    unrecorded_k: ClassVar[int] = 12
    largest_k: ClassVar[int | None] = 12
    verify: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k and vars(self)["threshold"] is None:
            object.__setattr__(self, "threshold", THRESHOLD)
        if vars(self)["masks"] is None:
            if self.k:
                object.__setattr__(self, "masks", 0)
            return
        if isinstance(self.masks, bool) or not isinstance(self.masks, int) or self.masks < 0:
            raise ValueError(f"Verified: masks must be a whole number of rows from 0 up, got {self.masks!r}")
        if self.masks > LARGEST_MASKS:
            raise ValueError(
                f"Verified: masks must be at most {LARGEST_MASKS}, got {self.masks}: each is a row of every pass "
                "of every sequence, with logits over the whole vocabulary; a few times k are of use"
            )
        if self.k and self.masks > (self.k - 1) ** 2:
            raise ValueError(
                f"Verified: masks={self.masks} is more than k - 1 = {self.k - 1} masks behind each of as many tokens; "
                f"give at most {(self.k - 1) ** 2}, or a larger k"
            )

    def for_model(self, k_max: int | None) -> Strategy:
        """As every strategy's; with no more masks than that k has a use for where none was given."""
        if self.k or vars(self)["masks"] is None:
            return super().for_model(k_max)
        k = Verified(threshold=self.threshold).for_model(k_max).k
        return replace(self, k=k, masks=min(self.masks, (k - 1) ** 2))


_WRITTEN = re.compile(r"(verified|confadapt|static)(?::(\d+))?(?::(\d*\.\d+)(?::(\d+))?)?")


def strategy_of(text: str) -> Strategy:
    """The strategy that a command line or a configuration writes as NAME[:K][:THRESHOLD[:MASKS]].

    The threshold has a point, and masks are `Verified`'s. What is left out is the default: k comes from the model.
    Raises ValueError for anything else.

        strategy_of("static:1"), strategy_of("confadapt:0.9"), strategy_of("verified:4:0.2:9")
    """
    match = _WRITTEN.fullmatch(text)
    if match is None or (match[4] is not None and match[2] is None):
        raise ValueError(
            "a strategy is written verified, confadapt or static, then its k and its threshold (with a point) as far "
            f"as they are wanted, such as static:1, confadapt:0.9 or verified:8:0.6; got {text!r}"
        )
    name, k, threshold, masks = match.groups()
    if masks is not None and name != "verified":
        raise ValueError(f"{name} makes no drafts, so no masks stand behind any; got {text!r}: leave out :{masks}")
    kinds: dict[str, type[Strategy]] = {"verified": Verified, "confadapt": ConfAdapt, "static": Static}
    written = (("k", int, k), ("threshold", float, threshold), ("masks", int, masks))
    given: dict[str, Any] = {field: read(value) for field, read, value in written if value is not None}
    return kinds[name](**given)


def name_of(text: str) -> str:
    """The name of a strategy so written among metrics: `name_of("confadapt:16:0.9")` is "confadapt_16_0.9"."""
    return text.replace(":", "_")
