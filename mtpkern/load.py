"""Rows by load: what a row may cost, from what passes take here and what each sequence's drafts have been worth.

A pass of R rows takes T(R). A sequence with odds a brings masks down to the price p: m is how many of a, a², a³ ... are
at least p. They promise y = a + ... + a^m tokens beyond the one that is certain, and as many drafts to feed again. The
price is the one with the highest quotient over all sequences,

    (n + sum of y) / T(n + sum of m + y)        n: sequences that run

among a few, of which the highest buys nothing: then a pass is one of plain decoding. Where rows are as good as free, as
on a GPU up to the row budget, the price only shares the budget out.

On a CPU each pass is timed as it runs, unless its layers are compiled; a constant would be wrong, since eight rows
take the time of one on one processor and of two on another. Passes without masks are tried on purpose now and then, at
ever longer intervals, because their time is the one that nothing else shows. What a sequence brings changes when its
tokens come, not which, but for near-ties: products of other numbers of rows round otherwise.
"""

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

import numpy as np
from transformers import PreTrainedModel

from mtpkern.kernels.state import RUNNING, Sequences
from mtpkern.kernels.worth import PRIOR_CHAINS, PRIOR_HITS

# From everything to nothing. A promise is a probability, so no row is worth the last.
PRICES = np.array([0.0, 0.03, 0.06, 0.09, 0.12, 0.18, 0.25, 0.35, 0.5, 0.7, 2.0])
# What a pass takes besides its rows, in rows: a guess, where nothing has been seen.
FIXED = 8
# The pass before which one without masks is tried first, and the factor to the next.
FIRST_LOOK, LOOK_AGAIN = 3, 4


class PassTimes:
    """Seconds of a pass by its rows, of one model; learned from passes as they run.

    times = PassTimes()
    times.saw(1, 0.02)
    times.saw(8, 0.04)
    times.of(np.array([1, 4, 8]))  # [0.02, 0.028..., 0.04]

    Rows of the same three leading binary digits count as one. Between what was seen times are interpolated; beyond it
    they grow as if a pass without rows took the time of `FIXED` rows.
    """

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self.passes = 0
        self.look = FIRST_LOOK

    def saw(self, rows: int, seconds: float) -> None:
        """Note a pass. Disturbances only ever add time, so less is believed at once and more slowly."""
        rows = int(_rounded(np.array([rows]))[0])
        old = self.seconds.get(rows, seconds)
        self.seconds[rows] = min(seconds, old + (seconds - old) / 16)

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Seconds of passes of so many rows; in a unit of its own where nothing was seen."""
        rows = _rounded(rows)
        if not self.seconds:
            return FIXED + rows
        seen = sorted(self.seconds)
        inside = np.clip(rows, seen[0], seen[-1])
        return np.interp(inside, seen, [self.seconds[r] for r in seen]) * (FIXED + rows) / (FIXED + inside)

    def wants_a_look(self) -> bool:
        """Whether the next pass should be one without masks; asked once a pass."""
        self.passes += 1
        if self.passes < self.look:
            return False
        self.look *= LOOK_AGAIN
        return True


def _rounded(rows: np.ndarray) -> np.ndarray:
    """Down to three binary digits: 1 to 7, 8, 10, 12, 14, 16, 20 ..."""
    step = 2.0 ** np.maximum(np.floor(np.log2(np.maximum(rows, 1))) - 2, 0)
    return step * np.floor(rows / step)


_times: WeakKeyDictionary[PreTrainedModel, PassTimes] = WeakKeyDictionary()


def times_of(model: PreTrainedModel) -> PassTimes:
    """What passes of this model have taken in this process."""
    return _times.setdefault(model, PassTimes())


def price_of(hits: np.ndarray, chains: np.ndarray, k: int, rows: int, times: PassTimes | None) -> float:
    """The price of a row, for running sequences with these hits and chains [n] and at most so many rows.

    times: None where all passes take the same.

        price_of(np.array([0]), np.array([0]), k=4, rows=7, times=None)  # 0.0: there are rows for everything
    """
    odds = (hits + PRIOR_HITS) / (hits + chains + PRIOR_HITS + PRIOR_CHAINS)
    promise = odds[:, None] ** np.arange(1, k)
    bought = promise[:, :, None] >= PRICES
    masks, tokens = bought.sum((0, 1)), (promise[:, :, None] * bought).sum((0, 1))
    needed = len(hits) + masks + tokens
    if times is None:
        # The lowest price at which all fits, or nothing.
        return float(PRICES[np.argmax(needed <= max(rows, needed[-1]))])
    speed = (len(hits) + tokens) / times.of(np.minimum(needed, rows))
    return float(PRICES[np.argmax(speed)])


class Load:
    """The price of each pass of one run on a CPU, where the state is known when the host asks.

    load = Load(times_of(model), k=8, rows=15)
    price = load.price(sequences)   # before a pass
    load.saw(rows, seconds)         # behind it
    """

    def __init__(self, times: PassTimes, k: int, rows: int) -> None:
        self.times, self.k, self.rows = times, k, rows
        self.passes = 0

    def price(self, sequences: Sequences) -> float:
        """What a row of the pass after the next must promise."""
        if self.times.wants_a_look():
            return math.inf
        running = sequences.status.numpy() == RUNNING
        return price_of(
            sequences.hits.numpy()[running], sequences.chains.numpy()[running], self.k, self.rows, self.times
        )

    def saw(self, rows: int, seconds: float) -> None:
        """Note a pass; not a run's first, which does more than a pass."""
        self.passes += 1
        if self.passes > 1:
            self.times.saw(rows, seconds)
