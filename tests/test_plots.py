"""Figures of an evaluation: CSV, pictures, and what is said where there is nothing to draw."""

import csv
import json

import pytest

from mtpkern import plots
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


def test_without_matplotlib_there_are_the_numbers(results, monkeypatch, capsys):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert main(["plot", str(results)]) == 2
    assert "pip install 'mtpkern[plot]'" in capsys.readouterr().err
    assert rows(results / "pareto.csv")


@pytest.mark.parametrize(
    ("text", "says"),
    [("[]", "this is something else"), ('{"figures": {}}', "nothing to draw"), (None, "there is no results.json")],
)
def test_what_cannot_be_drawn(tmp_path, capsys, text, says):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    assert main(["plot", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err


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
