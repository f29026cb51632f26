"""The step as a CUDA graph: captured once, replayed until its model changes.

A graph holds addresses and plain numbers, not Python. So all that a step reads and writes belongs to its `Decoder`,
which is kept together with its graph and given to the next call of the same shape (mtpkern.pool); what differs from
call to call (prompts, lengths, threshold, stop tokens) is written into the same tensors. What the graph has baked in of
the model is compared before each call's passes (mtpkern.baked).
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import RLock
from time import perf_counter
from typing import Any

import torch

from mtpkern.kernels.form import go_without_kernels, has_kernels
from mtpkern.output import first_line

# Steps that run as they are before the capture: the first compiles our kernels, the second what torch.compile makes of
# the layers, the third is like all that follow.
WARM_UP = 3


def wants_graph(use_graph: bool | None, device: torch.device) -> bool:
    """Whether the step is captured: what was asked for, or None for wherever it can be. Raises ValueError on a CPU."""
    if use_graph and device.type != "cuda":
        raise ValueError(f"use_graph=True needs a model on a CUDA or ROCm device, got one on {device}; leave it out")
    return device.type == "cuda" if use_graph is None else use_graph


class StepGraph:
    """Runs a step as it is until it is warm, then captures it, then replays it; a step of each form apart.

    step reads and writes tensors that never move, and what it returns is not looked at. A form that cannot be captured
    goes on as it is, and where it is the first one or memory was short, so do all that have no graph yet; a
    RuntimeWarning announces it.

        graph = StepGraph(device)
        graph(step, 16)     # one real step of 16 rows each time, whichever way it runs
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.warm: Counter[Hashable] = Counter()
        # By form, the host's seconds in steps before their graph was there, and in capturing it.
        self.seconds: defaultdict[Hashable, float] = defaultdict(float)
        # Forms that could not be captured, and whether no other is tried.
        self.refused: set[Hashable] = set()
        self.closed = False
        self.captured: dict[Hashable, CapturedStep] = {}
        # A captured step of the same model, to share its memory pool.
        self.beside: CapturedStep | None = None
        # When the last run ended, on whatever stream it ran.
        self.idle = torch.Event(device)

    def __call__(self, step: Callable[[], object], form: Hashable) -> None:
        """Run one step of this form, its number of rows say: what is captured of one form stands for all of it."""
        if form in self.captured:
            return self.captured[form].replay()
        began = perf_counter()
        self._make(step, form)
        self.seconds[form] += perf_counter() - began

    def may_have(self, form: Hashable) -> bool:
        """Whether this form has a graph, or may come to have one."""
        return form in self.captured or not (self.closed or form in self.refused)

    def _make(self, step: Callable[[], object], form: Hashable) -> None:
        if self.warm[form] == WARM_UP and self.may_have(form):
            try:
                self.captured[form] = CapturedStep(step, self.device, next(iter(self.captured.values()), self.beside))
            except RuntimeError as error:  # out of memory is one, too
                self.refused.add(form)
                self.closed |= not self.captured or isinstance(error, torch.OutOfMemoryError)
                _announce(error, form)
            self.beside = None
        if form in self.captured:
            self.captured[form].replay()
        elif not self.may_have(form):
            step()
        else:
            with on_side_stream(self.device):
                step()
            self.warm[form] += 1


class CapturedStep:
    """A CUDA graph of one call of `step`; capturing runs nothing. Raises RuntimeError where it cannot be captured."""

    def __init__(self, step: Callable[[], object], device: torch.device, beside: CapturedStep | None) -> None:
        self.graph = torch.cuda.CUDAGraph()
        # Nothing that a step computes in between outlives it, and a model runs one step at a time: a pool can be
        # shared. Only with a graph that lives, because torch forgets a pool whose last graph has gone.
        with capturing(self.graph, device, pool=None if beside is None else beside.graph.pool()):
            step()

    def replay(self) -> None:
        """Run the step."""
        self.graph.replay()


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any = None) -> Iterator[None]:
    """Capture what the block queues, on the side stream; `torch.cuda.graph` that clears up where a capture fails.

    with capturing(graph, x.device):
        y = x + 1
    graph.replay()
    """
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    with on_side_stream(device) as stream:
        # cuBLAS has one workspace a stream, which this graph would share with all others and with the warm-up, and lose
        # when one of them goes (pytorch#193402) or torch.compile makes graphs of its own. So it gets one in its pool,
        # and leaves none to the next.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # Other threads may go on using the device meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                yield
        except BaseException:
            _clear_up(graph, stream, pool)
            raise
        finally:
            torch._C._cuda_clearCublasWorkspaces()


# Captures that were broken off stay registered with torch's allocator of pinned memory, which asks their graphs later.
_broken: list[torch.cuda.CUDAGraph] = []


def _clear_up(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any) -> None:
    """Do what torch leaves undone where a capture is broken off, by a wait for the device say.

    It would take the capture to go on: its allocator would give back no memory to the device where it is short of it,
    none at all that several streams have used, and start no other capture in the same pool; and, in older versions,
    nothing could draw random numbers or replay another graph before the next capture that ends well.
    """
    try:
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)
    except RuntimeError:
        return  # it has ended in order: an error of Python's leaves it whole
    torch._C._cuda_releasePool(stream.device_index, pool)
    _broken.append(graph)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
        torch.zeros((), dtype=torch.int64, device=stream.device)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # One for warm-up and capture of all graphs, so that libraries prepare once what they keep for a stream.
    return torch.cuda.Stream(device)


# Who is on a side stream: what another thread queued there while one captures would become a part of its graph.
_aside = RLock()


@contextmanager
def on_side_stream(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """Run the block on a stream of its own, behind what was queued before and before what is queued after.

    One thread at a time; others wait in line.
    """
    with _aside:
        here, side = torch.cuda.current_stream(device), _side_stream(device)
        side.wait_stream(here)
        try:
            # Leaving a capture that has failed does not bring the stream back; this does.
            with torch.cuda.stream(side):
                yield side
        finally:
            # After an error, too: what is dropped then is given to others while the side stream may still write to it.
            here.wait_stream(side)


def _announce(error: Exception, form: Hashable) -> None:
    what = f"of {form} rows" if isinstance(form, int) else str(form)
    remedy = "pass use_graph=False, or look for what waits for the device in the model's forward"
    if isinstance(error, torch.OutOfMemoryError):
        remedy = (
            "decode fewer sequences, or free memory and call mtpkern.release_graphs(), which drops what earlier calls "
            "have kept and lets the next one try again"
        )
    warnings.warn(
        f"the decoding step ({what}) could not be captured in a CUDA graph and runs without one, which is slower; "
        f"{remedy}: {first_line(error)}",
        RuntimeWarning,
        stacklevel=2,
    )


def without_kernels(error: Exception, device: torch.device) -> bool:
    """Whether `error` is Triton's, about a kernel that this device cannot have: it then goes on without, announced."""
    if not type(error).__module__.startswith("triton.") or not has_kernels(device):
        return False
    go_without_kernels(device)
    warnings.warn(
        f"a Triton kernel of mtpkern could not be compiled for {device}, or does not fit on it; decoding there takes "
        "plain torch operations instead, which are slower. Try another version of triton, or report the device and "
        f"the message: {first_line(error)}",
        RuntimeWarning,
        stacklevel=2,
    )
    return True
