"""Refill: the poll of a run whose slots stay full.

The host knows of a sequence's end through the poll that the loop makes anyway. It then queues a copy of what has been
emitted and puts the next prompt into the slot, before the next pass; nothing waits. Among the next few prompts the one
goes first that shares most of its beginning with what a slot holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from threading import Event

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from mtpkern.attention import unrouted
from mtpkern.decoder import Decoder
from mtpkern.generation import faults_of, past_positions
from mtpkern.kernels.state import FAULT, RUNNING, STOPPED, Sequences
from mtpkern.poll import Poll
from mtpkern.prefix_cache import common
from mtpkern.slots import Job, Newcomer, enter
from mtpkern.watch import REASONS, Watch, first_tokens, snapshot

# Prompts that are looked at for the next one, for each slot.
LOOK_AHEAD = 4
# Tokens of prompts between two passes of those that run: few enough to keep nobody waiting for long, and enough to take
# no longer in all (docs/log.md, "prompts that passes read").
CHUNK_ON_CPU, CHUNK_ELSEWHERE = 256, 2048


@dataclass(frozen=True)
class BatchOutput:
    """What has become of one prompt of `generate_batch`.

    index          its place among the prompts
    tokens         the new ones, a stop token included
    blocks         how many of them each pass emitted, the prefill being the first
    finish_reason  "stop" at a stop token, "stop_string", "criteria", "time", "length" at the limit, "error"; of an
                   Engine's "closed" too, where its streamer was
    error          why there are no tokens, as an exception; None where all went well
    text           the new tokens decoded, without special tokens, where there is a tokenizer
    shared         tokens of the prompt whose keys were there already
    """

    index: int
    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    finish_reason: str = "error"
    error: BaseException | None = None
    text: str | None = None
    shared: int = 0

    @property
    def passes(self) -> int:
        """Passes that emitted something of it."""
        return len(self.blocks)

    @property
    def tokens_per_pass(self) -> float:
        """Tokens emitted / passes; 0 of a prompt that has failed."""
        return len(self.tokens) / max(1, len(self.blocks))


class Slots(Poll):
    """Takes what has ended out of its slot, and puts the next prompt in.

    emit gets each output as soon as it is on the host; closed ends the run behind the next pass. jobs are taken in
    their order, but for those that find their keys in a slot (reuse); they are asked for more whenever a slot is free,
    also where they had none before. criteria are asked of each sequence alone, or of jobs with a watch that (watched).

        slots = Slots(decoder, jobs, outputs.append, closed=None, tokenizer=None, chunk=8192, reuse=True)
        slots.fill()
        with routed(model, decoder.cache) as route:
            decoder.run(route, slots)
        slots.deliver(wait=True)
    """

    calls_others = True

    def __init__(
        self,
        decoder: Decoder,
        jobs: Iterable[Job],
        emit: Callable[[BatchOutput], object],
        *,
        closed: Event | None,
        tokenizer: PreTrainedTokenizerBase | None,
        chunk: int,
        reuse: bool,
        criteria: StoppingCriteriaList | None = None,
        watched: bool = False,
    ) -> None:
        sequences = decoder.sequences
        B = len(sequences.status)
        self.criteria, self.watched = criteria or StoppingCriteriaList(), watched
        self.window = None
        if watched or Watch.of(None, self.criteria) is not None:
            # Read late, a newcomer's first state has what its prefill and its first pass have brought.
            self.window = torch.arange(-2 * decoder.strategy.k, 0, device=sequences.status.device)
        self.watches: list[Watch | None] = [None] * B
        # Whose a slot is, on the device: a state that is read late tells of whom it speaks.
        self.owner = torch.full_like(sequences.status, -1)
        super().__init__(sequences)
        self.decoder, self.emit, self.closed = decoder, emit, closed
        self.tokenizer, self.chunk, self.reuse = tokenizer, chunk, reuse
        self.waiting = iter(jobs)
        self.next: list[Job] = []
        self.inside: list[Newcomer | None] = [None] * B
        self.arriving: list[Newcomer] = []
        self.entering: Iterator[None] | None = None
        # Of each slot: the tokens whose keys it holds; whether these may not be finite; whether the device has not
        # ended who was there last, so that rows may be planned still.
        self.held = [np.empty(0, dtype=np.int64)] * B
        self.dirty, self.planned = [False] * B, [False] * B
        self.left: list[_Left] = []

    def state(self) -> Tensor:
        """What is copied, on the device: owner and status of each slot [B, 2], or what a `Watch` sees behind it."""
        if self.window is None:
            return torch.stack([self.owner, self.sequences.status], dim=1)
        return torch.cat([self.owner[:, None], snapshot(self.sequences, self.window)], dim=1)

    def take(self, state: Tensor) -> int:
        """How many slots are taken, from a copy of `state()`; behind the end of a sequence it has the next come in."""
        self.deliver(wait=False)
        self._collect(state)
        self.has_queued = False
        if self.closed is not None and self.closed.is_set():
            return 0
        while True:
            if self.on_cpu:
                self.deliver(wait=True)
            with unrouted(self.decoder.model):
                self.fill()
            # Some have come to their end in the prefill already; where the state is known, none makes a pass in vain.
            if not self.on_cpu or not self._collect(self.state()):
                return sum(x is not None for x in self.inside) + (self.entering is not None)

    def _collect(self, state: Tensor) -> bool:
        """Let those go that have ended; returns whether anybody has."""
        gone = False
        for slot, (owner, *seen) in enumerate(state.tolist()):
            x, watch = self.inside[slot], self.watches[slot]
            if x is None or x.job.number != owner:
                continue
            end: int | None = None
            error: BaseException | None = None
            if x.job.closed is not None and x.job.closed.is_set():
                self.sequences.status[slot].fill_(STOPPED)
                error = CancelledError("it was closed while it ran")
            elif watch is not None:
                error = self._asked(x, partial(watch.take, state[slot : slot + 1, 1:]))
                end = watch.ends[0]
            if end is not None or error is not None or seen[0] != RUNNING:
                self._leave(x, seen[0], end, error)
                gone = True
        return gone

    def _asked(self, x: Newcomer, ask: Callable[[], object]) -> BaseException | None:
        """Ask who watches a sequence; an error of one that it has for itself ends it, and is returned."""
        try:
            ask()
        except BaseException as error:
            if x.job.watch is None:
                raise
            self.sequences.status[x.slot].fill_(STOPPED)
            return error
        return None

    def _leave(self, x: Newcomer, status: int, end: int | None, error: BaseException | None = None) -> None:
        """Queue the copy of what a sequence has emitted, and free its slot; end: new tokens, where the host has cut."""
        s, slot, job, T = self.sequences, x.slot, x.job, len(x.job.ids)
        facts = s.length[slot, None], s.passes[slot, None], s.blocks[slot, : job.new], s.tokens[slot, T : job.tokens]
        copy = torch.cat(facts).to("cpu", non_blocking=True)
        event = None
        if not self.on_cpu:
            event = torch.Event(self.decoder.device)
            event.record()
        watch = self.watches[slot]
        reason = REASONS[status] if watch is None else watch.reasons[0]
        self.left.append(_Left(x, reason, end, copy, event, error))
        self.inside[slot] = self.watches[slot] = None
        self.dirty[slot], self.planned[slot] = status == FAULT, status == RUNNING
        if status == FAULT:
            self.held[slot] = self.held[slot][:0]

    def deliver(self, *, wait: bool) -> None:
        """Hand on the outputs whose copies have arrived, or all of them."""
        while self.left and (wait or self.left[0].has_arrived()):
            left = self.left.pop(0)
            output = left.output(self.decoder.model, self.tokenizer)
            slot, ids = left.x.slot, left.x.job.ids
            # Nobody has come into the slot meanwhile, not even who has left it at once.
            if self.inside[slot] is None and self.held[slot] is ids and output.error is None:
                # Of what the last pass has emitted there may be no keys.
                fed = sum(output.blocks[:-1])
                self.held[slot] = np.concatenate([ids, np.array(output.tokens[:fed], dtype=np.int64)])
            self.emit(output)

    def fill(self) -> None:
        """Put prompts into the free slots, as far as they come in without keeping the running ones waiting."""
        # What the next pass is to read has not been read before it.
        while not self.decoder.reading:
            if self.entering is None:
                self.arriving, beside = self._choose()
                if not self.arriving:
                    return
                for x in self.arriving:
                    self.held[x.slot] = self.held[x.slot][:0]
                self.entering = enter(self.decoder, self.arriving, self.owner, chunk=self._chunk(), beside=beside)
            self.has_queued = True
            for _ in self.entering:
                if self.decoder.reading or any(inside is not None for inside in self.inside):
                    return  # there is more of it, behind the next pass
            self.entering = None
            for x in self.arriving:
                self.inside[x.slot], self.held[x.slot], self.dirty[x.slot] = x, x.job.ids, False
                watch = x.job.watch
                if self.window is not None and not self.watched:
                    watch = Watch(None, self.criteria)
                self.watches[x.slot] = watch
                if watch is not None:
                    error = self._asked(x, partial(self._begin_watch, watch, x))
                    if error is not None:
                        self._leave(x, RUNNING, 0, error)

    def _chunk(self) -> int:
        """Tokens of prompts that are read at a time: while others run fewer, unless they may change no bit."""
        if not any(self.inside) or self.decoder.cache.batch_invariant:
            return self.chunk
        return min(self.chunk, CHUNK_ON_CPU if self.on_cpu else CHUNK_ELSEWHERE)

    def _begin_watch(self, watch: Watch, x: Newcomer) -> None:
        """Have a sequence watched as one that is alone."""
        slot, job, device = x.slot, x.job, self.decoder.device
        own = Sequences(*(part[slot : slot + 1] for part in vars(self.sequences).values()))
        watch.begin(torch.from_numpy(job.ids)[None], None, new=job.new, padding=0, device=device)
        watch.attach(own, self.decoder.strategy)

    def _choose(self) -> tuple[list[Newcomer], bool]:
        """Prompts for the free slots, to be prefilled together, and whether passes read them."""
        free = [slot for slot, x in enumerate(self.inside) if x is None]
        in_line = not self.on_cpu and len(free) < len(self.inside)
        group: list[Newcomer] = []
        beside, rows = False, 0
        while free:
            if not self.next:
                # As many at a time, so that nobody is passed over for ever.
                self.next = [job for _, job in zip(range(LOOK_AHEAD * len(self.inside)), self.waiting)]
            if not self.next:
                break
            if left := [job for job in self.next if job.has_left]:
                for job in left:
                    self.next.remove(job)
                    text = None if self.tokenizer is None else ""
                    self.emit(BatchOutput(job.number, finish_reason="closed", text=text))
                continue
            job, source, shared = self._best()
            rows += len(job.ids) - shared + self.decoder.strategy.k - 1
            if group:
                # Who begins like one that is about to come in has its keys when it is there.
                coming = max(common(job.keys, other.job.keys) for other in group)
                if self.reuse and coming > shared and 2 * coming >= len(job.ids):
                    break
                if beside and rows > len(self.decoder.prompt_rows):
                    break
                # Where padding is, transformers looks at the mask and waits for the device.
                if not beside and in_line and len(job.ids) != len(group[0].job.ids):
                    break
            else:
                beside = self.decoder.reads_beside(rows, alone=not any(self.inside))
            self.next.remove(job)
            slot = source if shared and source in free else free[0]
            free.remove(slot)
            group.append(Newcomer(slot, job, source, shared, self.dirty[slot], self.planned[slot]))
        return group, beside

    def _best(self) -> tuple[Job, int, int]:
        """The prompt among the next that finds most of its keys in a slot: it, the slot, and how many."""
        first = self.next[0], 0, 0
        slots = list(enumerate(self.held)) if self.reuse else []
        found = ((job, source, common(job.keys, held)) for job in self.next for source, held in slots)
        return max(chain([first], found), key=lambda one: one[2])


@dataclass(frozen=True)
class _Left:
    """A sequence that has ended, on its way to the host."""

    x: Newcomer
    reason: str
    end: int | None
    copy: Tensor
    event: torch.Event | None
    error: BaseException | None

    def has_arrived(self) -> bool:
        return self.event is None or self.event.query()

    def output(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> BatchOutput:
        """What it is, as soon as that is there."""
        if self.event is not None:
            self.event.synchronize()
        job, shared, reason = self.x.job, self.x.shared, self.reason
        number, prompt, new = job.number, len(job.ids), job.new
        if self.error is not None:
            return BatchOutput(number, error=self.error, shared=shared)
        if reason == "fault":
            return BatchOutput(number, error=RuntimeError(faults_of("this prompt")), shared=shared)
        length, passes, *rest = self.copy.tolist()
        if reason == "length" and job.asked is not None:
            positions = prompt + new - 1
            return BatchOutput(number, error=ValueError(past_positions(model, positions, prompt, job.asked)))
        tokens, blocks = rest[new : new + length - prompt], rest[:passes]
        if self.end is not None:
            tokens, blocks = tokens[: self.end], first_tokens(blocks, self.end)
        try:
            text = None if tokenizer is None else str(tokenizer.decode(tokens, skip_special_tokens=True))
        except Exception as error:  # of a token that the model has and the tokenizer has not, say
            return BatchOutput(number, error=error, shared=shared)
        return BatchOutput(number, tokens, blocks, reason, text=text, shared=shared)
