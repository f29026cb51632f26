"""Summary of a run: what its evaluations have found, as a table, with curves of agreement."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mtpkern.training_plots import drawn

_DECODED = ("accuracy", "tokens_per_pass", "effective_k", "effective_k_deviation")
_COLUMNS = ("loss", "agreement", "agreeing_prefix", "original_agreement", *_DECODED)


def curves(history: Sequence[Mapping[str, Any]]) -> dict[int, list[float]]:
    """Agreement by position in the span at every logged step, of evaluation where there is one, else of training.

    curves(trainer.state.log_history)[2000]  # [0.99, 0.93, 0.85, ...]
    """
    prefix = "eval_agreement_" if any("eval_agreement_1" in entry for entry in history) else "agreement_"
    found = {}
    for entry in history:
        positions = sorted(int(key[len(prefix) :]) for key in entry if re.fullmatch(rf"{prefix}\d+", key))
        if positions:
            found[int(entry["step"])] = [entry[f"{prefix}{j}"] for j in positions]
    return found


def strategies_in(logs: Mapping[str, Any]) -> list[str]:
    """The names of the strategies whose figures are in the logs of an evaluation, if there are several; else none.

    strategies_in({"eval_accuracy": 0.5, "eval_accuracy_verified": 0.5, "eval_accuracy_static_1": 0.5})
    # ["verified", "static_1"]
    """
    names = [key.removeprefix("eval_accuracy_") for key in logs if key.startswith("eval_accuracy_")]
    return names if len(names) > 1 else []


def summarise(history: Sequence[dict[str, Any]], folder: str | Path) -> str:
    """Write summary.md, a row for every evaluation (and way to decode), and agreement.png; returns the text.

    Without matplotlib there is no picture, and the summary says how to get it. Nothing is written of neither.
    """
    folder = Path(folder)
    rows = [entry for entry in history if "eval_loss" in entry]
    columns = [name for name in _COLUMNS if any(f"eval_{name}" in row for row in rows)]
    lines = markdown(["step", *columns], [[f"{row['step']}", *_cells(row, columns)] for row in rows])
    ways = [[f"{row['step']}", way, *_cells(row, _DECODED, f"_{way}")] for row in rows for way in strategies_in(row)]
    lines += ["", *markdown(["step", "decoding", *_DECODED], ways)] if ways else []
    found = curves(history)
    if found and find_spec("matplotlib") is not None:
        _draw(found, folder / "agreement.png")
        lines += ["", "![agreement by position](agreement.png)"]
    elif found and lines:
        lines += ["", "No picture of agreement by position: matplotlib is missing; run: pip install 'mtpkern[plot]'"]
    if not lines:
        return ""
    text = "\n".join(lines).lstrip() + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.md").write_text(text, encoding="utf-8")
    return text


def _cells(logs: Mapping[str, Any], names: Sequence[str], end: str = "") -> list[str]:
    return [f"{logs[key]:.4g}" if (key := f"eval_{name}{end}") in logs else "" for name in names]


def markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; none where it has no rows: `markdown(["step"], [["1"]])[0]  # "| step |"`."""
    header, *lines = [f"| {' | '.join(line)} |" for line in (heading, *rows)]
    return [header, "|" + "---|" * len(heading), *lines] if lines else []


def _draw(found: dict[int, list[float]], path: Path) -> None:
    """One line a logged step, at most ten of them, the later the darker."""
    steps = sorted(found)
    shown = sorted({steps[round(i * (len(steps) - 1) / 9)] for i in range(10)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with drawn(path, "position in the span", "agreement with the target") as (axes,):
        for i, step in enumerate(shown, 1):
            shade, positions = 0.85 - 0.85 * i / len(shown), range(1, len(found[step]) + 1)
            color = (shade, shade, 1 - 0.5 * (1 - shade))
            axes.plot(positions, found[step], color=color, marker=".", label=f"step {step}")
        axes.set_ylim(0, 1.02)
        axes.legend(fontsize="small")
