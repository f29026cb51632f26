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
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from mtpkern.compare import rotated, synchronize


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
    root = Path(__file__).parents[1]
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    module = Path(sys.argv[0]).stem
    return {
        "hardware": hardware,
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "load_before": " ".join(f"{x:.1f}" for x in os.getloadavg()),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "mtpkern")},
        "commit": commit + (" with changes" if changed else ""),
        "command": shlex.join(["python", "-m", f"mtpkern.bench.{module}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def as_json(value: object) -> object:
    """`json.dumps`'s default for the dataclasses here."""
    if isinstance(value, Spread):
        return asdict(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
