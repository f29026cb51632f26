"""The line of an engine: its requests in their order, and the thread's work on them.

A run takes in whoever stands next in line and can share its passes (`Request.kind` and `Request.choosing`). The thread
knows the line and not the engine, so that an engine which nobody holds any more is closed.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import count
from threading import Condition, Event
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor

from mtpkern.batching import Batch, BatchOutput, slots_of_next_try
from mtpkern.choosing import Choosing
from mtpkern.decoder import places_for
from mtpkern.kernels.sample import SPREAD
from mtpkern.openmp import lend_processors
from mtpkern.slots import Job
from mtpkern.streaming import surroundings
from mtpkern.watch import Watch, closed_of

# Seconds within which an idle engine's next request is likely to come.
SOON = 0.02
_CLOSED = "the engine was closed before this request had ended"
_NEXT_TRY = "this mtpkern.Engine", "batch_size or max_length"
# What the numbers of draws are made of: a multiple of SPREAD by its inverse is the number itself.
_INVERSE = pow(SPREAD, -1, 1 << 64)


class _Answer(Future[BatchOutput]):
    """A future whose callbacks can raise anything without harm to others, whom the same thread tells."""

    def add_done_callback(self, fn: Callable[[Future[BatchOutput]], object]) -> None:
        def called(future: Future[BatchOutput]) -> None:
            try:
                fn(future)
            except BaseException as error:  # a future logs an Exception, and lets all else through
                raise RuntimeError(f"a callback of a request raised {error!r}") from error

        super().add_done_callback(called)


class Request:
    """One prompt on its way. To its `Watch` it is the streamer, which shows tokens to the caller's, if there is one."""

    def __init__(self, batch: Batch, job: Job, streamer: Any, key: int | None) -> None:
        self.batch, self.job, self.streamer, self.key = batch, job, streamer, key
        self.future: Future[BatchOutput] = _Answer()
        # Whether nobody wants its tokens any more, and whether its streamer wants no more of them.
        self.unwanted = Event()
        self.closed = closed_of(streamer) or Event()
        self.error: BaseException | None = None
        # Whether its streamer has been shown the prompt, and whether tokens: behind these no try can begin anew.
        self.begun = self.shown = False
        # What all of a run have in common, and what need only be united.
        self.kind = places_for(len(batch.stop_ids)), id(batch.tokenizer)
        self.choosing = batch.choosing or Choosing()

    def begin(self, number: int) -> Job:
        """The prompt as it goes into a slot, by this number, which nobody else has."""
        drawn_by = None
        if self.key is not None:
            # That under which a run whose key is 0 draws what `generate` draws with this key; of one seed are many.
            drawn_by = (self.key * _INVERSE + self.job.number) % (1 << 64)
            drawn_by -= drawn_by >> 63 << 64
        watch = None
        if Watch.of(self.streamer, self.batch.criteria) is not None:
            watch = Watch(None if self.streamer is None else self, self.batch.criteria)
        return replace(self.job, number=number, watch=watch, closed=self.unwanted, drawn_by=drawn_by)

    def end(self) -> None:
        """End it, behind the next pass where it is running."""
        self.future.cancel()
        self.unwanted.set()

    def put(self, value: Tensor) -> None:
        """Show the prompt [1, T], once, however often it is tried."""
        if not self.begun:
            self.begun = True
            self._show("put", value)

    def put_block(self, new: list[list[int]]) -> None:
        """Show what has become certain."""
        self.shown = True
        if hasattr(self.streamer, "put_block"):
            self._show("put_block", new)
            return
        for token in new[0]:
            self._show("put", torch.tensor([token]))

    def _show(self, how: str, *value: Any) -> None:
        if self.streamer is None or self.error is not None:
            return
        try:
            getattr(self.streamer, how)(*value)
        except BaseException as error:  # of the caller's, and the caller's alone
            self.error = error
            self.closed.set()

    def finish(self, output: BatchOutput) -> None:
        """Tell what has become of it."""
        if output.error is None:
            self._show("end")
        error = self.error or output.error
        if error is None:
            self.future.set_result(output)
        else:
            self.future.set_exception(error)


