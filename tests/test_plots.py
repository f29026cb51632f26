"""Figures of an evaluation: CSV, pictures, and what is said where there is nothing to draw."""

import csv
import json

import pytest

from mtpkern import plots
from mtpkern.bench.report import RESULTS
from mtpkern.cli import main

FIGURES = {
    "static_1": {"accuracy": 0.9, "standard_error": 0.1, "tokens_per_pass": 1.0, "acceptance": [1.0], "problems": 10},
    "verified": {
        "accuracy": 0.9,
        "standard_error": 0.1,
        "tokens_per_pass": 2.5,
        "effective_k": 2.6,
        "wall_clock": 1.5,
        "acceptance": [1.0, 0.8, 0.5],
        "problems": 10,
    },
}


@pytest.fixture
def results(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"figures": FIGURES}))
    return tmp_path


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_pictures_with_their_numbers(results, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["plot", str(results), "--output", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "pareto.csv", "pareto.png", "acceptance.csv", "acceptance.png"
    }  # fmt: skip
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert [(row["way"], row["kind"], row["accuracy"], row["tokens_per_pass"]) for row in rows(out / "pareto.csv")] == [
        ("static_1", "static", "0.9", "1.0"),
        ("verified", "verified", "0.9", "2.5"),
    ]
    assert [float(row["acceptance"]) for row in rows(out / "acceptance.csv")] == [1.0, 0.8, 0.5]
    assert capsys.readouterr().out.count("\n") == 4


def test_nearness_to_the_original(tmp_path):
    pytest.importorskip("matplotlib")
    near = {"agreeing_prefix_original": 90.5, "identical_to_original": 0.25, "nll_original": 0.5}
    figures = {way: f | near for way, f in FIGURES.items()} | {"original": FIGURES["static_1"] | {"nll_original": 0.4}}
    (tmp_path / "results.json").write_text(json.dumps({"figures": figures}))
    assert main(["plot", str(tmp_path)]) == 0
    found = [
        (row["way"], row["agreeing_prefix_original"], row["tokens_per_pass"]) for row in rows(tmp_path / "original.csv")
    ]
    assert found == [("static_1", "90.5", "1.0"), ("verified", "90.5", "2.5")]
    assert (tmp_path / "original.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_are_the_numbers(results, monkeypatch, capsys):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert main(["plot", str(results)]) == 2
    assert "pip install 'mtpkern[plot]'" in capsys.readouterr().err
    assert rows(results / "pareto.csv")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "this is something else"),
        ('{"tables": []}', "this is something else"),
        ('{"figures": {}}', "nothing to draw"),
        (None, "there is no results.json"),
    ],
)
def test_what_cannot_be_drawn(tmp_path, capsys, text, says):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    assert main(["plot", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("prompts.jsonl", b'{"prompt": "x"}\n', "the table that a training run prints"),
        ("empty.log", b"", "the table that a training run prints"),
        ("odd.log", b"step    loss    agree\n1       x       y\n", "the table that a training run prints"),
        ("picture.png", b"\x89PNG", "the table that a training run prints"),
        ("trainer_state.json", b"\xff", "expected the trainer_state.json"),
        ("trainer_state.json", b'{"log_history": []}', "logged"),
        ("run.json", b"{}", "or of a benchmark"),
        ("real.json", b"\xff", "or of a benchmark"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, capsys, name, content, says):
    (tmp_path / name).write_bytes(content)
    assert main(["plot", str(tmp_path / name), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert str(tmp_path / name) in said
    assert not (tmp_path / "out").exists()


HISTORY = [
    {"step": 2, "loss": 2.0, "agreement": 0.25, "agreeing_prefix": 1.5},
    {"step": 4, "loss": 1.0, "agreement": 0.5, "agreeing_prefix": 2.0},
    {"step": 4, "eval_loss": 1.5, "eval_accuracy": 0.5, "eval_tokens_per_pass": 2.0}
    | {f"eval_{name}_{way}": value for way in ("verified", "static_1")
       for name, value in (("accuracy", 0.5), ("tokens_per_pass", 2.0 if way == "verified" else 1.0))},
]  # fmt: skip


def test_a_runs_course_from_its_newest_checkpoint(tmp_path):
    pytest.importorskip("matplotlib")
    for step, history in ((2, HISTORY[:1]), (10, HISTORY)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    kept = [{"step": 4, "confidence": [0.9, 0.7], "teacher_loss": [0.0, 1.0]}]
    (tmp_path / "spans.jsonl").write_text("".join(json.dumps(one) + "\n" for one in kept))
    assert main(["plot", str(tmp_path)]) == 0
    found = rows(tmp_path / "training.csv")
    assert [(row["step"], row["of"], row["loss"], row["agreeing_prefix"], row["tokens_per_pass"]) for row in found] == [
        ("2", "training", "2.0", "1.5", ""),
        ("4", "training", "1.0", "2.0", ""),
        ("4", "verified", "", "", "2.0"),
        ("4", "static_1", "", "", "1.0"),
    ]
    assert rows(tmp_path / "spans.csv") == [{"step": "4", "k": "2", "confidence": "0.8", "teacher_loss": "0.5"}]
    for name in ("training", "spans"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_course_as_it_was_printed(tmp_path):
    """What `mtpkern train` prints is what its log holds, as far as it prints it."""
    from mtpkern.train.progress import heading, table_row
    from mtpkern.training_plots import read_history

    logs = [{"loss": 2.0, "agreement": 0.25, "agreeing_prefix": 1.5, "learning_rate": 1e-3},
            {"loss": 1.0, "accuracy": 0.5, "tokens_per_pass": 2.25, "tokens_per_second": 812.0}]  # fmt: skip
    lines = ["training: 96 rows read", heading(), table_row("50/100", logs[0]), table_row("100", logs[1]), "mean  1.5"]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    assert read_history(tmp_path / "train.txt") == [
        {"step": 50, "loss": 2.0, "agreement": 0.25, "agreeing_prefix": 1.5},
        {"step": 100, "loss": 1.0, "accuracy": 0.5, "tokens_per_pass": 2.25},
    ]


def test_the_committed_results_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for source in ("h200/throughput.json", "real.json"):
        assert main(["plot", str(RESULTS / source), "--output", str(tmp_path)]) == 0
    found = rows(tmp_path / "throughput.csv")
    for row in found:
        assert float(row["tokens_a_second"]) == pytest.approx(int(row["batch"]) * float(row["tokens_a_second_each"]))
    assert {row["of"] for row in found} == {"Verified", "one a pass"}
    ks = [float(row["mean_k"]) for row in rows(tmp_path / "real.csv")]
    kinds = json.loads((RESULTS / "real.json").read_text())["rows"]
    assert len(ks) == sum(kind["tallies"]["ours"]["problems"] for kind in kinds)
    assert (tmp_path / "real.png").exists()


def test_coloured_blocks_of_a_prompt_as_a_page(tmp_path, capsys):
    from mtpkern.demo import ASSETS

    page = tmp_path / "blocks.html"
    words = ["generate", str(ASSETS), "--prompt", "Question: Ann has <3> eggs.", "--max-new-tokens", "8"]
    assert main([*words, "--html", str(page)]) == 0
    text = page.read_text()
    assert "Question: Ann has &lt;3&gt; eggs." in text
    assert '<p class="blocks">' in text
    assert "= 8 tokens in " in text
    assert main(["generate", str(ASSETS), "--file", "x.jsonl", "--html", str(page)]) == 2
    assert "--html shows one prompt" in capsys.readouterr().err
