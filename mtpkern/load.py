"""Rows by load: what a row may cost, from what passes take here and what each sequence's drafts have been worth.

A pass of R rows takes T(R). A mask promises a fraction of a token: the chance that what it proposes is confirmed. The
price is the least promise for which a row is brought. What each sequence's own drafts have been worth is counted on the
device (kernels/worth.py): hits, drafts confirmed, and chains, passes that tried some; a = hits / (hits + chains), with
a prior, are the odds that one more draft is right. So at the price p a sequence brings m masks, as many of a, a², a³
... as are at least p. They promise y = a + ... + a^m tokens beyond the one that is certain, and as many drafts to feed
again. The price taken is the one with the highest quotient over all sequences,

    (n + sum of y) / T(n + sum of m + y)        n: sequences that run

among a few, of which the highest buys nothing: a pass of plain decoding. Where rows are as good as free, as on a GPU up
to a number of rows, the price only shares these out.

Where masks may stand behind other drafts than the last, a pass of d drafts as sure as the odds has d + 1 places for
them: its chain ends behind draft i with the chance a^i (1 - a), behind the last with a^d, and a mask promises that much
less. Confirmed drafts tell of the passes that they come from, which have had masks at only a part of these places: what
a price promises is set against the part that was bought of late.

On a GPU passes have one of a few numbers of rows, the rungs of a ladder, each with a graph of its own; the host takes
the rung with the best quotient. The lowest has one row a sequence and no masks. A rung that has no graph yet is guessed
at, and gets one as soon as what it would have saved comes to what the first graph took to make.

On a CPU each pass is timed as it runs, unless its layers are compiled: eight rows take the time of one on one processor
and of two on another. Passes without masks are tried on purpose now and then, at ever longer intervals, because nothing
else shows their time; and passes with them, where for long there was none, with as many as if nothing were known of
what they are worth, and then what these propose. What a sequence brings changes when its tokens come, not which, but
for near-ties: products of other numbers of rows round otherwise.

Where no threshold is given, there, it follows the odds too: it is their square, between bounds, by what this run and
earlier ones have shown. A refuted draft leaves its pass without proposals, which costs the more the better they are: a
model whose drafts are mostly right is best off with sure ones, another takes what it gets (docs/log.md, "One threshold
does not fit all").
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from functools import partial
from typing import TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import PreTrainedModel

from mtpkern.kernels.state import RUNNING, Sequences
from mtpkern.kernels.worth import FORGOTTEN, PRIOR_CHAINS, PRIOR_HITS, UNIT
from mtpkern.strategies import Strategy

Number = TypeVar("Number", float, np.ndarray)

# Up to this many rows a pass on a GPU is bound by reading the weights, so that rows are nearly free.
FREE_ROWS = 192
# From everything to nothing. A promise is a probability, so no row is worth the last.
PRICES = np.array([0.0, 0.03, 0.06, 0.09, 0.12, 0.18, 0.25, 0.35, 0.5, 0.7, 2.0])
# What a pass takes besides its rows, in rows: a guess, where nothing has been seen.
FIXED = 8
# Likewise on a GPU: Qwen3-4B on an H200 takes 1.6 times as long with 256 rows as with one (bench/results/h200).
FIXED_GPU = 400
# Rows that a rung of the ladder saves at least. Passes of one row differ in more: they have no masks.
STEP = 64
# The pass before which one without masks is tried first, and the factor to the next.
FIRST_LOOK, LOOK_AGAIN = 3, 4
# The least and the most that a draft's confidence has to be above, where that follows the odds.
THRESHOLDS = 0.2, 0.8
# So much is kept of what earlier runs have shown.
MOST_SHOWN = 64 * UNIT
# Of the latest so many passes of as many rows the second shortest tells the time: disturbances make one longer, but
# where processors are shared one may be shorter than all others.
LATEST = 8
# Passes without masks before one has them again, whatever is known of them, at first and at most: their time may have
# been disturbed, drafts may have become right.
PATIENCE, MOST_PATIENCE = 8, 128
# Passes for which a price stays that is the last one or next to it: to find one takes a tenth of a small model's pass.
# Nobody looks meanwhile whether a try is due, which comes up to so many passes late.
HELD = 4


def default_rows(strategy: Strategy, batch: int, device: torch.device) -> int:
    """Rows of a pass at most: B * (2k - 1 + masks) gives every sequence all its masks, and those behind drafts.

    Without verification a sequence must have them, or what it emits would depend on its neighbours. Verified emits the
    same with fewer, and on a GPU gets those that are nearly free, four a sequence at least. On a CPU rows are used as
    needed.
    """
    most = batch * (2 * strategy.k - 1)
    if strategy.verify and device.type != "cpu":
        most = min(most, max(4 * batch, FREE_ROWS))
    return most + batch * strategy.masks


def default_masks(k: int, batch: int, device: torch.device) -> int:
    """Masks of a sequence behind other drafts than the last, where rows go by load: as far as rows are nearly free.

    Behind two drafts, as nearly all is won there (docs/log.md). None on a CPU, where every row costs.

    default_masks(7, 1, torch.device("cuda"))  # 12
    """
    if device.type == "cpu":
        return 0
    return max(0, min((k - 1) ** 2, 2 * (k - 1), FREE_ROWS // batch - (2 * k - 1)))


class PassTimes:
    """Seconds of a pass by its rows, of one model; learned from passes as they run.

        times = PassTimes()
        times.saw(1, 0.02), times.saw(8, 0.04)
        times.of(np.array([1, 4, 8]))  # [0.02, 0.028..., 0.04]

    Rows of the same three leading binary digits count as one. Between what was seen times are interpolated; beyond it
    they grow as if a pass without rows took the time of `fixed` rows, upwards no faster than between the least and the
    most that were seen.
    """

    def __init__(self, fixed: int = FIXED) -> None:
        self.fixed = fixed
        self.seconds: dict[int, float] = {}
        self._latest: defaultdict[int, deque[float]] = defaultdict(partial(deque, maxlen=LATEST))
        # Times by quarters of rows, which are asked for more often than they change.
        self._table = np.empty(0)
        self.passes = 0
        self.look = FIRST_LOOK
        # Hits and chains of the model's runs on a CPU, the later the more.
        self.shown = np.zeros(2)
        # Passes since one was to have masks, and how many it may be before one is to have them: of all runs together,
        # or short ones would all have theirs.
        self.plain, self.patience = 0, PATIENCE

    def saw(self, rows: int, seconds: float) -> None:
        """Note a pass."""
        rows -= rows % (1 << max(0, rows.bit_length() - 3))  # as `_rounded`
        latest = self._latest[rows]
        latest.append(seconds)
        seconds = sorted(latest)[len(latest) > 2]
        if self.seconds.get(rows) != seconds:
            self.seconds[rows] = seconds
            self._table = np.empty(0)

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Seconds of passes of so many rows; in a unit of its own where nothing was seen."""
        quarters = (4 * rows).astype(np.int64)
        if quarters.max() >= len(self._table):
            self._table = self._of(_rounded(np.arange(2 * quarters.max() + 2) / 4))
        return self._table[quarters]

    def _of(self, rows: np.ndarray) -> np.ndarray:
        if not self.seconds:
            return self.fixed + rows
        seen = sorted(self.seconds)
        first, last = seen[0], seen[-1]
        inside = np.clip(rows, first, last)
        found = np.interp(inside, seen, [self.seconds[r] for r in seen])
        guess = found * (self.fixed + rows) / (self.fixed + inside)
        if last == first:
            return guess
        # More rows than ever: rather tried in vain than taken for dear and never tried.
        each = max(0.0, self.seconds[last] - self.seconds[first]) / (last - first)
        return np.where(rows > last, np.minimum(guess, found + each * (rows - last)), guess)

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


