"""Time on a device: calls inside captured graphs, in turns, and the floor that they are measured against.

A call takes microseconds, launching it from Python takes tens, and what fits in the L2 cache is read several times as
fast as memory. So each action is captured in a CUDA graph, many calls behind one another, on inputs that rotate over
more bytes than the cache holds; replays of the alternatives take turns. What cannot be captured is timed call by call
between events, the cache flushed before each. On a CPU the clock is the host's: a dry run.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from typing import TypeVar

import torch
from torch import Tensor

from mtpkern.compare import rotated, synchronize
from mtpkern.graph import capturing, on_side_stream

T = TypeVar("T")
# Called with 0, 1, 2, ..., and takes that call's copy of its inputs: inputs[i % len(inputs)].
Action = Callable[[int], object]

# A replay should last this long, in seconds, so that the events' resolution does not matter.
_REPLAY = 1e-3
_MOST_CALLS = 64


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of some measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """`Spread.of([3, 1, 2])` is Spread(median=2, low=1, high=3)."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 2) -> str:
        """As a table shows it: `Spread(2, 1, 3).text(0)` is "2 (1–3)"."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}–{self.high:.{digits}f})"


def interleaved(
    actions: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, *, warm_up: int = 3
) -> dict[str, Spread]:
    """Milliseconds of each action over `rounds` rounds, in turns and each round in another order.

    interleaved({"matmul": lambda: a @ b}, 20, a.device)["matmul"].median
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for i in range(-warm_up, rounds):
        for name in rotated(list(actions), i):
            synchronize(device)
            start = time.perf_counter()
            actions[name]()
            synchronize(device)
            if i >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: Spread.of(values) for name, values in times.items()}


@dataclass(frozen=True)
class Peak:
    """What a device can do: bytes a second to and from memory, FLOP a second in bf16; and how we know."""

    bandwidth: float
    flops: float
    source: str

    def floor(self, *, bytes: float = 0.0, flops: float = 0.0) -> float:
        """Microseconds below which nothing can move so many bytes and do so much arithmetic.

        Peak(4.3e12, 790e12, "").floor(bytes=4.3e6)  # 1.0
        """
        return max(bytes / self.bandwidth, flops / self.flops) * 1e6


# Measured: device-to-device copy, read and written bytes counted; 8192 x 8192 x 8192 bf16 matrix product, random data.
STATED = {"NVIDIA H200": Peak(4.3e12, 790e12, "stated for the NVIDIA H200: 4.3 TB/s, 790 TFLOP/s")}


