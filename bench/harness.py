"""What every benchmark needs: timing in turns, a median with its spread, and where it was measured."""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mtpkern.compare import rotated, synchronize
from mtpkern.origin import origin

# What others bring that a benchmark measures beside ours, where it is installed; FlexAttention comes with torch,
# assisted generation with transformers.
COMPARATORS = ("flash-attn", "liger-kernel")


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


def environment(device: torch.device) -> dict[str, str]:
    """Hardware, versions, commit and command, for the record; the commit is marked where the tree differs from it."""
    command = shlex.join(["python", "-m", f"mtpkern.bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    return {
        **origin(device, command),
        **(_gpu(device) if device.type == "cuda" else {"hardware": _cpu()}),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "load_before": " ".join(f"{x:.1f}" for x in os.getloadavg()),
        **{name: _version(name) for name in ("triton", *COMPARATORS)},
        # All of them draw from it.
        "seed": "0",
    }


def _said(*command: str) -> str:
    """What a command prints; nothing where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _gpu(device: torch.device) -> dict[str, str]:
    """Driver, toolkit and the limits that speed depends on."""
    facts = torch.cuda.get_device_properties(device)
    query = "--query-gpu=driver_version,clocks.max.sm,power.limit"
    told = _said("nvidia-smi", query, "--format=csv,noheader", f"--id={device.index or 0}")
    return {
        "driver, greatest SM clock, power limit": told or "unknown",
        "cuda": str(torch.version.cuda or torch.version.hip),
        "memory": f"{facts.total_memory / 2**30:.0f} GiB",
        "processors": str(facts.multi_processor_count),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