_times: WeakKeyDictionary[PreTrainedModel, dict[bool, PassTimes]] = WeakKeyDictionary()


def times_of(model: PreTrainedModel, packed: bool = False) -> PassTimes:
    """What passes of this model have taken in this process: over packed weights (mtpkern.packed), or by torch alone."""
    return _times.setdefault(model, {}).setdefault(packed, PassTimes())


def price_of(
    hits: np.ndarray,
    chains: np.ndarray,
    k: int,
    rows: int,
    times: PassTimes | None,
    shown: Sequence[float] | np.ndarray = (0, 0),
    bought: Bought | None = None,
) -> float:
    """The price of a row, for running sequences with these hits and chains [n] and at most so many rows.

    times: None where all passes take the same. shown: hits and chains of the model's earlier runs. bought: of this run,
    where masks may stand behind other drafts than the last.

        price_of(np.array([0]), np.array([0]), k=4, rows=7, times=None)  # 0.0: there are rows for everything
    """
    bought = bought or Bought()
    tokens, needed = _promised(hits, chains, k, shown, bought)
    if times is None:
        best = int(np.argmax(_fitted(tokens, needed, len(hits), rows)))
    else:
        best = int(np.argmax(tokens / times.of(np.minimum(needed, rows))))
    bought.note(best)
    return float(PRICES[best])


