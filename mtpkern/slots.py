"""Slots: prompts that enter a decoder's sequences one by one, while the others go on.

A prompt enters in three steps, all queued between two passes and none of them waiting for the device:

    keys     of tokens that another slot holds already are copied
    prefill  of the others and of masks behind them, chunk by chunk, or in rows of the passes (mtpkern.prompt_rows)
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
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtpkern.choosing import Choosing
from mtpkern.decoder import Decoder
from mtpkern.host import on_device
from mtpkern.kernels.advance import advance
from mtpkern.kernels.state import LIMIT, RUNNING, Rows, Sequences, Terms
from mtpkern.prompt_rows import pieces_of
from mtpkern.watch import Watch


@dataclass(frozen=True)
class Job:
    """A prompt that waits: its number, ids [T] int64, new tokens at most, and those asked for where it gets fewer.

    watch: who sees this one's tokens, and is asked whether it goes on; an error there is this one's alone. closed ends
    it behind the next pass. drawn_by: the number that its draws follow, where that is not its own: two jobs may share
    one. choosing: what it asks for itself, of which the run's has all there is; None: its argmax. stop_ids: the tokens
    that end it, as many as the run has places for.
    """

    number: int
    ids: np.ndarray
    new: int
    asked: int | None = None
    watch: Watch | None = field(default=None, compare=False)
    closed: Event | None = field(default=None, compare=False)
    drawn_by: int | None = None
    choosing: Choosing | None = field(default=None, compare=False)
    stop_ids: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """How long it may become."""
        return len(self.ids) + self.new

    @property
    def draws(self) -> int:
        """The number that its draws follow."""
        return self.number if self.drawn_by is None else self.drawn_by

    @property
    def has_left(self) -> bool:
        """Whether nobody wants it any more, or its streamer no tokens of it."""
        events = self.closed, None if self.watch is None else self.watch.closed
        return any(event is not None and event.is_set() for event in events)

    @property
    def keys(self) -> np.ndarray:
        """Tokens that another slot's keys can be taken for: all but the last, whose prediction is wanted."""
        return self.ids[:-1]


@dataclass(frozen=True)
class Newcomer:
    """A prompt on its way into a slot.

    source: the slot that holds its first `shared` tokens' keys, at most T - 1; it may be the slot itself. dirty:
    whether the slot may hold keys that are not finite. planned: whether the next pass may have rows of who was in the
    slot before, whom the host has ended.
    """

    slot: int
    job: Job
    source: int = 0
    shared: int = 0
    dirty: bool = False
    planned: bool = False


def vacate(decoder: Decoder, key: Tensor | None = None, first: int = 0) -> None:
    """Leave all slots of a new or restarted decoder empty: none of them runs. key [1], first: as in `Choice`."""
    decoder.sequences.status.fill_(LIMIT)
    # A first pass may read prompts alone, and its other rows are nobody's.
    decoder.plan()
    if decoder.choice is not None:
        decoder.choice.vacate(key, first)


@torch.inference_mode()
def enter(
    decoder: Decoder, newcomers: Sequence[Newcomer], owner: Tensor, *, chunk: int, beside: bool = False
) -> Iterator[None]:
    """Put prompts into their slots; at the end the next pass has them. Yields between chunks, for passes of the others.

    owner [B] int64 gets their numbers together with the state. chunk: most prompt tokens that the model sees at once,
    over all of them. The model must not be routed. A slot that is a source must not run into another's keys meanwhile:
    copies are made at once, before the first yield.

    beside: the passes read them, one behind each yield, in rows for prompts; more than one prompt have to fit in these.
    """
    cache = decoder.cache
    decoder.make_room(max(len(x.job.ids) for x in newcomers))
    for x in newcomers:
        if x.dirty:
            # A value that is not finite is seen through any mask, as 0 * NaN.
            cache.clear(x.slot)
    if stale := [x.slot for x in newcomers if x.planned]:
        # They would write into what is copied or read before that pass.
        decoder.sequences.pending.index_fill_(0, on_device(np.array(stale), decoder.device), 0)
        decoder.plan()
    cache.copy_prefixes([(x.source, x.slot, x.shared) for x in newcomers if x.shared and x.source != x.slot])

    yield from (_read_beside(decoder, newcomers, owner) if beside else _read_apart(decoder, newcomers, owner, chunk))


def _read_beside(decoder: Decoder, newcomers: Sequence[Newcomer], owner: Tensor) -> Iterator[None]:
    """Have the passes read prompts. Whose end the next pass reads has its state written down, and runs behind it."""
    rows, k, cache = decoder.prompt_rows, decoder.predictions, decoder.cache
    newcomers = sorted(newcomers, key=lambda x: x.slot)
    masks = [decoder.mask_token_id] * (k - 1)
    for pieces in pieces_of([(x.slot, x.job.ids, x.shared) for x in newcomers], masks, len(rows)):
        if pieces[-1].ends:
            # Not before: each pass forgets what is pending of those that do not run.
            seq = _begin(decoder, newcomers)
        rows.bring(pieces, trash=cache.capacity, scratch=cache.scratch, last_position=decoder.last_position)
        decoder.reading = True
        yield
    n = len(newcomers) * k
    _take_in(decoder, newcomers, (rows.read_token[:n], rows.read_confidence[:n]), seq, owner)


