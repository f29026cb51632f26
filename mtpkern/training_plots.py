"""A run's course, for `mtpkern plot`: accuracy and acceleration over training steps.

    training.png  tokens a pass of held-out prompts, or the agreeing prefix of spans, by step; beside it right answers,
                  or the loss
    spans.png     confidence of spans against the teacher's loss on them, where the run has kept them

A run's own figures come from trainer_state.json of its newest checkpoint, or from what it has printed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

STATE = "trainer_state.json"
SPANS = "spans.jsonl"
# A printed table's headings (mtpkern.train.progress), by the names of the logs.
_PRINTED = {
    "loss": "loss",
    "agree": "agreement",
    "prefix": "agreeing_prefix",
    "orig": "original_agreement",
    "right": "accuracy",
    "tok/fwd": "tokens_per_pass",
}
_FIGURES = tuple(_PRINTED.values())
_LEFT, _WIDTH = 8, 8
_OF_SPANS = ("confidence", "teacher_loss")


def state_of(folder: Path) -> Path | None:
    """The trainer_state.json of a run's folder or, at its newest, of its checkpoints; None where there is none."""
    found = [folder / STATE, *folder.glob(f"checkpoint-*/{STATE}")]
    steps = {path: int(match[1]) if (match := re.search(r"-(\d+)$", path.parent.name)) else 0 for path in found}
    return max((path for path in found if path.is_file()), key=lambda path: steps[path], default=None)


def read_history(path: Path) -> list[dict[str, Any]]:
    """The logs of a run, of its trainer_state.json or of the table that it printed; ValueError for another file."""
    is_json = path.suffix == ".json"
    try:
        text = path.read_text(encoding="utf-8")
        return [dict(one) for one in json.loads(text)["log_history"] if "step" in one] if is_json else _printed(text)
    except (ValueError, KeyError, TypeError):
        expected = f"the {STATE} of a training run" if is_json else "the table that a training run prints"
        raise ValueError(f"{path}: expected {expected}, this is something else") from None


def _printed(text: str) -> list[dict[str, Any]]:
    """The rows of the table in a text. ValueError where there is none, or a cell is no number."""
    lines = text.splitlines()
    head = next((i for i, line in enumerate(lines) if line.split()[:2] == ["step", "loss"]), None)
    if head is None:
        raise ValueError("no table")
    titles = lines[head].split()[1:]
    history = []
    for line in lines[head + 1 :]:
        where = line[:_LEFT].strip().partition("/")[0]
        if not where.isdecimal():
            continue
        cells = [line[_LEFT + _WIDTH * i : _LEFT + _WIDTH * (i + 1)].strip() for i in range(len(titles))]
        entry: dict[str, Any] = {"step": int(where)}
        for title, cell in zip(titles, cells):
            if cell and title in _PRINTED:
                entry[_PRINTED[title]] = float(cell.rstrip("%")) / (100 if cell.endswith("%") else 1)
        history.append(entry)
    return history


def course(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a log: of training, of an evaluation, and of each way in which one decoded; blank what it does not say.

    course([{"step": 50, "loss": 1.2, "agreeing_prefix": 1.5}])  # one row, of "training"
    """
    rows = []
    for entry in history:
        ways = [name.removeprefix("eval_accuracy_") for name in entry if name.startswith("eval_accuracy_")]
        for of, prefix, end in (
            ("training", "", ""),
            *(() if len(ways) > 1 else (("evaluation", "eval_", ""),)),
            *((way, "eval_", f"_{way}") for way in ways if len(ways) > 1),
        ):
            found = {name: entry.get(f"{prefix}{name}{end}", "") for name in _FIGURES}
            if any(value != "" for value in found.values()):
                rows.append({"step": entry["step"], "of": of, **found})
    return rows


def spans(path: Path) -> list[dict[str, Any]]:
    """A row a span that a run has kept (mtpkern.train.spans): step, k, mean confidence, mean teacher's loss in nats."""
    try:
        kept = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [
            {"step": one["step"], "k": len(one["confidence"]), **{name: mean(one[name]) for name in _OF_SPANS}}
            for one in kept
        ]
    except (ValueError, KeyError, TypeError):  # of no span, which has no mean, too
        raise ValueError(f"{path}: expected the spans that a training run has kept, this is something else") from None


@contextmanager
def drawn(path: Path, xlabel: str, *ylabels: str, size: tuple[float, float] = (7, 4.5)) -> Iterator[Sequence[Any]]:
    """The axes of a picture with a panel a ylabel, side by side, which is written at the end of the block."""
    from matplotlib.figure import Figure  # type: ignore[import-not-found]  # of an extra

    figure, n = Figure(figsize=size, layout="constrained"), len(ylabels)
    panels = [figure.add_subplot(1, n, i, xlabel=xlabel, ylabel=label) for i, label in enumerate(ylabels, 1)]
    for axes in panels:
        axes.grid(alpha=0.3)
    yield panels
    figure.savefig(path, dpi=150)


def draw_course(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Two panels by step: acceleration, and right answers or else the loss."""
    decoded = any(row["tokens_per_pass"] != "" for row in rows)
    judged = any(row["accuracy"] != "" for row in rows)
    gained = ("tokens_per_pass", "tokens a pass", 1) if decoded else ("agreeing_prefix", "agreeing prefix, tokens", 1)
    kept = ("accuracy", "right answers, %", 100) if judged else ("loss", "loss", 1)
    with drawn(path, "step", gained[1], kept[1], size=(10, 4)) as panels:
        for axes, (name, _, scale) in zip(panels, (gained, kept)):
            for of in dict.fromkeys(row["of"] for row in rows):
                mine = [row for row in rows if row["of"] == of and row[name] != ""]
                if mine:
                    axes.plot([row["step"] for row in mine], [scale * row[name] for row in mine], marker=".", label=of)
            axes.legend(fontsize="small")


def draw_spans(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A point a span, those of later steps darker."""
    x, y, steps = ([row[name] for row in rows] for name in (*_OF_SPANS, "step"))
    with drawn(path, "confidence of the student, mean of the span", "teacher's loss, nats a token") as (axes,):
        points = axes.scatter(x, y, c=steps, cmap="viridis_r", s=8, alpha=0.6)
        axes.figure.colorbar(points, label="step")
