"""What README.md, CONTRIBUTING.md and docs tell a reader to type works: snippets run, commands and options exist."""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tomllib

import mtpkern
from mtpkern.cli import main
from mtpkern.grading import is_right
from mtpkern.model import TESTED
from mtpkern.train.options import parse
from support.pages import fenced

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
TRAINING = (ROOT / "docs/training.md").read_text()
OTHERS = [(ROOT / f"docs/{name}.md").read_text() for name in ("quality", "performance", "figures/README")]

EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])

COMMANDS = [
    line
    for text in (README, CONTRIBUTING, TRAINING, *OTHERS)
    for block in fenced(text, "sh")
    for line in block.splitlines()
]

(GATED,), (FULL,) = fenced(README, "yaml"), fenced(TRAINING, "yaml")
CONFIGURATIONS = {"my.yaml": GATED, "full.yaml": FULL}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def check_training(words: list[str]) -> None:
    """Raise AssertionError where the configuration or a flag of `mtpkern train` is none."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in CONFIGURATIONS.items():
            (Path(folder) / name).write_text("model: m\n" + text)
        places = {word: ROOT / word for word in words if word.endswith(".yaml")}
        places |= {name: Path(folder) / name for name in CONFIGURATIONS}
        try:
            parse([*(str(places.get(word, word)) for word in words), "--use-cpu"])
        except (ValueError, OSError) as error:
            raise AssertionError(f"{words}: {error}") from error


def check_command(command: str) -> None:
    """Raise AssertionError where a shell command of the text names what does not exist."""
    words = shlex.split(re.sub(r"^\w+=\$\((.*)\)$", r"\1", command))
    if words[0] == "torchrun" or words[:2] == ["accelerate", "launch"]:
        at = words.index("-m")
        assert words[at + 1] == "mtpkern.train", command
        words = ["mtpkern", "train", *words[at + 2 :]]
    if words[:2] == ["mtpkern", "train"]:
        check_training(words[2:])
    elif words[0] == "make":
        result = run("make", "--dry-run", *words[1:])
        assert result.returncode == 0, result.stderr
    elif words[0] == "mtpkern":
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
            try:
                status = main([*words[1 : 3 if words[1] == "bench" else 2], "--help"])
            except SystemExit as end:
                status = end.code
        assert status in (0, None), said.getvalue()
        offered = set(re.findall(r"--[a-z][a-z-]*", said.getvalue()))
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= offered, command
    elif words[:2] == ["git", "clone"]:
        assert words[-1] != "mtpkern", "in the folder that holds it Python would take it for the package"
    elif words[0] in ("cd", ".") or words[:3] == ["python3", "-m", "venv"]:
        pass
    elif words[:2] == ["pip", "install"]:
        place, _, extras = words[-1].partition("[")
        assert [*words[2:-1], place] == ["-e", "."], command
        assert set(filter(None, extras.rstrip("]").split(","))) <= EXTRAS, command
    elif words[:2] == ["python", "-c"]:
        assert run(sys.executable, *words[1:]).returncode == 0, command
    elif words[0] == "head":
        pass  # it runs below
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]), command
    else:
        raise AssertionError(f"no check for {command!r}")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command):
    check_command(command)


@pytest.mark.parametrize(
    "command",
    [
        "mtpkern train gsm8k --output-folder x",
        "torchrun -m mtpkern.train gsm9k",
        "accelerate launch -m mtpkern.demo",
        "make demonstration",
        "mtpkern solve",
        "mtpkern demo --page x",
        "python -m mtpkern.train.nothing",
        'X=$(python -c "import mtpkern; print(mtpkern.ASSET)")',
        "pip install mtpkern",
        "git clone x mtpkern",
        "pip install -e '.[trian]'",
        "rm x",
    ],
)
def test_a_wrong_command_is_found(command):
    with pytest.raises(AssertionError):
        check_command(command)


def test_extras_exist():
    named = re.findall(r"'\.\[([\w,]+)\]'", README + CONTRIBUTING)
    assert {"train", "plot", "smollm2"} <= {name for names in named for name in names.split(",")} <= EXTRAS
    # Nothing of that name is to be had from PyPI.
    assert not re.findall(r"pip install '?mtpkern", README + CONTRIBUTING)


def test_as_many_architectures_are_tested_as_it_says():
    assert re.findall(r"tests hold that for (\d+) architectures", README) == [str(len(TESTED))]


def test_what_ci_runs_is_what_contributing_says():
    runs = re.findall(r"^make .*$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert len(runs) == 4
    (line,) = (line for line in CONTRIBUTING.splitlines() if line.startswith("`.ci/run` runs"))
    assert [part for part in re.findall(r"`(make [^`]*)`", line) if part != "make fmt"][:4] == runs


def test_the_papers_table_names_what_exists():
    """Every row of docs/paper.md ends in functions and tests; each is found where the row says it is."""
    rooms = ("mtpkern", "kernels", "train")
    sources = "\n".join(path.read_text() for room in rooms for path in ROOT.glob(f"{room}/*.py"))
    rows = [line for line in (ROOT / "docs/paper.md").read_text().splitlines() if re.match(r"\| .*`", line)]
    assert len(rows) > 30
    for row in rows:
        *_, functions, tests = row.strip("| ").split(" | ")
        file = ""
        for name in re.findall(r"`([^`]+)`", tests):
            file = name.partition("::")[0] if "::" in name else file
            text = (ROOT / f"tests/test_{file}").read_text()
            assert f"def {name.rpartition('::')[2]}(" in text, f"{name} in {row}"
        assert file, row
        for name in re.findall(r"`([\w.]+)`", functions):
            last = name.rpartition(".")[2]
            is_module = any((ROOT / room / f"{last}.py").exists() for room in rooms)
            assert is_module or re.search(rf"^ *(def|class) {last}\b|^    {last}: ", sources, re.MULTILINE), (name, row)


def walk(page: str, folder: Path) -> list[tuple[str, str]]:
    """Every block of a page from top to bottom, in a folder: what stands in it, and what was printed before.

    Python runs in one namespace; of the shell what decodes, trains on the reader's own file, or makes files for that.
    """
    namespace: dict[str, object] = {}
    shown, printed = [], ""
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE):
        if language == "text":
            shown.append((block, printed))
        elif language == "json":
            (folder / "my.jsonl").write_text(block)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            if language == "python":
                exec(compile(block, "a page", "exec"), namespace)
            for line in block.splitlines() if language == "sh" else ():
                line = line.replace("$MODEL", str(mtpkern.ASSETS))
                if line.startswith(("mtpkern generate", "mtpkern train my.yaml", "mtpkern train full.yaml")):
                    brief = ["--max-steps", "2", "--use-cpu"] if line.startswith("mtpkern train") else []
                    assert main([*shlex.split(line)[1:], *brief]) == 0, line
                elif line.startswith("head"):
                    subprocess.run(line, shell=True, check=True, cwd=folder)
        printed = output.getvalue()
    return shown


def bare(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines()]


def test_the_readme_in_an_empty_folder(tmp_path, monkeypatch):
    """It runs there, prints what it shows, and what it shows is right."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(GATED)
    shown = walk(README, tmp_path)
    assert len(shown) == 2
    for text, printed in shown:
        assert bare(text) == bare(printed)
    assert "35 + 16 = 51" in shown[0][0]
    assert "#### 51" in shown[0][0]
    assert "41 + 20 = 61" in shown[1][0].replace("|", "")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    right = [is_right(answer["text"], f"#### {answer['result']}") for answer in answers]
    assert len(right) == 10
    assert sum(right) >= 9
    assert (tmp_path / "runs/gated/adapter_config.json").exists()


def test_the_page_on_training_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full.yaml").write_text(FULL)
    walk(TRAINING, tmp_path)
    for name in ("mine", "library"):
        assert json.loads((tmp_path / f"runs/{name}/config.json").read_text())["mtpkern"]["k_max"] == 12


def test_no_figure_is_missing():
    assert "FIGURE" not in README
