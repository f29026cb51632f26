"""Engine: requests that come at any time, from any thread, share the passes of one model.

One thread decodes. Between two passes it takes in what has been asked for meanwhile, into slots that are free
(mtpkern.refill), so that eight requests at once take little longer than one. A request is what a prompt of
`generate_batch` is: its tokens, and what it draws, are those it gets alone. It has limits, stop strings, criteria and a
streamer of its own, and of what becomes of scores whether it samples and the numbers of mtpkern.settings: temperature,
top-k, top-p, min-p, repetition penalty. What is left, stop tokens, bans and a caller's own processors, the passes of a
run have in common: who asks for something else waits until those before it have ended, and whoever comes later waits
behind it. So does who samples, or has a setting, that nobody in line had when the run began. Nobody waits for ever.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import count
from threading import Condition, Event, Thread, current_thread
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mtpkern.arguments import require_prompts, require_streamer, require_tensors
from mtpkern.batching import Batch, BatchOutput, Prompt
from mtpkern.choosing import Choosing
from mtpkern.fields import whole_number
from mtpkern.graph import without_kernels
from mtpkern.kernels.form import autocast_of
from mtpkern.kernels.sample import SPREAD
from mtpkern.openmp import lend_processors
from mtpkern.options import Options
from mtpkern.output import first_line
from mtpkern.pool import release_graphs
from mtpkern.slots import Job
from mtpkern.streaming import Stream, end_at_exit, surroundings
from mtpkern.watch import Watch

# Seconds within which an idle engine's next request is likely to come.
SOON = 0.02
_CLOSED = "the engine was closed before this request had ended"
# Tokens of a request and its answer, unless the engine is told.
MAX_LENGTH = 2048
# What the numbers of draws are made of: a multiple of SPREAD by its inverse is the number itself.
_INVERSE = pow(SPREAD, -1, 1 << 64)


class Engine:
    """Decodes requests of many threads side by side; `generate` is a drop-in for `mtpkern.generate`, `submit` its core.

    batch_size: slots, requests that run at a time (8). Others wait in line.
    max_length: tokens that a request and its answer have together, at most (2,048): a GPU's buffers hold as many for
        each slot.
    tokenizer: the model's, for prompts that are texts and for the text of outputs.
    options: of `mtpkern.generate`, for all requests: strategy, mask_token_id, rows, use_graph, compile,
        batch_invariant, prefill_chunk, check_model; and `reuse` of `generate_batch`.

    The model is taken while requests run, and only then: other calls on it wait as for any run. Of a model that
    changes, or moves, while it is idle the next request sees what it is then.

        with mtpkern.Engine(model, tokenizer=tokenizer, batch_size=16) as engine:
            futures = [engine.submit(text, max_new_tokens=100) for text in texts]
            print(futures[0].result().text)

    In a server whose handlers run in threads of their own: `model.generate = engine.generate`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 8,
        max_length: int = MAX_LENGTH,
        **options: Any,
    ) -> None:
        known = {*Options.NAMES, "reuse"} - {"wait"}
        if unknown := sorted(options.keys() - known):
            raise TypeError(
                f"mtpkern.Engine does not know {', '.join(unknown)}; of generate it takes {', '.join(sorted(known))}, "
                "and what is a request's own goes to submit or generate"
            )
        self._of_all: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": batch_size, **options}
        Batch(model, [], max_new_tokens=1, **self._of_all)  # what is wrong with these is said now
        self.model, self.max_length = model, whole_number("max_length", max_length, least=2)
        self.batch_size = whole_number("batch_size", batch_size, least=1)
        self._line = _Line(self.batch_size, self.max_length, model.device)
        self._autocast = autocast_of(model.device)
        self._thread = Thread(target=self._line.work, name="mtpkern.Engine", daemon=True)
        weakref.finalize(self, self._line.close, cancel=False)
        end_at_exit(self._thread, partial(self._line.close, cancel=True))
        self._thread.start()

    def submit(self, prompt: Prompt, *, streamer: Any = None, **kwargs: Any) -> Future[BatchOutput]:
        """Ask for one prompt's tokens, a text or token ids [T]; returns at once.

        kwargs: what `generate_batch` honours: max_new_tokens, do_sample and its settings, seed, stop_strings,
        stopping_criteria, eos_token_id, generation_config, and a tokenizer in the place of the engine's.
        streamer: as of `generate`, called in the engine's thread. An exception that it raises, or one of the criteria,
            ends this request alone and is what the future raises.

        The future's result is a `BatchOutput`. Its `cancel` works as long as the request waits in line. Raises
        ValueError or TypeError for what `generate_batch` would refuse, RuntimeError where the engine is closed.

            engine.submit("Two and two is", max_new_tokens=8).result().text
        """
        require_streamer(streamer)
        return self._put(*self._requests([prompt], streamer, kwargs))[0].future

    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """`mtpkern.generate` in passes that others share: left-padded prompts [B, T] to [B, T + new] token ids.

        Each prompt is a request; returns when all have ended. Ctrl-C in the waiting thread ends them. seed: as of
        `submit`, where torch's own is not this call's alone.
        Refused, besides what `submit` refuses: return_dict_in_generate, and a streamer with more than one prompt.

            output = engine.generate(**tokenizer("Two and two is", return_tensors="pt"), max_new_tokens=64)
        """
        self._require_other_thread()
        require_streamer(streamer)
        inputs = kwargs.pop("inputs", None)
        if input_ids is not None and inputs is not None:
            raise ValueError("inputs and input_ids are two names of the prompts, got both; leave one out")
        input_ids = inputs if input_ids is None else input_ids
        require_tensors(input_ids, attention_mask)
        assert input_ids is not None
        if kwargs.pop("return_dict_in_generate", None):
            raise ValueError(
                "mtpkern.Engine.generate does not support return_dict_in_generate=True; submit returns an object for "
                "each prompt"
            )
        if streamer is not None and len(input_ids) > 1:
            raise ValueError(f"a streamer sees one prompt at a time, got {len(input_ids)}; call once for each")
        ids = input_ids.cpu()
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu()
        requests = self._requests([row[real.bool()] for row, real in zip(ids, mask)], streamer, kwargs, (ids, mask))
        self._put(*requests)
        try:
            outputs = [request.future.result() for request in requests]
        except BaseException:
            for request in requests:
                request.end()
            raise
        filler, width = requests[0].batch.filler, max(len(output.tokens) for output in outputs)
        new = [output.tokens + [filler] * (width - len(output.tokens)) for output in outputs]
        return torch.cat([input_ids.to(torch.int64), torch.tensor(new, device=input_ids.device).view(len(new), -1)], 1)

    def stream(self, input_ids: Tensor | None = None, **options: Any) -> Stream[list[list[int]]]:
        """As `mtpkern.stream`, of one prompt [1, T] in passes that others share: yields blocks of new tokens.

        for (new,) in engine.stream(**tokenizer("Two and two is", return_tensors="pt"), max_new_tokens=64):
            print(new)
        """
        if options.get("streamer") is not None:
            raise ValueError("Engine.stream is read itself and takes no streamer; pass that to Engine.generate")
        self._require_other_thread()
        return Stream(partial(self.generate, input_ids, **options), self.model.device)

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests, and wait until those there are have ended; cancel: behind the next pass.

        Called by a streamer, a criterion or a future's callback, which the engine itself waits for, it does not wait.
        """
        self._line.close(cancel=cancel)
        if current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.close(cancel=kind is not None)

    def _require_other_thread(self) -> None:
        if current_thread() is self._thread:
            raise RuntimeError(
                "a streamer, a criterion or a future's callback runs in the engine's own thread and would wait there "
                "for itself; use Engine.submit, and read its future in another thread"
            )

    def _requests(
        self, prompts: list[Any], streamer: Any, kwargs: dict[str, Any], padded: tuple[Tensor, Tensor] | None = None
    ) -> list[_Request]:
        """What each prompt is to be, read and checked."""
        ours = sorted(kwargs.keys() & {*Options.NAMES, "reuse", "batch_size", "order", "first", "streamer"})
        if ours:
            raise ValueError(f"{', '.join(ours)} is the engine's for all requests: pass it to mtpkern.Engine")
        if autocast_of(self.model.device) != self._autocast:
            raise ValueError(
                f"the engine was made under autocast to {self._autocast}, and this request comes under "
                f"{autocast_of(self.model.device)}; make the engine where its requests come from"
            )
        batch = Batch(self.model, prompts, **{**self._of_all, "order": "given", **kwargs})
        if padded is not None:
            vocabulary = batch.model.get_input_embeddings().weight.shape[0]
            require_prompts(*padded, mask_token_id=batch.options.mask_token_id, vocabulary=vocabulary)
        for output in batch.failed:
            assert output.error is not None
            raise output.error
        for job in batch.jobs:
            if job.tokens > self.max_length:
                raise ValueError(
                    f"a prompt of {len(job.ids)} tokens and {job.new} new ones are {job.tokens}, and the engine has "
                    f"room for max_length={self.max_length}; lower max_new_tokens, or raise max_length of the engine"
                )
        key = None
        if batch.key is not None:
            key = int(batch.key)
        return [_Request(batch, job, streamer, key) for job in batch.jobs]

    def _put(self, *requests: _Request) -> tuple[_Request, ...]:
        lend_processors(self.model.device)
        self._line.put(requests)
        return requests


class _Request:
    """One prompt on its way. To its `Watch` it is the streamer, which shows tokens to the caller's, if there is one."""

    def __init__(self, batch: Batch, job: Job, streamer: Any, key: int | None) -> None:
        self.batch, self.job, self.streamer, self.key = batch, job, streamer, key
        self.future: Future[BatchOutput] = Future()
        # Whether nobody wants its tokens any more, and whether its streamer wants no more of them.
        self.unwanted = Event()
        self.closed: Event = streamer.closed if isinstance(getattr(streamer, "closed", None), Event) else Event()
        self.error: BaseException | None = None
        self.shown = False
        # What all of a run have in common, and what need only be united.
        self.kind = tuple(batch.stop_ids.tolist()), id(batch.tokenizer)
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
        """Show the prompt [1, T]."""
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


