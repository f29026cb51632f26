"""`make figures`: its commands as they stand, upon one problem and one step."""

import csv
import shlex
import subprocess
from pathlib import Path

import pytest

from mtpkern.cli import main
from mtpkern.train import arithmetic

ROOT = Path(__file__).resolve().parents[1]
LESS = {"--max-new-tokens": "4", "--problems": "8", "--held-out": "2"}
COURSES = ("course", "full")
ONE_STEP = "--max-steps 1 --per-device-train-batch-size 1 --eval-on-start false --eval-strategy no --decode-rows 0"


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """What the recipe runs, in a folder where its inputs are; pictures, which test_plots.py draws, stay empty."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(figure, "savefig", lambda self, path, **options: Path(path).touch())
    done = subprocess.run(
        ["make", "--dry-run", "--old-file", ".venv/.installed", "figures", "FIGURES_ARGS=--limit 1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.replace("\\\n", " ").splitlines()
    for name in ("mtpkern", "bench"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs/figures").mkdir(parents=True)
    for name in ("course.yaml", "full.yaml"):
        (tmp_path / "docs/figures" / name).symlink_to(ROOT / "docs/figures" / name)
    monkeypatch.chdir(tmp_path)
    found = []
    for line in lines:
        if not line.startswith("for "):
            found.append(shlex.split(line))
            continue
        names, body = line.removeprefix("for results in ").split("; do ")
        found += [shlex.split(body.split(" || ")[0].replace("$results", name)) for name in names.split()]
    return [words for words in found if words[0].startswith(".venv")]


def run(words):
    words = [LESS.get(before, word) for before, word in zip(["", *words], words)]
    if words[0].endswith("/python"):
        assert words[1:3] == ["-m", "mtpkern.train.arithmetic"]
        arithmetic.main(words[3:])
        return
    more = ONE_STEP.split() if words[1] == "train" else []
    assert main([*words[1:], *more]) == 0, words


def test_every_command_runs(commands, capsys):
    for words in commands:
        # The courses are runs of their own, below.
        if not any(course in word for word in words for course in COURSES):
            run(words)
    there = {str(path.relative_to("docs/figures")) for path in Path("docs/figures").rglob("*.png")}
    assert there >= {"pareto.png", "acceptance.png", "real/real.png", "real/throughput.png", "cpu/throughput.png"}
    # The real model's, of its committed results.
    assert there >= {"real/pareto.png", "real/acceptance.png", "real/original.png"}
    assert '<p class="blocks">' in Path("docs/figures/blocks.html").read_text()
    assert {"blocks.html", "course.yaml", "full.yaml"} <= {path.name for path in Path("docs/figures").iterdir()}


@pytest.mark.parametrize("course", COURSES)
def test_a_course_is_trained_and_drawn(commands, course, capsys):
    mine = [words for words in commands if any(course in word for word in words)]
    assert len(mine) == 3
    for words in mine:
        run(words)
    assert Path("docs/figures", course, "training.png").exists()


def test_a_gated_course_keeps_the_models_own_tokens_and_brings_more_of_them_a_pass():
    """The committed figure: one a pass and Verified are right as often at every step, in fewer and fewer passes."""
    with (ROOT / "docs/figures/course/training.csv").open() as file:
        judged = [row for row in csv.DictReader(file) if row["accuracy"]]
    assert len({row["accuracy"] for row in judged if not row["of"].startswith("confadapt")}) == 1
    verified = [float(row["tokens_per_pass"]) for row in judged if row["of"].startswith("verified")]
    assert len(verified) >= 4
    assert verified[-1] > 2 * verified[0]


def test_what_it_makes_stands_in_the_pages():
    """Each picture is shown, and its numbers lie beside it."""
    shown = (ROOT / "docs/figures/README.md").read_text() + (ROOT / "docs/performance.md").read_text()
    pictures = sorted((ROOT / "docs/figures").rglob("*.png"))
    assert {path.name for path in pictures} >= {"pareto.png", "acceptance.png", "training.png", "spans.png", "real.png"}
    for path in pictures:
        assert str(path.relative_to(ROOT / "docs/figures")) in shown, path
        assert path.with_suffix(".csv").is_file(), path
