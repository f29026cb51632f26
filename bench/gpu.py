"""Everything that needs a GPU, in one command and within nine minutes: the tests, then every benchmark.

    make gpu                                    picks a python that has torch with CUDA; needs no network
    python bench/gpu.py --results FOLDER        the same by hand, also from a clone that is not installed

First the pre-flight (bench/preflight.py), which stops all that is timed where a kernel is wrong, then the tests marked
`gpu`, then the most telling benchmarks on a short grid; then, while time is left, every benchmark on its whole grid and
the tests that are slow. Each runs in a process of its own with a limit, so that a hang or an illegal memory access
takes nothing else along. What is there so far is always on paper, in bench/results/ and in the folder of --results:
gpu.md and gpu.json, gpu-preflight.jsonl (a line a step), gpu-tests.txt (what pytest said), gpu-failures.txt (each
failure at once) and gpu-log.txt (all others). The exit status is 1 where a test failed or a benchmark did, or its short
grid was cut; goals that are not met change nothing.

Only the standard library is imported here until the package can be found.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

# Seconds that each may take, in the order in which they run; a first call ends within nine minutes.
PREFLIGHT_LIMIT, TESTS_LIMIT = 110.0, 125.0
# Whole runs by estimate: 60 for the forms that layers are compiled to, 30 for the runs, 15 until they begin.
SHORT_LIMITS = {"throughput": 110.0, "compiled": 25.0, "decode_attention": 25.0, "span_attention": 20.0}
SHORT_LIMITS |= {"train_step": 30.0, "distill": 15.0, "readout": 15.0}
# Last, as most of it is what another library takes to compile.
SHORT_LIMITS |= {"token_by_token": 45.0}
# While time is left. First FlexAttention.
WHOLE_LIMITS = {"span_attention": 150.0, "compiled": 300.0, "decode_attention": 90.0, "train_step": 150.0}
WHOLE_LIMITS |= {"distill": 60.0, "readout": 40.0, "gated_lora": 60.0, "linear": 75.0}
WHOLE_LIMITS |= {"throughput": 150.0, "token_by_token": 120.0, "assisted": 60.0, "call": 40.0, "newcomers": 60.0}
SLOW_LIMIT = 120.0
PREFLIGHT, TESTS, SLOW, SHORT, WHOLE = "pre-flight", "tests", "slow tests", "short grid", "whole grid"
# Of a single test, where pytest-timeout is installed: one that hangs must not take those behind it along.
TEST_LIMIT = 100
# What a process gets to end by itself once it is told to; pytest-xdist waits ten seconds for its workers.
GRACE = 20.0
# Characters of what one process says that are kept: results have to fit through narrow doors.
MOST_LOG = 1 << 20
# The exit status of the pre-flight where a kernel is wrong.
WRONG = 3
# Processes that test: more would only wait for one another's slices of the one GPU.
WORKERS = 8


@dataclass
class Outcome:
    """How a process ended: done, failed (with its exit status) or cut (at its limit); and the end of what it said."""

    what: str
    status: str
    seconds: float
    said: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        """In one line: `compiled, short grid: done, 31 s`."""
        telling = self.status.startswith("failed") or self.what in (TESTS, SLOW)
        last = f": {self.said[-1]}" if self.said and telling else ""
        return f"{self.what}: {self.status}, {self.seconds:.0f} s{last}"

    @property
    def well(self) -> bool:
        """Whether nothing is missing: a whole grid may be cut, its short one may not."""
        return self.status.startswith(("done", "skipped")) or (self.status == "cut" and self.what.endswith(WHOLE))


def link(folder: Path, root: Path = ROOT) -> Path:
    """Lay a clone out as the package that an installation makes of it, by links; returns what PYTHONPATH needs."""
    package = folder / "mtpkern"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for source in (*(root / "mtpkern").iterdir(), *(root / room for room in ("kernels", "train", "bench"))):
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    return folder


def supervise(what: str, command: Sequence[str], limit: float, *, cwd: Path, log: Path, **environment: str) -> Outcome:
    """Run a command in a process group of its own; interrupt it at the limit (seconds), kill it where it stays.

    supervise("sleep", ["sleep", "9"], 1.0, cwd=Path("."), log=Path("log")).status  # "cut"
    """
    start = monotonic()
    with log.open("w") as out:
        where: dict[str, Any] = {"cwd": cwd, "env": {**os.environ, **environment}, "start_new_session": True}
        process = subprocess.Popen(command, stdout=out, stderr=out, **where)
        try:
            code = process.wait(max(limit, 0.0))
            status = "done" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            status = "cut"
            process.send_signal(signal.SIGINT)  # pytest sums up what it has; a benchmark just ends
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # workers that were left behind, too
            process.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Outcome(what, status, monotonic() - start, lines[-40:])


def test_files() -> list[str]:
    """The files with tests for a GPU; others may need packages that its machine has not."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    mark = re.compile(r"\bmark\.(gpu|kernel)\b|\"interpreter\"|, interpreter\b")
    return [str(file) for file in files if mark.search(file.read_text(encoding="utf-8"))]


