"""Slots: prompts that enter a decoder's sequences one by one, while the others go on.

A prompt enters in three steps, all queued between two passes and none of them waiting for the device:

    keys     of tokens that another slot holds already are copied
    prefill  of the others and of masks behind them, chunk by chunk
    state    what the prefill has predicted is taken in, and the next pass planned anew

The last of it is a pass like any other: one pending token, with masks behind it. So what a newcomer emits, pass by
pass, is what it would emit alone; but that where masks may stand behind other drafts than the last, the pass that is
planned anew does not know how sure the drafts are, and has these masks elsewhere. Nothing moves: a captured step
replays over the same tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event

import numpy as np
import torch
from torch import Tensor

from mtpkern.choosing import Choosing
from mtpkern.decoder import Decoder
from mtpkern.kernels.advance import advance
from mtpkern.kernels.state import LIMIT, RUNNING, Rows, Sequences, Terms
from mtpkern.watch import Watch


@dataclass(frozen=True)
class Job:
    """A prompt that waits: its number, ids [T] int64, new tokens at most, and those asked for where it gets fewer.

    watch: who sees this one's tokens, and is asked whether it goes on; an error there is this one's alone. closed ends
    it behind the next pass. drawn_by: the number that its draws follow, where that is not its own: two jobs may share
    one. choosing: what it asks for itself, of which the run's has all there is; None: its argmax.
    """

    number: int
    ids: np.ndarray
    new: int
    asked: int | None = None
    watch: Watch | None = field(default=None, compare=False)
    closed: Event | None = field(default=None, compare=False)
    drawn_by: int | None = None
    choosing: Choosing | None = field(default=None, compare=False)

    @property
    def tokens(self) -> int:
        """How long it may become."""
        return len(self.ids) + self.new

    @property
    def draws(self) -> int:
        """The number that its draws follow."""
        return self.number if self.drawn_by is None else self.drawn_by

    @property
    def keys(self) -> np.ndarray:
        """Tokens that another slot's keys can be taken for: all but the last, whose prediction is wanted."""
        return self.ids[:-1]


@dataclass(frozen=True)
class Newcomer:
    """A prompt on its way into a slot.

    source: the slot that holds its first `shared` tokens' keys, at most T - 1; it may be the slot itself. dirty:
    whether the slot may hold keys that are not finite.
    """

    slot: int
    job: Job
    source: int = 0
    shared: int = 0
    dirty: bool = False


def vacate(decoder: Decoder, key: Tensor | None = None, first: int = 0) -> None:
    """Leave all slots of a new or restarted decoder empty: none of them runs. key [1], first: as in `Choice`."""
    decoder.sequences.status.fill_(LIMIT)
    decoder.all_rows.start.zero_()
    if decoder.choice is not None:
        decoder.choice.vacate(key, first)


