"""Results on paper, and where they come from: a Markdown and a JSON file of the same name in bench/results/."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch

from mtpkern.bench.timing import Spread
from mtpkern.loading import device_of
from mtpkern.origin import origin
from mtpkern.output import exit_status, write_whole

RESULTS = Path(__file__).parent / "results"
# What others bring that a benchmark measures beside ours, where it is installed; FlexAttention comes with torch,
# assisted generation with transformers.
COMPARATORS = ("flash-attn", "liger-kernel")


@dataclass(frozen=True)
class Goal:
    """A figure that the project wants to reach, and what was measured: `Goal("share of bandwidth", 80, 84.2, "%")`."""

    what: str
    target: float
    measured: float
    unit: str
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether the measured value reaches the target; NaN does not."""
        return self.measured <= self.target if self.at_most else self.measured >= self.target

    def row(self) -> tuple[str, str, str, str]:
        """As the table of goals shows it."""
        target = f"{'≤' if self.at_most else '≥'} {self.target:g} {self.unit}"
        return self.what, target, f"{self.measured:.3g} {self.unit}", "yes" if self.met else "NO"


GOALS_HEADER = ("what", "target", "measured", "met")


@dataclass(frozen=True)
class Table:
    """A caption, a note below it, column names and rows of text.

    records are the rows' numbers for the JSON file, one mapping a row; goals what the table says of the project's
    targets; skipped one line "name: why" for each thing that was to be measured and was not.
    """

    caption: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]] = ()
    records: Sequence[Mapping[str, object]] = ()
    goals: Sequence[Goal] = ()
    skipped: Sequence[str] = ()

    def plus(
        self, row: Sequence[str], record: Mapping[str, object], *goals: Goal, skipped: Iterable[str] = ()
    ) -> Table:
        """The same with a row more: `yield (table := table.plus(("1", "2 µs"), {"rows": 1, "us": 2.0}))`."""
        return replace(
            self,
            rows=[*self.rows, row],
            records=[*self.records, record],
            goals=[*self.goals, *goals],
            skipped=list(dict.fromkeys([*self.skipped, *skipped])),
        )

    def markdown(self) -> str:
        """The table as Markdown; the first column is aligned left, the others right."""
        return f"{self.head()}\n{grid(self.header, self.rows)}\n{self.foot()}"

    def head(self) -> str:
        """What stands above the rows."""
        return f"## {self.caption}\n\n{self.note}\n"

    def foot(self) -> str:
        """What stands below them."""
        parts = [grid(GOALS_HEADER, [goal.row() for goal in self.goals])] if self.goals else []
        parts += [f"Skipped: {line}" for line in self.skipped]
        return "".join(f"\n{part}\n" for part in parts)


def cells(found: Mapping[str, Spread], ways: Iterable[str], digits: int = 1) -> tuple[str, ...]:
    """What was found of each way, "–" of one that was left out: `cells({"a": Spread(2, 1, 3)}, ["a", "b"], 0)`."""
    return tuple(found[way].text(digits) if way in found else "–" for way in ways)


def percent(share: float | None) -> str:
    """As a table shows a share of the peak, "–" where there is none: `percent(0.714)` is "71 %"."""
    return "–" if share is None else f"{100 * share:.0f} %"


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Header and rows as Markdown: `grid(("a", "b"), [("1", "2")])`."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(map(_line, lines))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _news(table: Table, before: Table | None) -> str:
    """What there is to print of a table behind another, or behind the same as far as it went."""
    if before is None or before.caption != table.caption:
        return f"{table.head()}\n{grid(table.header, table.rows)}"
    n = len(before.rows)
    grown = (before.header, list(before.rows)) == (table.header, list(table.rows[:n]))
    return "\n".join(map(_line, table.rows[n:])) if grown else grid(table.header, table.rows)


def write(
    name: str,
    title: str,
    environment: Mapping[str, str],
    tables: Sequence[Table],
    data: Mapping[str, object],
    folder: Path = RESULTS,
) -> Path:
    """Write name.md and name.json to `folder` and return the path of the former.

    write("decode", "Decoding", environment(device), [table], {"accuracy": {...}})
    """
    facts = "\n".join(f"- {key}: {value}" for key, value in environment.items())
    record = json.dumps({"environment": environment, **data}, indent=1, default=asdict)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{name}.md"
    # Whoever is cut while writing leaves what was there before.
    write_whole(page, f"# {title}\n\n{facts}\n\n" + "\n".join(t.markdown() for t in tables))
    write_whole(folder / f"{name}.json", record + "\n")
    return page


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


def run(
    name: str,
    title: str,
    measure: Callable[..., Iterable[Table]],
    argv: Sequence[str] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    on_cpu: Callable[[argparse.Namespace], bool] = lambda args: False,
    device: str = "",
) -> None:
    """The command line of a benchmark: measure, write all so far after each table, print each row as it comes.

    `measure(device, quick)` yields tables; one may come again and again under the same caption, each time with another
    row, so that a run that is cut keeps the rows it has. quick says that the grids should take seconds; on a CPU they
    are tiny in any case, and the page says that it is a dry run and is written only where --results names a folder.
    options: further ones by name, as argparse's add_argument takes them; measure gets their values by keyword. on_cpu:
    whether what these ask for is measured on a CPU too, instead of rehearsed. device: the only one, if there is.

        run("readout", "Readout", measure)
    """
    parser = argparse.ArgumentParser(prog=f"python -m mtpkern.bench.{name}", description=title)
    if device:
        parser.set_defaults(device=device)
    else:
        parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="the most telling shapes only")
    parser.add_argument("--results", type=Path, help="folder of the result files (default: bench/results; cpu: none)")
    further = [parser.add_argument(option, **facts).dest for option, facts in (options or {}).items()]
    args = parser.parse_args(argv)
    here = device_of(args.device)
    dry_run = here.type == "cpu" and not on_cpu(args)
    if dry_run:
        title += " (DRY RUN on a CPU: its figures say nothing)"
    folder = args.results or (None if dry_run else RESULTS)
    facts = {**environment(here), "quick": str(args.quick)}
    tables: list[Table] = []
    print(f"# {title}\n", flush=True)
    try:
        for table in measure(here, args.quick, **{key: getattr(args, key) for key in further}):
            if tables and tables[-1].caption != table.caption:
                print(tables[-1].foot(), flush=True)
            print(_news(table, tables[-1] if tables else None), flush=True)
            # A later table of the same caption knows more.
            tables = [*(t for t in tables if t.caption != table.caption), table]
            if folder is not None:
                data = {"title": title, "dry_run": dry_run, "tables": [asdict(t) for t in tables]}
                # As many threads as the benchmark has set.
                write(name, title, facts | {"threads": str(torch.get_num_threads())}, tables, data, folder)
    finally:
        if tables:
            print(tables[-1].foot(), flush=True)


def program(name: str, title: str, measure: Callable[..., Iterable[Table]], **how: Any) -> NoReturn:
    """`run`, and the end of the process, as `python -m` asks for: `program("readout", "Readout", measure)`."""
    sys.exit(exit_status(partial(run, name, title, measure, **how)))
