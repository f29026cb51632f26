"""What the pages claim is in the files that they name: numbers, and what the shipped model's figure shows."""

import json
from pathlib import Path

import pytest

from mtpkern.bench import readme
from mtpkern.plots import pareto
from support.traces import untraced

ROOT = Path(__file__).resolve().parents[1]
# All of docs but the log, the way from the paper to the code, and what a command has written: there numbers come from.
ORIGINS = {"log.md", "paper.md", "results.md"}
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md") if path.name not in ORIGINS)
CARDS = ("mtpkern/assets/README.md", "mtpkern/assets/smollm2/README.md")
# Versions, the size of a file, an answer as it is printed, a setting.
NOT_MEASURED = {"README.md": ["3.10", "2.11", "5.17", "3.11", "6.88", "9.8"], "docs/performance.md": ["8,192"]}


@pytest.mark.parametrize("page", ["README.md", *PAGES, *CARDS])
def test_every_number_is_in_a_file_that_its_sentence_or_section_links_to(page):
    found = [line.partition(":")[0] for line in untraced(ROOT / page)]
    assert found == NOT_MEASURED.get(page, [])


def test_a_number_of_no_file_is_found(tmp_path):
    (tmp_path / "run.json").write_text(
        json.dumps({"rows": [{"ratio": 2.6448, "share": 0.8125, "us": 1941, "sample_ks": [2.65]}]})
    )
    (tmp_path / "run.md").write_text("# A run\n\n13.5 s\n")
    page = tmp_path / "page.md"
    link = "([run](run.md))"
    page.write_text(f"Took 13.5 s, 1,941 µs, 2.64 times, at 81.25 % {link}; `threshold=0.7`.\n\nAnd 2.65, not 42 %.\n")
    assert [line.partition(":")[0] for line in untraced(page)] == ["2.65", "42"]
    # A sentence with a link of its own has its numbers from there.
    (tmp_path / "other.md").write_text("# Another run\n\n7.5 s\n")
    page.write_text(f"Took 7.5 s ([other](other.md)), in the first run 13.5 s.\nThen 13.5 s. It was 13.5 s {link}.\n")
    assert [line.partition(":")[0] for line in untraced(page)] == ["13.5"]
    # Another section's link is not this one's, and a paper's figures are the paper's.
    page.write_text(f"## One\n\n13.5 {link}\n\n## Two\n\n13.5\n\n[theirs](https://arxiv.org/abs/1) 9.99\n")
    assert untraced(page) == ["13.5: 13.5"]


def test_confadapt_and_verified_lie_above_static_at_every_accuracy():
    """For each way of keeping all predictions, one of either kind that is right as often and brings more tokens."""
    ways = pareto(json.loads((readme.FIGURES.parent / "results.json").read_text())["figures"])
    static = [way for way in ways if way["kind"] == "static"]
    assert len(static) >= 4
    for way in static:
        for kind in ("confadapt", "verified"):
            above = [w for w in ways if w["kind"] == kind and w["accuracy"] >= way["accuracy"]]
            assert above, (kind, way["way"])
            assert max(w["tokens_per_pass"] for w in above) > way["tokens_per_pass"], (kind, way["way"])