def run_tests(what: str, limit: float, *, cwd: Path, log: Path, failures: Path, **environment: str) -> Outcome:
    """The tests marked `gpu`: TESTS, side by side where pytest-xdist is installed, or SLOW, those that take a minute.

    "skipped" where pytest is not installed. Each failure is in `failures` as soon as it is known (tests/conftest.py).
    """
    if find_spec("pytest") is None:
        return Outcome(what, "skipped: pytest is not installed", 0.0)
    command = [sys.executable, "-m", "pytest", *test_files(), "-c", str(ROOT / "pyproject.toml")]
    command += ["-m", "gpu and not slow" if what == TESTS else "gpu and slow"]
    command += ["-q", "-rfE", "--tb=short", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    if find_spec("pytest_timeout") is not None:
        # By a thread, which ends the process: a signal waits until a call to the driver returns.
        command += [f"--timeout={TEST_LIMIT if what == TESTS else limit}", "--timeout-method=thread"]
    if what == TESTS and find_spec("xdist") is not None:
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "MTPKERN_FAILURES": str(failures)}
    outcome = supervise(what, command, limit, cwd=cwd, log=log, **environment)
    outcome.said = [s for s in outcome.said if re.match(r"(FAILED|ERROR) |=*.*\b\d+ (passed|failed|skipped|error)", s)]
    if outcome.status == "failed with 5":
        outcome.status = f"skipped: none of the {what} is marked gpu"
    return outcome


def known_peak(told: Path) -> dict[str, str]:
    """What the pre-flight has measured of the device, as the environment that tells the others (bench/timing.py)."""
    for line in told.read_text(encoding="utf-8").splitlines() if told.exists() else ():
        with contextlib.suppress(ValueError):  # the last may be cut
            step = json.loads(line)
            if "peak" in step:
                return {"MTPKERN_PEAK": json.dumps(step["peak"])}
    return {}


class Results:
    """Tables of all parts so far; a whole grid that was cut may say less than the short one, so both stay."""

    def __init__(self, folders: Sequence[Path], title: str) -> None:
        self.folders = folders
        self.title = title
        self.tables: dict[tuple[str, str], dict[str, Any]] = {}
        self.facts: dict[str, str] = {}
        self.outcomes: list[Outcome] = []

    def take(self, part: str, folder: Path, grid: str) -> None:
        """Take in what a part has written, all of it or until it was cut."""
        page = folder / f"{part}.json"
        if page.exists():
            record = json.loads(page.read_text(encoding="utf-8"))
            self.facts = self.facts or {k: v for k, v in record["environment"].items() if k not in ("command", "quick")}
            for table in record["tables"]:
                caption = f"{table['caption']}, {grid}" if grid == WHOLE else table["caption"]
                self.tables[part, caption] = table | {"caption": caption}

    def write(self) -> str:
        """Write gpu.md and gpu.json to every folder; returns the page."""
        from mtpkern.bench.report import GOALS_HEADER, Goal, Table, write

        tables = [Table(**{**t, "goals": [Goal(**g) for g in t["goals"]]}) for t in self.tables.values()]
        # What the whole grid says of a goal goes over what the short one said.
        goals = list({goal.what: goal for table in tables for goal in table.goals}.values())
        runs = [(o.what, o.status, f"{o.seconds:.0f}") for o in self.outcomes]
        met = f"{sum(g.met for g in goals)} of {len(goals)} met, on the shapes that were measured."
        tables.append(Table("What ran", self._said(), ("what", "how it ended", "s"), runs))
        tables.append(Table("Goals", met, GOALS_HEADER, [goal.row() for goal in goals]))
        data = {"runs": [asdict(o) for o in self.outcomes], "tables": [asdict(t) for t in tables]}
        pages = [write("gpu", self.title, self.facts, tables, data, folder) for folder in self.folders]
        return pages[0].read_text(encoding="utf-8")

    def _said(self) -> str:
        spoke = [o for o in self.outcomes if o.said and (not o.well or o.what in (TESTS, SLOW))]
        lines = [f"- {o.what}: `{line}`" for o in spoke for line in o.said[-12:]]
        return "\n".join(["Last words:", "", *lines]) if lines else "Nothing failed."