@cache
def peak(device: torch.device) -> Peak:
    """The device's peak: told by the pre-flight, or stated where its name is known, or measured."""
    told = os.environ.get("MTPKERN_PEAK")
    if told:
        return Peak(**json.loads(told))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if name in STATED:
        return STATED[name]
    size = 1 << (30 if device.type == "cuda" else 22)
    n = 8192 if device.type == "cuda" else 128
    source, target = torch.ones(2, size // 4, device=device)
    a, b = torch.randn(2, n, n, device=device).bfloat16()
    spent = timed({"copy": lambda i: target.copy_(source), "product": lambda i: a @ b}, device, rounds=5)
    bandwidth, flops = 2 * size / spent["copy"].low * 1e6, 2 * n**3 / spent["product"].low * 1e6
    text = f"measured on {name}: {bandwidth / 1e12:.2g} TB/s copy, {flops / 1e12:.3g} TFLOP/s bf16 product"
    return Peak(bandwidth, flops, text)


def share_of_peak(device: torch.device, us: float, *, bytes: float = 0.0, flops: float = 0.0) -> float | None:
    """The floor of such work over the microseconds that it took; None on a CPU, which only rehearses.

    share_of_peak(torch.device("cuda"), 4000.0, bytes=8e9)  # 0.47 on an H200
    """
    return None if device.type == "cpu" else peak(device).floor(bytes=bytes, flops=flops) / us


def copies(bytes: int, device: torch.device) -> int:
    """How many copies of an input of so many bytes exceed the cache several times; 1 on a CPU, which only rehearses."""
    if device.type != "cuda":
        return 1
    return max(1, min(_MOST_CALLS, -(-4 * _cache_size(device) // max(bytes, 1))))


def drawn(n: int, *shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """n different tensors of a shape, normally distributed: zeros would run faster than real data does.

    drawn(2, 3, 4, device=device)  # two of shape [3, 4]
    """
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, device=device, dtype=dtype, generator=generator) for _ in range(n)]


def _cache_size(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def timed(
    actions: Mapping[str, Action],
    device: torch.device,
    *,
    rounds: int = 20,
    calls: int = 1,
    graph: bool = True,
    reset: Callable[[], object] | None = None,
) -> dict[str, Spread]:
    """Microseconds of a call of each action, over `rounds` rounds in turns.

    `calls` is the number of copies that the inputs rotate over; a graph holds at least as many calls, and more where
    they are short. graph=False times single calls, with whatever their launches cost the device in gaps. `reset` runs
    before each replay, untimed: for actions that change what they work on.

        a, b = ([torch.randn(n, n, device=device) for n in [1024] * copies(4 << 20, device)] for _ in range(2))
        timed({"product": lambda i: a[i % len(a)] @ b[i % len(b)]}, device, calls=len(a))["product"].median
    """
    runs = {name: _prepared(action, calls, device, graph) for name, action in actions.items()}
    return _in_turns(runs, device, rounds, reset, flush=not graph)


def race(
    ours: Mapping[str, Action],
    theirs: Mapping[str, Action],
    device: torch.device,
    *,
    rounds: int = 20,
    calls: int = 1,
    graph: bool = True,
    tolerance: float | None = 2e-2,
) -> tuple[dict[str, Spread], list[str]]:
    """`timed` for ours and for those comparators that run and agree, and a line "name: why" for each other one.

    The first of ours says what is right, and every other output's largest difference from it must stay within
    `tolerance` times its largest magnitude (None: outputs that cannot be compared). Where one of ours does not run or
    differs, that is an error; a comparator is left out.

        times, skipped = race({"ours": lambda i: a @ b}, {"einsum": lambda i: torch.einsum("ij,jk", a, b)}, a.device)
    """
    right: list[Tensor] = []

    def prepared(action: Action) -> _Run:
        output = _outputs(action(0))
        if not right:
            right.extend(output)
        wrong = "" if tolerance is None else difference(output, right, tolerance)
        if wrong:
            raise LeftOut(wrong)
        del output
        return _prepared(action, calls, device, graph)

    runs, skipped = attempted({name: partial(prepared, action) for name, action in {**ours, **theirs}.items()}, ours)
    return _in_turns(runs, device, rounds, None, flush=not graph), skipped


class LeftOut(Exception):
    """Why something is not measured, in words."""


def attempted(makes: Mapping[str, Callable[[], T]], ours: Collection[str]) -> tuple[dict[str, T], list[str]]:
    """What each of them returns, and a line "name: why" for each that fails; RuntimeError where that is one of ours.

    attempted({"ours": lambda: 1, "theirs": lambda: 1 / 0}, ["ours"])[0]  # {"ours": 1}
    """
    found: dict[str, T] = {}
    skipped = []
    for name, make in makes.items():
        try:
            found[name] = make()
        except Exception as error:  # whatever a foreign library raises, it must not take our figures along
            if name in ours:
                raise RuntimeError(f"{name}: {reason(error)}") from error
            skipped.append(f"{name}: {reason(error)}")
    return found, skipped


# What is timed, and how many calls it holds.
_Run = tuple[Callable[[], object], int]


def _prepared(action: Action, calls: int, device: torch.device, graph: bool) -> _Run:
    if device.type == "cuda" and graph:
        return _captured(action, calls, device)
    for i in range(3 if device.type == "cuda" else 0):
        action(i)
    counter = count()
    return (lambda: action(next(counter))), 1


def _in_turns(
    runs: Mapping[str, _Run], device: torch.device, rounds: int, reset: Callable[[], object] | None, *, flush: bool
) -> dict[str, Spread]:
    cuda = device.type == "cuda"
    cache = torch.empty(2 * _cache_size(device), dtype=torch.uint8, device=device) if cuda and flush else None
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(-1, rounds if cuda else 1):
        for name in rotated(list(runs), i):
            run, n = runs[name]
            if cache is not None:
                cache.zero_()
            if reset is not None:
                reset()
            seconds = _seconds(run, device, behind=not flush)
            if i >= 0:
                spent[name].append(seconds / n * 1e6)
    return {name: Spread.of(values) for name, values in spent.items()}


def _captured(action: Action, calls: int, device: torch.device) -> _Run:
    """The action's calls as a graph's replay, and how many calls it holds."""
    single = _warm(action, device)
    calls = max(calls, min(_MOST_CALLS, int(_REPLAY / max(single, 1e-6)) + 1))
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, device):
        for i in range(calls):
            action(i)
    return graph.replay, calls


def _warm(action: Action, device: torch.device) -> float:
    """Call it on the stream of the capture, as that asks for: compilation, handles and workspaces belong before it."""
    with on_side_stream(device):
        for i in range(3):
            action(i)
        return min(_seconds(lambda: action(0), device) for _ in range(2))


def _seconds(run: Callable[[], object], device: torch.device, *, behind: bool = False) -> float:
    """Seconds that the device spends on one run; the host's where the device is a CPU.

    With `behind` the run is queued behind half a millisecond of nothing, so that the time in which the host launches it
    is not the device's: a graph's launch takes longer than a small kernel does.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if behind:
        torch.cuda._sleep(1_000_000)  # cycles
    start_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) * 1e-3


def launches(action: Action, device: torch.device) -> int | None:
    """Nodes of the graph that one call makes: kernels, copies and fills. None where that cannot be counted.

    launches(lambda i: a + b, a.device)  # 1
    """
    if device.type != "cuda" or torch.version.hip:
        return None
    _warm(action, device)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with capturing(graph, device):
        action(0)
    nodes = ctypes.c_size_t()
    try:
        get_nodes = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes
        failed = get_nodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(nodes))
    except (OSError, AttributeError, RuntimeError):
        return None
    return None if failed else nodes.value


def kernels_by_name(action: Action, device: torch.device) -> list[tuple[str, int, float]]:
    """What one call runs on the device, its graph replayed: names, how often, microseconds in all; the longest first.

    On a CPU torch's operations instead.
    """
    cuda = device.type == "cuda"
    replay = _captured(action, 1, device)[0] if cuda else partial(action, 0)
    kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind], acc_events=True) as profile:
        replay()
        synchronize(device)
    took = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = [(x.key[:100], x.count, round(getattr(x, took), 1)) for x in profile.key_averages()]
    return sorted(events, key=lambda event: -event[2])


def peak_of(action: Action, device: torch.device) -> float:
    """Bytes allocated at the height of a call, with what was there before; NaN on a CPU."""
    if device.type != "cuda":
        return float("nan")
    free(device)
    torch.cuda.reset_peak_memory_stats(device)
    action(0)
    torch.cuda.synchronize(device)
    return float(torch.cuda.max_memory_allocated(device))


def reason(error: BaseException) -> str:
    """An exception in one line: `reason(ValueError("no"))` is "ValueError: no"."""
    lines = str(error).strip().splitlines()
    if isinstance(error, LeftOut):
        return str(error)
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _outputs(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach().clone()]
    return [out for part in value for out in _outputs(part)] if isinstance(value, (tuple, list)) else []


def difference(found: list[Tensor], right: list[Tensor], tolerance: float, names: Sequence[str] = ()) -> str:
    """What is wrong with outputs, where one is off by more than `tolerance` of its greatest magnitude; else nothing."""
    if len(found) != len(right):
        return f"{len(found)} outputs instead of {len(right)}"
    for a, b, name in zip(found, right, names or ["its output"] * len(right), strict=True):
        if a.shape != b.shape:
            return f"output of shape {tuple(a.shape)} instead of {tuple(b.shape)}"
        scale, off = b.double().abs().max().item(), (a.double() - b.double()).abs().max().item()
        if not off <= tolerance * scale:
            return f"{name} is off by {off:.3g} where the largest value is {scale:.3g}"
    return ""


def free(device: torch.device) -> None:
    """Give the memory of dropped tensors and graphs back before the next shape."""
    synchronize(device)
    gc.collect()  # what torch.compile leaves behind holds on to itself
    if device.type == "cuda":
        torch.cuda.empty_cache()