class Bought:
    """What part of what its odds promise the passes of a run have bought of late, each sequence with `masks` at most.

    bought = Bought(masks=9)
    price_of(hits, chains, k=4, rows=16, times=times, bought=bought)    # which it takes in
    """

    def __init__(self, masks: int = 0) -> None:
        self.masks = masks
        self.part = 1.0
        self._parts = np.ones(len(PRICES))

    def scaled(self, promised: np.ndarray, odds: np.ndarray, power: np.ndarray) -> np.ndarray:
        """Tokens promised by price [n, prices], of sequences with these odds [n], as what was bought of late tells."""
        if not self.masks:
            return promised
        every = float((odds[:, None] ** power).sum())
        self._parts = promised.sum(0) / (every or 1.0)  # where none runs any more
        # What nobody has bought tells nothing; and no odds promise more than a span of masks that are always right.
        return np.minimum(promised / max(self.part, 1e-3), len(power))

    def note(self, which: int) -> None:
        """Note which of PRICES the next pass has; those of as many passes are remembered as chains are."""
        if self._parts[which] > 0:
            self.part += (self._parts[which] - self.part) / (1 << FORGOTTEN)


def _promised(
    hits: np.ndarray, chains: np.ndarray, k: int, shown: Sequence[float] | np.ndarray, bought: Bought
) -> tuple[np.ndarray, np.ndarray]:
    """By price: tokens of a pass of all sequences, and the rows that it takes.

    A sequence brings what its own odds buy (kernels/worth.py). What that is worth is judged by what all of them and
    earlier runs have shown, in place of what is not known of this one: else each would have to fail for itself, some
    ten times, and one alone would count as right now and then for ever, since no more than 32 chains are remembered.
    """
    prior, power = PRIOR_HITS + PRIOR_CHAINS, np.arange(1, k)
    own = _odds(hits, chains)
    alike = _odds(hits.sum() + shown[0], chains.sum() + shown[1])
    judged = (hits + prior * alike) / (hits + chains + prior)
    bought_alone = own[:, None, None] ** power >= PRICES[:, None]  # [n, prices, k - 1]
    masks, tokens = bought_alone.sum(2), (judged[:, None, None] ** power * bought_alone).sum(2)
    fed = tokens
    if bought.masks:
        fed = np.rint((own[:, None, None] ** power * bought_alone).sum(2))
        masks, tokens = _behind_drafts(own, judged, fed, power, bought.masks)
        tokens = bought.scaled(tokens, judged, power)
    return len(hits) + tokens.sum(0), len(hits) + (masks + fed).sum(0)


