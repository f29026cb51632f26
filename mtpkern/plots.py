"""Figures: `mtpkern plot SOURCE` draws what an evaluation, a training or a benchmark has left, the numbers beside each.

    pareto.png      accuracy against tokens a pass: static, ConfAdapt and Verified, and the original where it was asked
    acceptance.png  how often a pass keeps its j-th token where it has kept those before
    original.png    how far answers are the original's, and how likely it finds them, against tokens a pass
    training.png, spans.png      mtpkern.training_plots
    throughput.png, real.png     mtpkern.bench_plots

Beside each stands a CSV with what it shows. matplotlib draws them (extra plot); the CSV files are written without it.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mtpkern.bench_plots import draw_real, draw_throughput, real, throughput
from mtpkern.output import printable, whole_file
from mtpkern.training_plots import SPANS, STATE, course, draw_course, draw_spans, drawn, read_history, spans, state_of

Figures = Mapping[str, Mapping[str, Any]]

# Colours that colour-blind eyes tell apart, and a mark each for print without any.
_KINDS = {
    "static": ("#d55e00", "s"),
    "confadapt": ("#0072b2", "o"),
    "verified": ("#009e73", "^"),
    "original": ("#555555", "*"),
}


def kind_of(way: str) -> str:
    """The kind of strategy that a way's name begins with: `kind_of("confadapt_8_0.9")` is "confadapt"."""
    return way.partition("_")[0]


def pareto(figures: Figures) -> list[dict[str, Any]]:
    """A row a way for the figure of accuracy against tokens a pass; none where the data had no expected answers."""
    names = ("accuracy", "standard_error", "tokens_per_pass", "effective_k", "wall_clock", "problems")
    scored = {way: f for way, f in figures.items() if "accuracy" in f}
    return [{"way": way, "kind": kind_of(way), **{n: f.get(n, "") for n in names}} for way, f in scored.items()]


def nearness(figures: Figures) -> list[dict[str, Any]]:
    """A row a way for the figure of nearness to the original; none where there was none (--baseline)."""
    names = ("agreeing_prefix_original", "identical_to_original", "nll_original", "tokens_per_pass", "problems")
    compared = {way: f for way, f in figures.items() if "agreeing_prefix_original" in f and "nll_original" in f}
    return [{"way": way, "kind": kind_of(way), **{n: f[n] for n in names}} for way, f in compared.items()]


def acceptance(figures: Figures) -> list[dict[str, Any]]:
    """A row a way and position, for those that keep more than one token in any pass."""
    return [
        {"way": way, "kind": kind_of(way), "position": j, "acceptance": share}
        for way, f in figures.items()
        if len(f["acceptance"]) > 1
        for j, share in enumerate(f["acceptance"], 1)
    ]


def plot(source: Path, folder: Path) -> list[Path]:
    """Write the figures of a file of results or of a run's folder, and return their paths.

    source: a folder that `mtpkern eval` or `mtpkern train` has written, or a file: results.json, trainer_state.json,
    what a training has printed, or the results of mtpkern.bench.throughput or real

    Raises ValueError for what is none of these, and ImportError, when the CSV files are there, without matplotlib.

        plot(Path("runs/eval"), Path("docs/figures"))
    """
    tables = _tables(source)
    if not tables:
        why = "no expected answers and no way of more than one token a pass, or no step logged"
        raise ValueError(f"{source}: nothing to draw: {why}")
    folder.mkdir(parents=True, exist_ok=True)
    written = [_write(rows, folder / f"{name}.csv") for name, rows in tables.items()]
    if find_spec("matplotlib") is None:
        there = f"the numbers are in {folder} as CSV"
        raise ImportError(f"pictures need matplotlib; {there}; run: pip install 'mtpkern[plot]'")
    for name, rows in tables.items():
        _DRAW[name](rows, folder / f"{name}.png")
        written.append(folder / f"{name}.png")
    return written


