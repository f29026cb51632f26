"""Watch: sees each token of a run as soon as it is certain, shows it to who asked, and stops sequences on the host.

The device stops at stop tokens and limits by itself. What it cannot know (stop strings, criteria of the caller's, the
time) is asked here, of every prefix in order, so a sequence ends at the token where `model.generate` would have ended
it, wherever that stands in a block; what the device has decoded beyond it is cut off. Drafts never get here.

The copy that the poll makes of each state of the device carries the last tokens along, so that nothing waits which
would not have waited anyway. Nobody watching: no `Watch`, and the loop is what it was.

Two paces. Stop strings look at one sequence and are asked as soon as its tokens are there. A streamer and criteria of
the caller's may look at the whole batch, so they get it column by column as `model.generate` has it: prompts and t new
tokens of each sequence, padding behind those that have ended, once every sequence is that far.
"""

from __future__ import annotations

from collections.abc import Iterable
from threading import Event
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria

from mtpkern.kernels.state import FAULT, LIMIT, RUNNING, STOPPED, Sequences
from mtpkern.poll import Poll
from mtpkern.stops import NO_TOKEN, TextStops
from mtpkern.strategies import Strategy

Criterion = TypeVar("Criterion")
# Criteria whose meaning is known; a subclass may mean anything.
_KNOWN = (MaxLengthCriteria, EosTokenCriteria, MaxTimeCriteria, StopStringCriteria, TextStops)
# Where two reasons fall on one token, the first of these is told.
_PRECEDENCE = ("stop", "stop_string", "criteria", "time", "closed", "length", "fault")
# Why the device has ended a sequence; one that the passes have not sufficed for is at its limit.
REASONS = {RUNNING: "length", STOPPED: "stop", LIMIT: "length", FAULT: "fault"}
# What a clock is shown, which does not look.
_ANYTHING = torch.zeros(1, 1, dtype=torch.int64)


class Streamer(Protocol):
    """What transformers calls a streamer: `put` gets the prompts [B, T], then each column of new tokens [B].

    One with a `put_block` gets, behind the prompts, a list of newly certain tokens for each sequence by that, and may
    have an event `closed` that ends the run. One with a `fail` gets the error of a run that fails by that.
    """

    def put(self, value: Tensor) -> None:
        """Take prompts or new tokens, on the host."""

    def end(self) -> None:
        """Nothing more comes."""


def closed_of(streamer: Any) -> Event | None:
    """The event by which a streamer ends its run, if any: what else is called `closed`, as a file's is, is none."""
    closed = getattr(streamer, "closed", None)
    return closed if hasattr(closed, "is_set") else None


def first_tokens(blocks: list[int], tokens: int) -> list[int]:
    """The blocks of the first so many tokens: `first_tokens([1, 4, 4], 3)` is [1, 2]."""
    kept: list[int] = []
    for block in blocks:
        kept.append(min(block, tokens - sum(kept)))
        if sum(kept) == tokens:
            break
    return kept


def of_kind(criteria: Iterable[Any], kind: type[Criterion]) -> list[Criterion]:
    """Those of exactly this class."""
    return [criterion for criterion in criteria if type(criterion) is kind]