def _behind_drafts(
    own: np.ndarray, judged: np.ndarray, fed: np.ndarray, power: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """By price, of chains of `fed` drafts [n, prices]: the masks behind all of them, and the tokens they promise.

    own, judged [n]: the odds that buy, and those that tell what it is worth; most: masks behind others than the last
    """
    k = len(power) + 1
    worth = _chances(own, fed, k)[..., None] * own[:, None, None, None] ** power >= PRICES[:, None, None]
    is_last = np.arange(k) == fed[..., None]
    others = (worth * ~is_last[..., None]).sum((2, 3))
    # The likeliest places have them all; here each has less.
    share = np.where(is_last, 1.0, np.minimum(1, most / np.maximum(others, 1))[..., None])
    hoped = (worth * judged[:, None, None, None] ** power).sum(3)
    return (worth.sum(3) * share).sum(2), (_chances(judged, fed, k) * hoped * share).sum(2)


def _chances(odds: np.ndarray, fed: np.ndarray, k: int) -> np.ndarray:
    """That a chain of `fed` drafts [n, prices] of these odds [n] ends behind token i of k: [n, prices, k]."""
    i, odds = np.arange(k), odds[:, None, None]
    return np.where(i < fed[..., None], odds**i * (1 - odds), np.where(i == fed[..., None], odds**i, 0))


def _odds(hits: Number, chains: Number) -> Number:
    """That the next of a sequence's drafts is right, by what its own have been worth."""
    return (hits + PRIOR_HITS) / (hits + chains + PRIOR_HITS + PRIOR_CHAINS)


def _fitted(tokens: np.ndarray, needed: np.ndarray, running: int, rows: int) -> np.ndarray:
    """Tokens of a pass with so many rows, which the device deals out evenly where they are fewer than needed."""
    return running + (tokens - running) * np.minimum(1, (rows - running) / np.maximum(needed - running, 1))


def _threshold(hits: float, chains: float) -> float:
    """How sure a draft is to be."""
    odds = _odds(hits, chains)
    return min(max(odds * odds, THRESHOLDS[0]), THRESHOLDS[1])


def _are_near(a: float, b: float) -> bool:
    """Whether two of PRICES are the same or next to each other; never, where b is NaN, which stands for no price."""
    return abs(int(PRICES.searchsorted(a)) - int(PRICES.searchsorted(b))) <= 1 and not math.isnan(b)


class Load:
    """The price of each pass of one run on a CPU, where the state is known when the host asks.

    load = Load(times_of(model), k=8, rows=15)
    price = load.price(sequences)   # before a pass, with load.threshold
    load.saw(rows, seconds)         # behind it
    """

    def __init__(self, times: PassTimes, k: int, rows: int, masks: int = 0) -> None:
        self.times, self.k, self.rows, self.bought = times, k, rows, Bought(masks)
        self.passes = 0
        self.shown = times.shown
        self.threshold = _threshold(*self.shown.tolist())
        # The last price that was found, and for how many passes it has stayed; 0 where it was far from that before.
        self._last_price, self._held = math.nan, 0
        # The price of a pass that tries, for the one behind it.
        self._tried: float | None = None

    def price(self, sequences: Sequences) -> float:
        """What a row of the pass after the next must promise."""
        if self._tried is not None:
            # What its masks propose has to be worth a row too, or no try would ever confirm anything.
            price, self._tried = self._tried, None
            return price
        if self.times.wants_a_look():
            return math.inf
        if 0 < self._held < HELD:
            self._held += 1
            self.times.plain += self.times.plain > 0
            return self._last_price
        running = sequences.status.numpy() == RUNNING
        hits, chains = sequences.hits.numpy()[running], sequences.chains.numpy()[running]
        if not len(hits):
            return 0.0
        shown = self.shown + np.array([hits.mean(), chains.mean()])
        self.times.shown = shown * min(1.0, MOST_SHOWN / max(shown.sum(), 1))
        self.threshold = _threshold(*shown.tolist())
        price = price_of(hits, chains, self.k, self.rows, self.times, self.shown, self.bought)
        self._held, self._last_price = int(_are_near(price, self._last_price)), price
        odds = _odds(hits, chains)
        times = self.times
        if odds.max() >= price:
            times.plain, times.patience = 0, PATIENCE
            return price
        times.plain += 1
        if times.plain < times.patience:
            return price
        times.plain, times.patience = 0, min(LOOK_AGAIN * times.patience, MOST_PATIENCE)
        self._last_price, self._held = math.nan, 0
        self._tried = self._try(odds)
        return self._tried

    def _try(self, odds: np.ndarray) -> float:
        """The price at which each has as many masks, one at least, as if nothing were known of what they are worth."""
        nothing = np.zeros(len(odds))
        masks = self.predictions(price_of(nothing, nothing, self.k, self.rows, self.times)) - 1
        # A tenth less, because the odds change a little until the pass is planned.
        return float(0.9 * odds.min() ** masks)

    def predictions(self, price: float) -> int:
        """How many a sequence makes of which nothing is known: the next token and, at this price, one mask at least."""
        worth = _odds(np.zeros(1), np.zeros(1)) ** np.arange(1, self.k) >= price
        return min(self.k, 1 + max(1, int(worth.sum())))

    def saw(self, rows: int, seconds: float) -> None:
        """Note a pass; not a run's first, which does more than a pass."""
        self.passes += 1
        if self.passes > 1:
            self.times.saw(rows, seconds)


class Ladder:
    """How many rows the passes of one batch have on a GPU, and the price at which they are shared out.

    ladder = Ladder(batch=64, rows=256, k=8)
    ladder.rungs                                # [64, 128, 256]
    rows, price = ladder.choose(hits, chains)   # of the running sequences
    ladder.times.saw(rows, seconds)             # a pass
    """

    def __init__(self, batch: int, rows: int, k: int, masks: int = 0) -> None:
        rungs, below = [rows], rows // 2
        while rows > batch:
            rungs.append(rows := below if below > batch and rows - below >= STEP else batch)
            below = rows // 2
        self.rungs, self.k, self.bought = rungs[::-1], k, Bought(masks)
        # What passes have taken: `times.saw`.
        self.times = PassTimes(FIXED_GPU)
        # Rungs that have a graph, what making the first took, and what each other one would have saved up to now.
        self.made: set[int] = set()
        self.making = 0.0
        # Whether no further rung can have one, for want of memory say.
        self.closed = False
        self.saved = dict.fromkeys(self.rungs, 0.0)

    def choose(self, hits: np.ndarray, chains: np.ndarray) -> tuple[int, float]:
        """The rung of the pass after the next, and what a row of it must promise; asked once a pass."""
        promised, needed = _promised(hits, chains, self.k, (0, 0), self.bought)
        tokens = np.array([_fitted(promised, needed, len(hits), rows) for rows in self.rungs])
        # On the lowest no sequence may bring more than its row, however few are left.
        tokens[0] = len(hits)
        seconds = self.times.of(np.array(self.rungs))
        each = seconds / np.maximum(tokens.max(1), 1)
        there = [i for i, rows in enumerate(self.rungs) if rows in self.made] or [len(self.rungs) - 1]
        best = min(there, key=lambda i: each[i])
        wish = int(np.argmin(each))
        if wish != best and self.times.seconds and not self.closed:
            rows = self.rungs[wish]
            self.saved[rows] += seconds[best] * (1 - each[wish] / each[best])
            if self.saved[rows] >= self.making:
                best = wish
        if best == 0:
            return self.rungs[0], math.inf
        price = int(np.argmax(tokens[best]))
        self.bought.note(price)
        return self.rungs[best], float(PRICES[price])

    def made_one(self, rows: int, seconds: float) -> None:
        """Note that a rung has its graph, and how long the host has been at it."""
        self.made.add(rows)
        self.making = max(self.making, seconds)