def _tables(source: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each figure that a source has."""
    if source.is_dir():
        state, results, kept = state_of(source), source / "results.json", source / SPANS
        if state is None and not results.is_file():
            raise FileNotFoundError(
                f"{source}: there is no results.json and no {STATE}; make the one with mtpkern eval --output, the "
                "other with mtpkern train"
            )
        tables = _measured(results) if results.is_file() else {}
        if kept.is_file():
            tables["spans"] = spans(kept)
    elif not source.is_file():
        raise FileNotFoundError(f"{source}: there is no such file or folder")
    else:
        state = source if source.name == STATE or source.suffix != ".json" else None
        tables = _measured(source) if state is None else {}
    if state is not None:
        tables["training"] = course(read_history(state))
    return {name: rows for name, rows in tables.items() if rows}


def _measured(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if "figures" in found:
            made = {"pareto": pareto, "acceptance": acceptance, "original": nearness}
            return {name: rows_of(found["figures"]) for name, rows_of in made.items()}
        tables = {"throughput": throughput(found), "real": real(found)}
    except (ValueError, KeyError, TypeError, AttributeError):
        tables = {}
    if not any(tables.values()):
        raise ValueError(
            f"{path}: expected the results of mtpkern eval or of a benchmark that can be drawn (throughput, real), "
            "this is something else"
        )
    return tables


def _write(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    with whole_file(path) as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: round(x, 6) if isinstance(x, float) else x for name, x in row.items()})
    return path


def _draw_pareto(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    with drawn(path, "tokens a pass", "right answers, %") as (axes,):
        _curves(axes, rows, "accuracy", 100, "standard_error")


def _draw_original(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    near, loss = "the original's tokens before the first other", "the original's loss on the text, nats a token"
    with drawn(path, "tokens a pass", near, loss, size=(10, 4)) as panels:
        for axes, name in zip(panels, ("agreeing_prefix_original", "nll_original")):
            _curves(axes, rows, name)


def _curves(
    axes: Any, rows: Sequence[Mapping[str, Any]], name: str, scale: float = 1, error: str | None = None
) -> None:
    """A figure of the ways against tokens a pass, a line for each kind of strategy."""
    for kind, (colour, mark) in _KINDS.items():
        mine = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["tokens_per_pass"])
        if mine:
            x, y = ([factor * row[of] for row in mine] for of, factor in (("tokens_per_pass", 1), (name, scale)))
            spread = None if error is None else [scale * row[error] for row in mine]
            axes.errorbar(x, y, yerr=spread, color=colour, marker=mark, capsize=2, label=kind)
    axes.legend()


def _draw_acceptance(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    with drawn(path, "position in the pass", "kept, where the positions before were") as (axes,):
        axes.set_ylim(0, 1.02)
        for way in dict.fromkeys(row["way"] for row in rows):
            mine = [row for row in rows if row["way"] == way]
            colour, mark = _KINDS.get(mine[0]["kind"], _KINDS["original"])
            x, y = [row["position"] for row in mine], [row["acceptance"] for row in mine]
            axes.plot(x, y, color=colour, marker=mark, alpha=0.7, label=way)
        axes.legend(fontsize="x-small", ncols=2)


_DRAW = {
    "pareto": _draw_pareto,
    "acceptance": _draw_acceptance,
    "original": _draw_original,
    "training": draw_course,
    "spans": draw_spans,
    "throughput": draw_throughput,
    "real": draw_real,
}


def main(argv: Sequence[str]) -> None:
    """The command line: draw the figures of results, beside them unless told otherwise.

    main(["runs/eval", "--output", "docs/figures"])
    """
    parser = argparse.ArgumentParser(
        prog="mtpkern plot", description="Figures of an evaluation, a training or a benchmark, PNG and CSV."
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="the folder of mtpkern eval or mtpkern train; or a file: results of a benchmark, what a training printed",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the figures go (default: beside the source)")
    args = parser.parse_args(argv)
    beside = args.source if args.source.is_dir() else args.source.parent
    for path in plot(args.source, args.output or beside):
        print(printable(str(path)))
