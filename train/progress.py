"""What a run prints while it trains: a bar on a terminal, a row of a table for each log, and a line at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from mtpkern.train.summary import strategies_in

# Of a log: its name there, of an evaluation behind "eval_"; the heading; how it is written. "orig" shows the damage of
# training, plain decoding's tokens that are still the original model's; "tok/s" are tokens of texts, without masks.
COLUMNS = (
    ("loss", "loss", "{:.4g}"),
    ("agreement", "agree", "{:.1%}"),
    ("agreeing_prefix", "prefix", "{:.2f}"),
    ("original_agreement", "orig", "{:.1%}"),
    ("accuracy", "right", "{:.1%}"),
    ("tokens_per_pass", "tok/fwd", "{:.2f}"),
    ("learning_rate", "rate", "{:.1e}"),
    ("grad_norm", "grad", "{:.3g}"),
    ("tokens_per_second", "tok/s", "{:.0f}"),
)
_WIDTH = 8
# Up to the first figure of decoding.
_NAME = 8 + 4 * _WIDTH


def table_row(where: str, logs: Mapping[str, Any]) -> str:
    """A row of at most 80 columns; what a log does not have is left blank.

    table_row("50/2000", {"loss": 1.25, "agreement": 0.5})  # "50/2000           1.25    50.0%"
    """
    values = [(logs.get(n, logs.get(f"eval_{n}", logs.get(f"train_{n}"))), form) for n, _, form in COLUMNS]
    texts = ["" if value is None else form.format(float(value)) for value, form in values]
    return " ".join([f"{where[:8]:<8}", *(f"{text:>{_WIDTH - 1}}" for text in texts)]).rstrip()


def heading() -> str:
    """The heading of the table."""
    return " ".join([f"{'step':<8}", *(f"{title:>{_WIDTH - 1}}" for _, title, _ in COLUMNS)])


def strategy_rows(logs: Mapping[str, Any]) -> list[str]:
    """A row for each way in which held-out prompts were decoded, if these are several.

    strategy_rows({"eval_accuracy_verified": 0.5, "eval_accuracy_static_1": 0.4})[1]  # "  static_1 ...   40.0%"
    """

    def row(name: str) -> str:
        line = table_row("", {key: logs.get(f"eval_{key}_{name}") for key in ("accuracy", "tokens_per_pass")})
        # The name may reach into the columns that such a row leaves blank.
        return f"  {name}"[:_NAME].ljust(_NAME) + line[_NAME:]

    return [row(name) for name in strategies_in(logs)]


class TableCallback(ProgressCallback):
    """In the place of transformers' ProgressCallback, whose lines hold every number of a log.

    What is left out of the table is in the log history, in `report_to` and, of evaluations, in summary.md.

        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(TableCallback())
    """

    def __init__(self) -> None:
        super().__init__()
        self.headed = False

    def _draws(self, args: TrainingArguments) -> bool:
        return Console(stderr=True).is_terminal and not args.disable_tqdm

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        """Begin the bar, which is drawn by one process and on a terminal alone."""
        drawn = state.is_world_process_zero and self._draws(args)
        self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=not drawn)
        self.current_step = 0

    def on_prediction_step(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        """Begin or move the bar of an evaluation."""
        if self._draws(args):
            super().on_prediction_step(args, *rest, **kwargs)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Print a row."""
        logs = kwargs.get("logs") or {}
        if not state.is_world_process_zero:
            return
        if any(name.startswith("eval_") for name in logs):
            where = "held out"
        elif "train_runtime" in logs:
            self._say(f"{state.global_step:,} steps; this run took {_duration(float(logs['train_runtime']))}")
            where = "mean"
        else:
            where = str(state.global_step)
        if not self.headed:
            self._say(heading())
            self.headed = True
        ways = strategy_rows(logs)
        # Then each has its own row, and the first's figures stand there.
        hidden = ("eval_accuracy", "eval_tokens_per_pass") if ways else ()
        for line in [table_row(where, {n: x for n, x in logs.items() if n not in hidden}), *ways]:
            self._say(line)

    def _say(self, line: str) -> None:
        if self.training_bar is None or self.training_bar.disable:
            print(line, flush=True)
        else:
            self.training_bar.write(line)


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    parts = [f"{hours} h" if hours else "", f"{minutes} min" if hours or minutes else "", f"{rest} s"]
    return " ".join(filter(None, parts))