class Watch:
    """Sees a run of B sequences through `poll`: new tokens of each (`ends`), and why there are no more (`reasons`).

    watch = Watch.of(streamer, stopping_criteria)    # None where nobody watches
    watch.begin(input_ids, attention_mask, new=max_new_tokens, padding=0, device=model.device)
    poll = watch.poll(decoder.sequences, strategy)
    decoder.run(route, poll)
    poll.finish()
    watch.ends, watch.reasons    # new tokens of each sequence, and why there are no more
    """

    def __init__(self, streamer: Any, criteria: Iterable[Any]) -> None:
        self.streamer = streamer
        self.by_blocks = hasattr(streamer, "put_block")
        self.closed = closed_of(streamer) if self.by_blocks else None
        self.strings = [*of_kind(criteria, StopStringCriteria), *of_kind(criteria, TextStops)]
        self.clocks = of_kind(criteria, MaxTimeCriteria)
        self.others = [x for x in criteria if type(x) not in _KNOWN]
        self.begun = False

    @classmethod
    def of(cls, streamer: Any, criteria: Iterable[Any]) -> Watch | None:
        """A watch, or None where there is nothing to see or ask."""
        watch = cls(streamer, criteria)
        wanted = streamer is not None or watch.strings or watch.clocks or watch.others
        return watch if wanted else None

    def begin(self, input_ids: Tensor, attention_mask: Tensor | None, *, new: int, padding: int, device: Any) -> None:
        """Take in the prompts [B, T], on the host, and show them, once; criteria get prefixes on `device`."""
        if self.begun:
            return
        self.begun = True
        B, self.T = input_ids.shape
        self.prompts = [self.T] * B if attention_mask is None else attention_mask.long().sum(1).tolist()
        self.padding = padding
        self.text: list[list[int]] = [[] for _ in range(B)]  # new tokens, as far as they are certain and not cut
        self.certain = [0] * B  # how many of them the device has written
        self.ends: list[int | None] = [None] * B
        self.reasons: list[str] = [""] * B
        self.columns = 0  # shown and asked for
        self.shown = [0] * B  # as blocks
        if self.strings:
            # The end of the prompt, as much as a match may reach into, is as good as the whole.
            L = self.reach = max(criterion.maximum_token_len for criterion in self.strings)
            self.leads = F.pad(input_ids.long(), (L, 0), value=NO_TOKEN)[:, -L:].tolist()
        if self.others:
            behind = torch.full((B, new), padding, dtype=torch.int64)
            self.ids = torch.cat([input_ids.long(), behind], dim=1)  # up to `columns`
        # On a GPU criteria are asked beside the passes, on a stream of their own: they would wait for one otherwise.
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(self.device) if self.others and self.device.type == "cuda" else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        if self.streamer is not None:
            self.streamer.put(input_ids.clone())

    def attach(self, sequences: Sequences, strategy: Strategy) -> None:
        """Watch these B sequences from now on: whoever polls them calls `take`."""
        self.sequences = sequences
        self.verify = strategy.verify
        self.told = [False] * len(self.prompts)

    def poll(self, sequences: Sequences, strategy: Strategy) -> Poll:
        """The poll of a decoder's run."""
        self.attach(sequences, strategy)
        return _WatchedPoll(sequences, self, 2 * strategy.k - 1)

    def finish(self) -> None:
        """Tell the streamer that this is all."""
        if self.streamer is not None:
            self.streamer.end()

    def take(self, state: Tensor) -> int:
        """Take in a state [B, 3 + W] of the device (see `snapshot`); returns how many sequences go on.

        W: as many tokens as can have come since the last one, 2k - 1 of a pass with the drafts behind them.
        """
        news = state.tolist()
        added = [self._add(b, length, pending, row) for b, (_, length, pending, *row) in enumerate(news)]
        if self.strings and any(added):
            self._ask_strings(added)
        for b, row in enumerate(news):
            if row[0] != RUNNING and not self.told[b]:
                self._end(b, self.certain[b], REASONS[row[0]])
        self._step_columns()
        late = any(bool(clock(_ANYTHING, None).any()) for clock in self.clocks)
        closed = self.closed is not None and self.closed.is_set()
        if late or closed:
            for b, end in enumerate(self.ends):
                if end is None:
                    self._end(b, self.certain[b], "time" if late else "closed")
            self._step_columns()
        for b, row in enumerate(news):
            if self.ends[b] is not None and row[0] == RUNNING and not self.told[b]:
                # A number of Python's goes along with the kernel: nothing waits.
                self.sequences.status[b].fill_(STOPPED)
                self.told[b] = True
        if self.by_blocks:
            self._show_blocks()
        return sum(end is None for end in self.ends)

    def _add(self, b: int, length: int, pending: int, window: list[int]) -> int:
        """Append what has become certain of a sequence; returns how many tokens."""
        if self.ends[b] is not None:
            return 0
        drafts = max(pending - 1, 0) if self.verify else 0
        before, self.certain[b] = self.certain[b], max(self.certain[b], length - drafts - self.prompts[b])
        new = self.certain[b] - before
        assert new <= len(window) - drafts, "a state of the device has not been read"
        if new > 0:
            self.text[b] += window[len(window) - drafts - new : len(window) - drafts]
        return new

    def _end(self, b: int, end: int, reason: str) -> None:
        """A sequence ends behind so many new tokens, unless it has ended before that."""
        known = self.ends[b]
        if known is None or (end, _PRECEDENCE.index(reason)) < (known, _PRECEDENCE.index(self.reasons[b])):
            self.ends[b], self.reasons[b] = end, reason
            del self.text[b][end:]

    def _ask_strings(self, added: list[int]) -> None:
        """End each sequence at the first of its new tokens that completes a stop string."""
        # As many tokens as a match may take: the end of every new prefix, one below the other.
        ends = [(b, self.certain[b] - i) for b, new in enumerate(added) for i in reversed(range(new))]
        texts = [lead + text for lead, text in zip(self.leads, self.text)]
        windows = torch.tensor([texts[b][end : self.reach + end] for b, end in ends])
        for criterion in self.strings:
            for (b, end), done in zip(ends, criterion(windows, None).tolist()):
                if done:
                    self._end(b, end, "stop_string")

    def _step_columns(self) -> None:
        """Ask the caller's criteria of, and show to the streamer, every column that all sequences have come to."""
        by_column = self.streamer is not None and not self.by_blocks
        if not self.others:
            # Nobody ends a sequence meanwhile, so that all of them can be made at once.
            n = self._last_column() - self.columns if by_column else 0
            if n > 0:
                texts = [text[self.columns : self.columns + n] for text in self.text]
                rows = [text + [self.padding] * (n - len(text)) for text in texts]
                for column in torch.tensor(list(zip(*rows))).unbind():
                    self.columns += 1
                    self.streamer.put(column)
            return
        while (t := self.columns + 1) <= self._last_column():
            column = torch.tensor([text[t - 1] if t <= len(text) else self.padding for text in self.text])
            self.ids[:, self.T + self.columns] = column
            for b, done in enumerate(self._ask(self.ids[:, : self.T + t])):
                if done:
                    self._end(b, t, "criteria")
            if by_column:
                self.streamer.put(column)
            self.columns = t

    def _last_column(self) -> int:
        """The column that all sequences have come to; none is behind the longest of those that have ended."""
        running = [certain for end, certain in zip(self.ends, self.certain) if end is None]
        return min(running) if running else max(end for end in self.ends if end is not None)

    def _ask(self, prefix: Tensor) -> list[bool]:
        with torch.cuda.stream(self.stream):  # None: no other stream
            ids = prefix.to(self.device, copy=True, memory_format=torch.contiguous_format)
            done = torch.zeros(len(ids), dtype=torch.bool, device=self.device)
            for criterion in self.others:
                said: Any = criterion(ids, None)
                if isinstance(said, (bool, Tensor)):
                    done = done | said
                if not isinstance(said, (bool, Tensor)) or done.shape != (len(ids),):
                    gave = list(said.shape) if isinstance(said, Tensor) else repr(said)
                    raise ValueError(
                        f"stopping_criteria must say of each sequence whether it is done, a tensor [{len(ids)}], or "
                        f"True or False for all; {getattr(criterion, '__name__', type(criterion).__name__)} gave {gave}"
                    )
            return done.tolist()  # type: ignore[no-any-return]

    def _show_blocks(self) -> None:
        """Hand on what will stand: with criteria of the caller's, no token that they have not been asked about."""
        new = []
        for b, before in enumerate(self.shown):
            end = self.ends[b]
            self.shown[b] = self.certain[b] if end is None else end
            if self.others:
                self.shown[b] = min(self.shown[b], self.columns)
            new.append(self.text[b][before : self.shown[b]])
        if any(new):
            self.streamer.put_block(new)


class _WatchedPoll(Poll):
    """Copies what `snapshot` makes of each state."""

    calls_others = True

    def __init__(self, sequences: Sequences, watch: Watch, window: int) -> None:
        self.watch = watch
        self.window = torch.arange(-window, 0, device=sequences.status.device)
        super().__init__(sequences)

    def state(self) -> Tensor:
        return snapshot(self.sequences, self.window)

    def take(self, state: Tensor) -> int:
        return self.watch.take(state)


def snapshot(sequences: Sequences, window: Tensor) -> Tensor:
    """[B, 3 + W]: status, length, pending, and the W tokens before `length`; window: arange(-W, 0)."""
    tokens = sequences.tokens.gather(1, (sequences.length[:, None] + window).clamp_(min=0))
    return torch.cat([torch.stack([sequences.status, sequences.length, sequences.pending], dim=1), tokens], dim=1)