class Line:
    """Requests in their order, and the thread's work on them, which must not hold on to the engine itself."""

    def __init__(self, slots: int, max_length: int, device: torch.device) -> None:
        self.slots, self.max_length, self.device = slots, max_length, device
        self.surroundings = surroundings(device)
        self.changed = Condition()
        self.waiting: deque[Request] = deque()
        self.inside: dict[int, Request] = {}
        self.numbers = count()
        # What does for all whom the last run has taken in.
        self.lately = Choosing()
        self.open, self.cancelled = True, Event()
        # Whether the thread is that of the process which this one, a fork, comes from.
        self.forked = False
        _lines.add(self)

    def put(self, requests: tuple[Request, ...]) -> None:
        """Put them at the end of the line."""
        with self.changed:
            if self.forked:
                raise RuntimeError(
                    "this mtpkern.Engine decodes in the process that this one was forked from; make another here"
                )
            if not self.open:
                raise RuntimeError("this mtpkern.Engine is closed and takes no more requests; make another")
            self.waiting.extend(requests)
            self.changed.notify_all()

    def close(self, *, cancel: bool) -> None:
        """Take no more; cancel: nor go on with any."""
        with self.changed:
            self.open = False
            if cancel:
                self.cancelled.set()
            self.changed.notify_all()

    def work(self) -> None:
        """Decode whatever comes, until the line is closed and empty."""
        try:
            with ExitStack() as stack:
                for context in self.surroundings:
                    stack.enter_context(context)
                while self._serve():
                    pass
        finally:
            # Also behind a fault of ours: whoever waits hears that it is in vain, and whoever comes.
            self.close(cancel=True)
            for request in [*self.inside.values(), *self.waiting]:
                # One that was to be tried again runs already; of the others nobody else tells who waits for several.
                if request.future.cancel():
                    request.future.set_running_or_notify_cancel()
                else:
                    request.future.set_exception(CancelledError(_CLOSED))
            self.inside.clear()
            self.waiting.clear()

    def _serve(self) -> bool:
        """Decode who comes next, and all who can share its passes; False at the end of all.

        Idle, the thread holds on to none of them.
        """
        head = self._first()
        if head is not None:
            self._run(head)
        return head is not None

    def _first(self) -> Request | None:
        """Who is first in line, once there is somebody; None at the end of all."""
        with self.changed:
            while True:
                while self.waiting and self.waiting[0].future.cancelled():
                    self.waiting.popleft().future.set_running_or_notify_cancel()
                if self.cancelled.is_set() or not (self.waiting or self.open):
                    return None
                if self.waiting:
                    return self.waiting[0]
                if not self.changed.wait(SOON):
                    lend_processors(self.device)
                    self.changed.wait_for(lambda: self.waiting or not self.open)

    def _run(self, head: Request) -> None:
        """Decode what is like the first in line, and all that comes to stand behind it and is like it."""
        error = self._decode(head)
        left = list(self.inside.values())
        self.inside.clear()
        with self.changed:
            if not left and self.waiting and self.waiting[0] is head and not self.cancelled.is_set():
                # It has not come as far as to its slot.
                self.waiting.popleft()
                if head.future.running() or head.future.set_running_or_notify_cancel():
                    left = [head]
        back: list[Request] = []
        try:
            if left and (slots := slots_of_next_try(error, self.slots, head.batch.model, *_NEXT_TRY)):
                self.slots = slots
                back = [request for request in left if not request.shown and not request.unwanted.is_set()]
        except Exception as warning:  # where these are errors
            error = warning
        for request in left:
            if request not in back:
                request.future.set_exception(error)
        with self.changed:
            self.waiting.extendleft(reversed(back))

    def _decode(self, head: Request) -> BaseException:
        """Decode the first in line and whoever comes; returns what those are told who are left in the run."""
        room = {"slots": self.slots, "tokens": self.max_length, "new": self.max_length - 1}
        try:
            choosing = self._united(head)
            jobs = _Next(self, head.kind, choosing)
            # Draws are told apart by their jobs' numbers alone (`begin`).
            key = torch.zeros(1, dtype=torch.int64, device=head.batch.model.device) if choosing.samples else None
            of_all = None if choosing == Choosing() else choosing, key
            head.batch.decode(jobs, self._emit, closed=self.cancelled, watched=True, of_all=of_all, **room)
        except BaseException as error:
            _let_go(error)
            return error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)  # without this frame
        return CancelledError(_CLOSED)

    def _united(self, head: Request) -> Choosing:
        """What does for the first in line, for those behind it as far as one can do for all, and for those of late.

        Who asks for what somebody has asked for in the last run is likely to come again.
        """
        choosing, lately, self.lately = head.choosing, self.lately, Choosing()
        with self.changed:
            for request in self.waiting:
                both = choosing.united(request.choosing) if request.kind == head.kind else None
                if both is None:
                    break
                choosing = both
        return choosing.united(lately) or choosing

    def _emit(self, output: BatchOutput) -> None:
        self.inside.pop(output.index).finish(output)


class _Next(Iterator[Job]):
    """Those in line that are of one kind, as far as they are there: who has no next may have one later."""

    def __init__(self, line: Line, kind: Any, choosing: Choosing) -> None:
        self.line, self.kind, self.choosing = line, kind, choosing

    def __next__(self) -> Job:
        line = self.line
        with line.changed:
            while line.waiting and self._may_come(line.waiting[0]):
                request = line.waiting.popleft()
                # Tried again, it runs already.
                if request.future.running() or request.future.set_running_or_notify_cancel():
                    job = request.begin(next(line.numbers))
                    line.inside[job.number] = request
                    line.lately = line.lately.united(request.choosing) or request.choosing
                    return job
        raise StopIteration

    def _may_come(self, request: Request) -> bool:
        return request.kind == self.kind and self.choosing.united(request.choosing) == self.choosing


# Whose functions hold what a run has allocated; what a caller's own hold is left for a debugger.
_OF_RUNS = {"mtpkern", "torch", "transformers", "transformers_modules", "peft"}


def _let_go(error: BaseException) -> None:
    """Free what a run's functions held: it has to go before the next try, and whoever keeps the error would keep it."""
    # What it came of, too; a caller's own may go round in a circle.
    found: list[BaseException] = [error]
    for one in found:
        for frame, _ in walk_tb(one.__traceback__):
            if str(frame.f_globals.get("__name__", "")).partition(".")[0] in _OF_RUNS:
                with suppress(RuntimeError):  # it is still at work
                    frame.clear()
        behind = (one.__context__, one.__cause__)
        found += [x for x in behind if x is not None and not any(x is y for y in found)]


_lines: weakref.WeakSet[Line] = weakref.WeakSet()


def _after_fork() -> None:
    """In a child no engine has its thread, which may have held the lock: whoever asked would wait in vain."""
    for line in list(_lines):
        line.changed, line.forked = Condition(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