def main(argv: Sequence[str] | None = None) -> int:
    """Run it all; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python bench/gpu.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda", help="cpu rehearses, without the tests")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it")
    every = list(WHOLE_LIMITS)
    parser.add_argument("--parts", nargs="+", choices=every, default=every, help="benchmarks to run")
    parser.add_argument("--no-tests", action="store_true", help="no pre-flight either")
    parser.add_argument("--results", type=Path, help="a further folder for all that is written")
    args = parser.parse_args(argv)
    end = monotonic() + args.minutes * 60
    dry_run = args.device == "cpu"

    work = Path(tempfile.mkdtemp(prefix="mtpkern-gpu-"))
    links = link(work)
    if "mtpkern" not in sys.modules:  # started as a file: this folder or the clone's root would be looked at first
        sys.path[:] = [str(links), *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "bench"))]
    import torch

    print(f"python {sys.executable}, torch {torch.__version__}, CUDA {torch.version.cuda}, clone {ROOT}", flush=True)
    there = (f"{d.name} {d.version}" for d in distributions() if d.name in ("triton", "transformers"))
    print(", ".join(there), flush=True)
    if not dry_run and not torch.cuda.is_available():
        print("this python's torch sees no GPU: nothing was run (--device cpu rehearses the benchmarks)")
        return 1

    folders = ([] if dry_run else [RESULTS]) + ([args.results] if args.results else [])
    folders = folders or [work]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    title = "DRY RUN on a CPU: its figures say nothing" if dry_run else "Tests and benchmarks on a GPU"
    results = Results(folders, title)
    quiet = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {"PYTHONPATH": str(links), **quiet}

    told = work / "gpu-preflight.jsonl"
    tests, failures, logs, log = (work / f"gpu-{name}.txt" for name in ("tests", "failures", "log", "part"))

    def left() -> float:
        return end - monotonic() - GRACE

    def finish(outcome: Outcome) -> None:
        results.outcomes.append(outcome)
        results.write()
        if log.exists():
            to = tests if outcome.what in (TESTS, SLOW) else logs
            with to.open("a") as out:
                out.write(f"\n==== {outcome.line}\n{log.read_text(errors='replace')[-MOST_LOG:]}")
            log.unlink()
        for folder in folders:
            for file in (told, tests, failures, logs):
                if file.exists() and folder != work:
                    shutil.copy(file, folder)
        print(outcome.line, flush=True)

    def module(name: str, what: str, limit: float, *options: str) -> Outcome:
        command = [sys.executable, "-m", f"mtpkern.bench.{name}", "--device", args.device, *options]
        # The limits are a GPU's.
        limit = left() if dry_run else min(limit, left())
        return supervise(what, command, limit, cwd=links, log=log, **environment)

    def test(what: str, limit: float) -> None:
        limit = min(limit, left())
        if not (args.no_tests or dry_run) and limit > 10:
            finish(run_tests(what, limit, cwd=links, log=log, failures=failures, **environment))

    def benchmark(name: str, grid: str, limit: float) -> None:
        what = f"{name}, {grid}"
        if left() < 10:
            finish(Outcome(what, "skipped: no time left", 0.0))
            return
        folder = work / what
        outcome = module(name, what, limit, "--results", str(folder), *(["--quick"] if grid == SHORT else []))
        results.take(name, folder, grid)
        finish(outcome)

    for folder in folders:
        for file in (told, tests, failures, logs):
            (folder / file.name).unlink(missing_ok=True)  # of an earlier run
    right = True
    if not args.no_tests:
        outcome = module("preflight", PREFLIGHT, PREFLIGHT_LIMIT, "--results", str(told))
        finish(outcome)
        environment.update(known_peak(told))
        # What else goes wrong there stops nothing.
        right = outcome.status != f"failed with {WRONG}"
    test(TESTS, TESTS_LIMIT)
    if right:
        for name, limit in SHORT_LIMITS.items():
            if name in args.parts:
                benchmark(name, SHORT, limit)
        for name, limit in WHOLE_LIMITS.items():
            # A rehearsal's shapes are tiny in either grid.
            if name in args.parts and not (dry_run and name in SHORT_LIMITS):
                benchmark(name, WHOLE, limit)
        test(SLOW, SLOW_LIMIT)

    print(results.write())
    print("written: " + ", ".join(str(folder / "gpu.md") for folder in folders))
    if work not in folders:
        shutil.rmtree(work)
    return int(not all(outcome.well for outcome in results.outcomes))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # as mtpkern.output.exit_status, which may not be found yet
        sys.stderr.write("interrupted\n")
        sys.exit(130)
