"""The pages in docs: the tutorial runs as it stands, links lead somewhere, README's tables are those of the results."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import mtpkern
from mtpkern.bench import readme
from mtpkern.cli import main
from support.pages import fenced

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "arguments",
    "figures/README",
    "log",
    "models",
    "paper",
    "performance",
    "quality",
    "serving",
    "strategies",
    "training",
    "trl",
    "tutorial",
)


@pytest.mark.slow("readme::test_the_readme_in_an_empty_folder")
def test_the_tutorial_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/tutorial.md").read_text()
    (configuration,) = fenced(text, "yaml")
    Path("tutorial.yaml").write_text(configuration)
    ran = 0
    for line in "".join(fenced(text, "sh")).splitlines():
        words = [word.replace("$MODEL", str(mtpkern.ASSETS)) for word in shlex.split(line)]
        if words[0] == "mtpkern":
            assert main(words[1:]) == 0, (line, capsys.readouterr().err)
            ran += 1
        elif words[0] == "head":
            lines = (mtpkern.ASSETS / "problems.jsonl").read_text().splitlines()[: int(words[2])]
            Path(words[-1]).write_text("\n".join(lines) + "\n")
        else:
            assert line.startswith("MODEL=$(python -c "), line
    assert ran == 5
    found = json.loads(Path("runs/eval/results.json").read_text())["figures"]
    # However short the training was.
    assert found["verified_4_0.2"]["identical_to_original"] == 1
    assert Path("runs/eval/pareto.png").exists()
    card = Path("runs/tutorial/README.md").read_text()
    assert "mtpkern train tutorial.yaml --model" in card
    assert "## Measured: prompts.jsonl" in card
    assert f"| verified_4_0.2 | {found['verified_4_0.2']['accuracy']:.2%}" in card
    assert '<p class="blocks">' in Path("blocks.html").read_text()
    (code,) = fenced(text, "python")
    capsys.readouterr()
    exec(code, {})
    assert "Answer:" in capsys.readouterr().out


def test_the_serving_pages_programs_run_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(mtpkern.ASSETS, "path/to/checkpoint", ignore=shutil.ignore_patterns("smollm2", "custom_generate"))
    programs = [code for code in fenced((ROOT / "docs/serving.md").read_text(), "python") if "openai" not in code]
    assert len(programs) == 3
    for code in programs:
        exec(code, {})
    answers = capsys.readouterr().out
    assert answers.count("####") == 8
    assert Path("path/to/checkpoint/custom_generate/generate.py").exists()


def anchors(page: Path) -> set[str]:
    """What a link into a page may name: its headings as GitHub writes them, and marks of its own."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    made = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return made | set(re.findall(r'<a id="([\w-]+)">', text))


def astray(page: Path) -> list[str]:
    """The links of a page to files or headings that are not there."""
    links = re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text())
    wrong = []
    for link in links:
        name, _, anchor = link.partition("#")
        there = page.parent / name if name else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            wrong.append(link)
    return wrong


def test_links_lead_somewhere(tmp_path):
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / f"docs/{page}.md" for page in PAGES)]:
        assert not astray(page), page
    (tmp_path / "page.md").write_text("# One `word`, two\n[a](#one-word-two) [b](#two) [c](page.md#one) [d](none.md)\n")
    assert astray(tmp_path / "page.md") == ["#two", "page.md#one", "none.md"]


def test_each_entry_of_the_log_begins_with_its_conclusion():
    """One bold line of at most 200 characters behind the heading, the same that the contents show."""
    contents, *entries = re.split(r"^(?=## \d{4}-)", (ROOT / "docs/log.md").read_text(), flags=re.MULTILINE)
    shown = re.findall(r"^\| (\d\d-\d\d) \| \[(.+)\]\(#.+\) \| (.+) \|$", contents, re.MULTILINE)
    found = []
    for entry in entries:
        match = re.match(r"## \d{4}-(\d\d-\d\d) (.+)\n\n\*\*(.{1,200})\*\*\n", entry)
        assert match, entry[:80]
        found.append(match.groups())
    assert found == shown


def test_readmes_tables_are_those_of_the_results():
    assert readme.main(["--check"]) == 0, f"run: {readme.COMMAND}"
    text = "".join(
        page.read_text() for page in (readme.README, readme.FIGURES, readme.PERFORMANCE, readme.QUALITY, *readme.CARDS)
    )
    assert set(re.findall(r"<!-- results: (\w+) -->", text)) == set(readme.TABLES)


def test_a_table_that_differs_is_found_and_mended(tmp_path, monkeypatch, capsys):
    text = readme.README.read_text()
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    wrong = re.sub(r"\S+ \|\n<!-- end", "0.99 |\n<!-- end", text, count=1)
    assert wrong != text
    readme.README.write_text(wrong)
    assert readme.main(["--check"]) == 1
    assert readme.COMMAND in capsys.readouterr().err
    assert readme.main([]) == 0
    assert readme.README.read_text() == text
    with pytest.raises(ValueError, match="README asks for results 'nothing'"):
        readme.rewritten("<!-- results: nothing -->\n<!-- end of results -->")
