"""What `mtpkern train` prints: a table that fits a terminal, and at the end how to decode the model."""

import json
import shlex
from types import SimpleNamespace

import pytest

from mtpkern.cli import main
from mtpkern.train.metrics import Seen
from mtpkern.train.progress import heading, strategy_rows, table_row

ROWS = [{"question": f"How many are {i} and 1?", "answer": f"They are {i + 1}.\n#### {i + 1}"} for i in range(8)]


def test_a_row_stands_under_its_heading():
    logs = {"loss": 1.25, "agreement": 0.5, "agreement_2": 0.1, "tokens_per_second": 1234567.0, "learning_rate": 1e-5}
    row = table_row("20000", logs)
    assert row.split() == ["20000", "1.25", "50.0%", "1.0e-05", "1234567"]
    assert row.index("50.0%") + 5 == heading().index("agree") + 5
    assert max(len(row), len(heading())) <= 80
    assert table_row("held out", {"eval_loss": 2.0, "eval_accuracy": 0.975}).split() == ["held", "out", "2", "97.5%"]


def test_rates_are_a_second_since_the_last_log(monkeypatch):
    clock = iter([100.0, 104.0])
    monkeypatch.setattr("mtpkern.train.metrics.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    seen = Seen()
    seen.add(2, 30, 40)
    seen.add(1, 10, 20)
    rates = seen.rates()
    assert [rates[f"{name}_per_second"] for name in ("texts", "span_rows", "tokens")] == [0.75, 10, 15]


def test_a_row_for_each_way_of_decoding():
    logs = {"eval_loss": 2.0, "eval_accuracy": 0.5, "eval_accuracy_verified": 0.5}
    assert strategy_rows(logs) == []
    logs |= {"eval_accuracy_confadapt_16_0.95": 0.25, "eval_tokens_per_pass_confadapt_16_0.95": 4.5}
    first, second = strategy_rows(logs)
    assert first.split() == ["verified", "50.0%"]
    assert second.split() == ["confadapt_16_0.95", "25.0%", "4.50"]
    assert second.index("25.0%") == heading().index("right")
    assert second.index("4.50") + 4 == heading().index("tok/fwd") + 7


@pytest.mark.parametrize("gated", [False, True])
def test_a_run_prints_a_table_and_how_to_go_on(tmp_path, start, capsys, gated):
    data, out = tmp_path / "rows.jsonl", tmp_path / "out folder"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = ["--model", str(start), "--train-data", str(data), "--output-dir", str(out), "--no-chat"]
    flags += ["--eval-data", str(data), "--eval-strategy", "steps", "--eval-steps", "2", "--logging-steps", "1"]
    flags += ["--use-cpu", "--k-max", "3", "--num-spans", "2", "--max-steps", "2", "--report-to", "none"]
    assert main(["train", *flags, *(["--gated", "--lora-rank", "2"] if gated else [])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == heading()
    assert [line.split()[0] for line in lines[1:6]] == ["1", "2", "held", "2", "mean"]
    assert "{" not in "".join(lines)
    assert max(map(len, lines[:6])) <= 80
    assert str(out) in lines[6]
    if gated:
        assert f'mtpkern.load_adapter(model, "{out}")' in lines[8]
    words = shlex.split(lines[7])
    assert words[:3] == ["mtpkern", "generate", str(out)]
    assert main([*words[1:], "--max-new-tokens", "3"]) == 0