def _read_apart(decoder: Decoder, newcomers: Sequence[Newcomer], owner: Tensor, chunk: int) -> Iterator[None]:
    """Run the model on the prompts, as left-padded columns with masks behind them."""
    began = perf_counter()
    cache, device = decoder.cache, decoder.device
    # Columns that every newcomer has keys of are not run.
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
    slot, columns, told = (on_device(x, device) for x in (place, ids, position))
    # Where padding is, transformers looks at the mask and waits for the device.
    seen = None if real.all() else on_device(real, device)
    prefill = decoder.prefill_cache(slot, on_device(np.array([x.slot for x in newcomers]), device))
    prefill.seen = first
    step = max(1, chunk // n)
    for end in [*range(first + step, T, step), width]:
        logits = decoder.prefill_chunk(prefill, columns, seen, told, end, keep=k if end == width else 1)
        decoder.reading_cost.apart += perf_counter() - began
        if end < width:
            yield
        began = perf_counter()
    cache.require_cached(decoder.model.config)
    seq = _begin(decoder, newcomers)
    # Where the rows of these stand, to whoever reads them out.
    o = torch.arange(n * k, device=device)
    start = torch.zeros(len(decoder.sequences.status) + 1, dtype=torch.int64, device=device)
    start[seq], start[-1] = o[::k], n * k
    of, last = (x.repeat_interleave(k, output_size=n * k) for x in (seq, decoder.sequences.length[seq] - 1))
    _take_in(decoder, newcomers, decoder.read(logits[:, -k:].flatten(0, 1), of, last + o % k, start), seq, owner)


def _begin(decoder: Decoder, newcomers: Sequence[Newcomer]) -> Tensor:
    """Write down the prompts, none of which runs yet; returns their sequences [n]."""
    sequences, device, T = decoder.sequences, decoder.device, max(len(x.job.ids) for x in newcomers)
    facts = np.array([(x.slot, len(x.job.ids), x.job.tokens, x.job.draws) for x in newcomers]).T.copy()
    tokens = np.zeros((len(newcomers), T), dtype=np.int64)
    for row, x in zip(tokens, newcomers):
        row[: len(x.job.ids)] = x.job.ids
    stops = np.full((len(newcomers), decoder.terms.stop_ids.shape[1]), -1, dtype=np.int64)
    for row, x in zip(stops, newcomers):
        row[: len(x.job.stop_ids)] = x.job.stop_ids
    seq, length, limit, draws = on_device(facts, device)
    decoder.terms.stop_ids[seq] = on_device(stops, device)
    sequences.length[seq], sequences.limit[seq], sequences.tokens[seq, :T] = length, limit, on_device(tokens, device)
    # As all begin: nothing emitted, nothing known.
    for count in (sequences.passes, sequences.hits, sequences.chains, sequences.blocks):
        count.index_fill_(0, seq, 0)
    sequences.pending.index_fill_(0, seq, 1)
    if decoder.choice is not None:
        own = [decoder.choice.choosing.numbers(x.job.choosing) for x in newcomers]
        decoder.choice.enter(seq, length, draws, on_device(np.array(own, dtype=np.float32), device))
    return seq


def _take_in(
    decoder: Decoder, newcomers: Sequence[Newcomer], read: tuple[Tensor, Tensor], seq: Tensor, owner: Tensor
) -> None:
    """Have prompts run, behind what their last tokens and masks have read: token, confidence [n * k]; plan anew."""
    sequences = decoder.sequences
    owner[seq] = on_device(np.array([x.job.number for x in newcomers]), decoder.device)
    sequences.pending.index_fill_(0, seq, 1)
    sequences.status.index_fill_(0, seq, RUNNING)
    n = len(newcomers)
    # On a GPU as many as there are slots, those behind the newcomers idle and without rows: a kernel is compiled for
    # each number of sequences, in the midst of serving, and that of the passes is there.
    B = n if decoder.graph is None else len(sequences.status)
    everybody = F.pad(seq, (0, B - n))
    some = Sequences(*(x[everybody] for x in vars(sequences).values()))
    some.status[n:] = LIMIT
    rows = Rows.allocate(B * decoder.strategy.most_rows, B, decoder.device, decoder.strategy.k)
    rows.expect_prefill(len(read[0]) // n)
    rows.start.clamp_(max=len(read[0]))
    budget = None if decoder.terms.budget is None else torch.full_like(decoder.terms.budget, len(rows.seq))
    terms = Terms(decoder.terms.threshold, decoder.terms.stop_ids[everybody], decoder.terms.price, budget)
    advance(some, rows, terms, *read, **decoder.planning)
    for x, y in zip(vars(sequences).values(), vars(some).values()):
        x[seq] = y[:n]
    decoder.plan()