@torch.inference_mode()
def enter(decoder: Decoder, newcomers: Sequence[Newcomer], owner: Tensor, *, chunk: int) -> Iterator[None]:
    """Put prompts into their slots; at the end the next pass has them. Yields between chunks, for passes of the others.

    owner [B] int64 gets their numbers together with the state. chunk: most prompt tokens that the model sees at once,
    over all of them. The model must not be routed. A slot that is a source must not run into another's keys meanwhile:
    copies are made at once, before the first yield.
    """
    cache, device = decoder.cache, decoder.device
    decoder.make_room(max(len(x.job.ids) for x in newcomers))
    for x in newcomers:
        if x.dirty:
            # A value that is not finite is seen through any mask, as 0 * NaN.
            cache.clear(x.slot)
    cache.copy_prefixes([(x.source, x.slot, x.shared) for x in newcomers if x.shared and x.source != x.slot])

    # Columns as of left-padded prompts, and masks. Those that every newcomer has keys of are not run.
    n, k, T = len(newcomers), decoder.predictions, max(len(x.job.ids) for x in newcomers)
    first, width = T - max(len(x.job.ids) - x.shared for x in newcomers), T + k - 1
    ids, position, real = np.zeros((3, n, width), dtype=np.int64)
    ids[:, T:] = decoder.mask_token_id
    for i, x in enumerate(newcomers):
        here = slice(T - len(x.job.ids), T)
        ids[i, here] = x.job.ids
        position[i, here.start :] = np.arange(width - here.start)
        real[i, here.start :] = 1
    place = cache.scratch + position
    place[(real == 0) | (place >= cache.capacity)] = cache.capacity  # padding goes to the trash
    if decoder.last_position is not None:
        position = position.clip(max=decoder.last_position)
    seq, slot, columns, told = (_on(device, x) for x in (np.array([x.slot for x in newcomers]), place, ids, position))
    # Where padding is, transformers looks at the mask and waits for the device.
    seen = None if real.all() else _on(device, real)
    prefill = decoder.prefill_cache(slot, seq)
    prefill.seen = first
    step = max(1, chunk // n)
    for end in [*range(first + step, T, step), width]:
        logits = decoder.prefill_chunk(prefill, columns, seen, told, end, keep=k if end == width else 1)
        if end < width:
            yield
    cache.require_cached(decoder.model.config)
    _begin(decoder, newcomers, columns[:, :T], seq, owner)
    _take_in(decoder, logits[:, -k:].flatten(0, 1), seq, k)


def _take_in(decoder: Decoder, logits: Tensor, seq: Tensor, k: int) -> None:
    """As behind `Decoder.prefill`, for sequences seq [n] alone: logits [n * k, V]; then the next pass is planned."""
    sequences, n, device = decoder.sequences, len(seq), decoder.device
    o = torch.arange(n * k, device=device)
    start = torch.zeros(len(sequences.status) + 1, dtype=torch.int64, device=device)
    start[seq], start[-1] = o[::k], n * k
    position = sequences.length[seq].repeat_interleave(k, output_size=n * k) - 1 + o % k
    token, confidence = decoder.read(logits, seq.repeat_interleave(k, output_size=n * k), position, start)
    some = Sequences(*(x[seq] for x in vars(sequences).values()))
    most = decoder.strategy.k
    rows = Rows.allocate(n * (2 * most - 1 + decoder.strategy.masks), n, device, most)
    rows.expect_prefill(k)
    terms = Terms(decoder.terms.threshold, decoder.terms.stop_ids, decoder.terms.price)
    advance(some, rows, terms, token, confidence, **decoder.planning)
    for x, y in zip(vars(sequences).values(), vars(some).values()):
        x[seq] = y
    decoder.plan()


def _begin(decoder: Decoder, newcomers: Sequence[Newcomer], columns: Tensor, seq: Tensor, owner: Tensor) -> None:
    sequences, T = decoder.sequences, columns.shape[1]
    facts = np.array([(len(x.job.ids), x.job.tokens, x.job.number, x.job.draws) for x in newcomers]).T.copy()
    length, limit, number, draws = _on(decoder.device, facts)
    sequences.length[seq], sequences.limit[seq], owner[seq] = length, limit, number
    # From padded columns to compact sequences.
    o = torch.arange(T, device=decoder.device) + (T - length)[:, None]
    sequences.tokens[seq, :T] = columns.gather(1, o.clamp(max=T - 1))
    # As all begin: nothing emitted, nothing known.
    for count in (sequences.passes, sequences.hits, sequences.chains, sequences.blocks):
        count.index_fill_(0, seq, 0)
    sequences.pending.index_fill_(0, seq, 1)
    sequences.status.index_fill_(0, seq, RUNNING)
    if decoder.choice is not None:
        own = [decoder.choice.choosing.numbers(x.job.choosing) for x in newcomers]
        decoder.choice.enter(seq, length, draws, _on(decoder.device, np.array(own, dtype=np.float32)))


def _on(device: torch.device, x: np.ndarray) -> Tensor:
    """A copy on the device, which nobody waits for."""
    here = torch.from_numpy(x)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here.to(device)
