"""The card of a trained model, README.md in its folder: what the run itself knows, and nothing else.

data, recipe     the run's record (mtpkern.train.record)
deviations       the options of multi-token prediction that are other than the defaults, which are the paper's
acceptance       what training and its evaluations have logged
speed            of training; that of decoding is added by `mtpkern eval` (mtpkern.card)
origin           command, commit, hardware and versions
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

from mtpkern.card import MARK
from mtpkern.origin import origin
from mtpkern.output import write_whole
from mtpkern.train.config import MTPConfig
from mtpkern.train.record import Record
from mtpkern.train.summary import curves, markdown

# What of TrainingArguments a reader asks for first.
_USUAL = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "processes", "learning_rate", "lr_scheduler_type"),
    *("warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "optim", "bf16", "seed"),
    *("student_dtype", "teacher_dtype"),
)
# What the default None stands for in the paper's own method.
_PAPERS = {"teacher_target": "hard", "loss_support": "all"}
_LOGGED = ("loss", "agreement", "agreeing_prefix", "original_agreement")
_DECODED = ("eval_loss", "eval_agreeing_prefix", "eval_accuracy", "eval_tokens_per_pass", "eval_effective_k")
# A card is read, not plotted: `mtpkern plot` draws all of the steps.
_MOST_ROWS = 12


def write_card(folder: str | Path, text: str) -> bool:
    """Write README.md, unless one is there that is not ours; returns whether it was written.

    write_card("out", card(...))
    """
    path = Path(folder) / "README.md"
    if path.exists() and MARK not in path.read_text(encoding="utf-8"):
        return False
    write_whole(path, text)
    return True


def card(
    *,
    base: str,
    config: MTPConfig,
    record: Record,
    history: Sequence[Mapping[str, Any]],
    data: Sequence[str],
    command: str,
    use: str,
) -> str:
    """The text.

    base: the model that training began with; data: a line for each of the files that were read; use: how it is decoded

        card(base="my-model", config=config, record=trainer.record(), history=trainer.state.log_history,
             data=["answers.jsonl: 96 rows"], command="mtpkern train run.yaml", use="mtpkern generate out")
    """
    recipe = record.recipe
    head = {"base_model": base, "library_name": "peft" if config.gated else "transformers"}
    kind = "A gated adapter for" if config.gated else "Trained for several tokens a pass, from"
    lines = ["---", yaml.safe_dump({**head, "tags": ["multi-token-prediction"]}).strip(), "---", MARK, ""]
    lines += [f"# {Path(str(config.output_dir)).name}", "", f"{kind} {base}, by mtpkern; {record.step} steps.", ""]
    lines += ["## Use", "", "```text", use, "```", ""]
    lines += ["## Data", "", *(f"- {line}" for line in data), ""]
    lines += [f"- {name}: {source}" for name in ("train_data", "eval_data") for source in recipe.get(name) or ()]
    lines += ["", "## Recipe", "", _list({n: recipe[n] for n in _USUAL if n in recipe}), ""]
    other = deviations(recipe)
    lines += ["Other than the defaults, which are those of arXiv 2602.06019 but for the layout and where spans stand:"]
    lines += ["", _list(other) if other else "- nothing", ""]
    lines += [f"- changed on the way: {change}" for change in record.changes]
    lines += ["## Acceptance", "", *_table(history, _LOGGED), *_table(history, _DECODED)]
    lines += _positions(history)
    lines += ["## Speed of training", "", _list(_speed(history)), ""]
    facts = origin(torch.device(config.device), command)
    lines += ["## Origin", "", _list({**facts, **record.versions}), ""]
    return "\n".join(lines)


def deviations(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The options that `MTPConfig` adds, where a run's are not the defaults: `deviations({"k_max": 4})`."""
    theirs = {f.name for f in fields(TrainingArguments)}
    defaults = {f.name: f.default for f in fields(MTPConfig) if f.name not in theirs and f.default is not MISSING}
    defaults |= _PAPERS
    names = [name for name in defaults if name in recipe and name not in _USUAL]
    return {name: recipe[name] for name in names if recipe[name] != defaults[name]}


def _speed(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def logged(name: str) -> list[float]:
        return [entry[name] for entry in history if name in entry]

    found: dict[str, Any] = {}
    if seconds := logged("train_runtime"):
        found["seconds"] = round(seconds[-1], 1)
    if rates := logged("tokens_per_second"):
        found["tokens of texts a second, greatest of the logs"] = round(max(rates))
    if memory := logged("peak_memory_gib"):
        found["peak memory"] = f"{max(memory):.1f} GiB"
    return found


def _table(history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Rows of the logs that have one of the figures, evenly chosen; nothing where none has."""
    rows = [entry for entry in history if "step" in entry and names[0] in entry]
    columns = [name for name in names if any(name in row for row in rows)]
    if not rows:
        return []
    chosen = sorted({round(i * (len(rows) - 1) / (_MOST_ROWS - 1)) for i in range(_MOST_ROWS)})
    cells = [[f"{rows[i][name]:.4g}" if name in rows[i] else "" for name in columns] for i in chosen]
    return [*markdown(["step", *columns], [[str(rows[i]["step"]), *line] for i, line in zip(chosen, cells)]), ""]


def _positions(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Agreement by position in the span, as logged last."""
    found = curves(history)
    if not found:
        return []
    said = ", ".join(f"{share:.3f}" for share in found[max(found)])
    return [f"Agreement by position in the span, at step {max(found)}: {said}.", ""]


def _list(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())