class _Line:
    """Requests in their order, and the thread's work on them, which must not hold on to the engine itself."""

    def __init__(self, slots: int, max_length: int, device: torch.device) -> None:
        self.slots, self.max_length, self.device = slots, max_length, device
        self.surroundings = surroundings(device)
        self.changed = Condition()
        self.waiting: deque[_Request] = deque()
        self.inside: dict[int, _Request] = {}
        self.numbers = count()
        self.open, self.cancelled = True, Event()
        # Whether the thread is that of the process which this one, a fork, comes from.
        self.forked = False
        _lines.add(self)

    def put(self, requests: tuple[_Request, ...]) -> None:
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
        with ExitStack() as stack:
            for context in self.surroundings:
                stack.enter_context(context)
            while (head := self._first()) is not None:
                self._run(head)
        for request in self.waiting:
            # One that was to be tried again runs already; of the others nobody else tells who waits for several.
            if request.future.cancel():
                request.future.set_running_or_notify_cancel()
            else:
                request.future.set_exception(CancelledError(_CLOSED))
        self.waiting.clear()

    def _first(self) -> _Request | None:
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

    def _run(self, head: _Request) -> None:
        """Decode what is like the first in line, and all that comes to stand behind it and is like it."""
        room = {"slots": self.slots, "tokens": self.max_length, "new": self.max_length - 1}
        choosing = self._united(head)
        jobs = _Next(self, head.kind, choosing)
        # Draws are told apart by their jobs' numbers alone (`begin`).
        key = torch.zeros(1, dtype=torch.int64, device=head.batch.model.device) if choosing.samples else None
        of_all = None if choosing == Choosing() else choosing, key
        try:
            head.batch.decode(jobs, self._emit, closed=self.cancelled, watched=True, of_all=of_all, **room)
            error: BaseException = CancelledError(_CLOSED)
        except BaseException as raised:
            error = raised
        # Outside of the handler, whose traceback holds on to what was allocated.
        left = list(self.inside.values())
        self.inside.clear()
        with self.changed:
            if not left and self.waiting and self.waiting[0] is head and not self.cancelled.is_set():
                # It has not come as far as to its slot.
                self.waiting.popleft()
                if head.future.running() or head.future.set_running_or_notify_cancel():
                    left = [head]
        again = bool(left) and self._may_go_on(error, head.batch.model)
        back = [request for request in left if again and not request.shown and not request.unwanted.is_set()]
        for request in left:
            if request not in back:
                request.future.set_exception(error)
        with self.changed:
            self.waiting.extendleft(reversed(back))

    def _united(self, head: _Request) -> Choosing:
        """What does for the first in line, and for those behind it as far as one can do for all."""
        choosing = head.choosing
        with self.changed:
            for request in self.waiting:
                both = choosing.united(request.choosing) if request.kind == head.kind else None
                if both is None:
                    break
                choosing = both
        return choosing

    def _may_go_on(self, error: BaseException, model: PreTrainedModel) -> bool:
        """Whether another try may succeed, with more memory, fewer slots or without kernels."""
        if isinstance(error, torch.OutOfMemoryError):
            if release_graphs():
                return True
            if self.slots == 1:
                return False
            self.slots //= 2
            warnings.warn(
                f"memory does not suffice for as many requests side by side, so this mtpkern.Engine goes on with "
                f"{self.slots}; a smaller batch_size or max_length ends this warning: {first_line(error)}",
                RuntimeWarning,
                stacklevel=2,
            )
            return True
        return isinstance(error, Exception) and without_kernels(error, model.device)

    def _emit(self, output: BatchOutput) -> None:
        self.inside.pop(output.index).finish(output)


class _Next(Iterator[Job]):
    """Those in line that are of one kind, as far as they are there: who has no next may have one later."""

    def __init__(self, line: _Line, kind: Any, choosing: Choosing) -> None:
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
                    return job
        raise StopIteration

    def _may_come(self, request: _Request) -> bool:
        return request.kind == self.kind and self.choosing.united(request.choosing) == self.choosing


_lines: weakref.WeakSet[_Line] = weakref.WeakSet()


def _after_fork() -> None:
    """In a child no engine has its thread, which may have held the lock: whoever asked would wait in vain."""
    for line in list(_lines):
        line.changed, line.forked = Condition(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
