"""stream(): what `generate` writes, block by block, while it is being written.

The run has a thread of its own, so that decoding does not wait for the reader, nor routing show in the reader's
thread. A reader that leaves (`break`, an exception, `close`) ends the run in order, behind the pass that is read next:
a decoder that is kept for later calls stays whole.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from contextvars import copy_context
from functools import cache, partial
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mtpkern.generation import MTPGenerateOutput, generate
from mtpkern.kernels.form import autocast_of
from mtpkern.openmp import lend_processors

Block = TypeVar("Block")


def stream(model: PreTrainedModel, input_ids: Tensor | None = None, **options: Any) -> Stream[list[list[int]]]:
    """`mtpkern.generate` with the same arguments, read while it runs: yields blocks of newly certain tokens.

    A block is a list of B lists of token ids, one for each sequence, empty where a sequence has no news; so a single
    prompt's is `[ids]`. Joined they are the new tokens of `generate`'s result, without padding, its stop token
    included. Sequences advance at their own pace; only what will stand is shown: no drafts, nothing behind a stop
    string, and with stopping_criteria nothing that they have not been asked about.

    Raises what `generate` raises: at once where the call asks for what is not honoured, else from the iterator.

        tokens = []
        for (new,) in mtpkern.stream(model, **tokenizer("Two and two is", return_tensors="pt"), max_new_tokens=64):
            tokens += new
            show(tokenizer.decode(tokens))  # all together: by themselves blocks may lose their spaces
    """
    if options.get("streamer") is not None:
        raise ValueError("mtpkern.stream is read itself and takes no streamer; pass that to mtpkern.generate")
    return Stream(partial(generate, model, **own(input_ids=input_ids, **options)), getattr(model, "device", None))


def own(**arguments: Any) -> dict[str, Any]:
    """Arguments for another thread, their tensors copied, because the caller may write to these again at once."""
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in arguments.items()}


class Stream(Iterator[Block]):
    """A run of `generate` in a thread of its own, as an iterator over its blocks; see `stream`.

    output: what `generate` returns, once the iterator has come to its end or is closed; None before. Of a run that
    was closed it holds what was certain by then.

        with mtpkern.stream(model, **inputs, return_dict_in_generate=True) as blocks:
            first = next(blocks)
        print(blocks.output.finish_reasons)    # ["closed"]
    """

    def __init__(self, call: Callable[..., Any], device: torch.device | None) -> None:
        self.output: Tensor | MTPGenerateOutput | None = None
        self._sink = _Sink()
        self._over = False
        # The thread must not hold on to this iterator, whose end is the end of the run.
        work = partial(copy_context().run, _work, self._sink, partial(call, streamer=self._sink), surroundings(device))
        self._thread = Thread(target=work, name="mtpkern.stream", daemon=True)
        weakref.finalize(self, self._sink.closed.set)
        end_at_exit(self._thread, self._sink.closed.set)
        if device is not None:
            lend_processors(device)
        self._thread.start()
        self._next()  # the prompts are taken, or the call is refused

    def __next__(self) -> Block:
        block = None if self._over else self._next()
        if block is None:
            raise StopIteration
        return block

    def _next(self) -> Block | None:
        """What the run has put next; None at its end, whose result is the `output`."""
        try:
            item = self._sink.items.get()
        except BaseException:  # Ctrl-C while waiting
            self._sink.closed.set()
            raise
        if not isinstance(item, tuple | BaseException):
            return item  # type: ignore[no-any-return]
        self._over = True
        self._thread.join()
        if isinstance(item, BaseException):
            try:
                raise item
            finally:
                del item  # whose traceback has this frame: both would wait for the garbage collector
        (self.output,) = item
        return None

    def close(self) -> None:
        """End the run, and wait for it to be over: the model is free then. Blocks that were not read are lost."""
        self._sink.closed.set()
        while not self._over:
            self._next()

    def __enter__(self) -> Stream[Block]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Sink:
    """The streamer of the run; what it puts is read by the other thread."""

    def __init__(self) -> None:
        self.items: SimpleQueue[Any] = SimpleQueue()
        self.closed = Event()

    def put(self, value: Tensor) -> None:
        self.items.put([])

    def put_block(self, new: Any) -> None:
        self.items.put(new)

    def end(self) -> None: ...


def _work(sink: _Sink, call: Callable[[], Any], surroundings: list[Any]) -> None:
    try:
        with ExitStack() as stack:
            for context in surroundings:
                stack.enter_context(context)
            result = call()
        sink.items.put((result,))
    except BaseException as error:
        sink.items.put(error)


def surroundings(device: torch.device | None) -> list[Any]:
    """What torch keeps for each thread and a run depends on: autocast, and on a GPU the stream; to be entered there.

    surroundings(torch.device("cpu"))    # [] where nobody has opened an autocast
    """
    if device is None:
        return []
    kind = device.type
    entered: list[Any] = []
    if (dtype := autocast_of(device)) is not None:
        entered.append(torch.autocast(kind, dtype, cache_enabled=False))
    if kind == "cuda":
        entered.append(torch.cuda.stream(torch.cuda.current_stream(device)))
    return entered


# Runs that may not be over, and what ends them.
_running: weakref.WeakKeyDictionary[Thread, Callable[[], object]] = weakref.WeakKeyDictionary()


def end_at_exit(thread: Thread, end: Callable[[], object]) -> None:
    """Have a thread that is about to start ended with the interpreter, which may crash with one at work on a device.

    end_at_exit(thread, closed.set)
    """
    _register()
    _running[thread] = end


@cache
def _register() -> None:
    atexit.register(_end_running)


def _end_running() -> None:
    for thread, end in list(_running.items()):
        end()
        thread.join()
