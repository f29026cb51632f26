"""What README.md and CONTRIBUTING.md tell a reader to type works: snippets run, commands and options exist."""

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

from mtpkern.cli import main
from mtpkern.train.options import parse

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


COMMANDS = [line for text in (README, CONTRIBUTING) for block in blocks(text, "sh") for line in block.splitlines()]

(CONFIGURATION,) = blocks(README, "yaml")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def check_training(words: list[str]) -> None:
    """Raise AssertionError where the configuration or a flag of `mtpkern train` is none."""
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "my.yaml"
        own.write_text(CONFIGURATION)
        try:
            parse([*(str(own) if word == own.name else word for word in words), "--use-cpu"])
        except (ValueError, OSError) as error:
            raise AssertionError(f"{words}: {error}") from error


def check_command(command: str) -> None:
    """Raise AssertionError where a shell command of the text names what does not exist."""
    words = shlex.split(command)
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
        result = run(sys.executable, "-m", "mtpkern.cli", words[1], "--help")
        assert result.returncode == 0, result.stderr
        offered = set(re.findall(r"--[a-z][a-z-]*", result.stdout))
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= offered, command
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
        "rm x",
    ],
)
def test_a_wrong_command_is_found(command):
    with pytest.raises(AssertionError):
        check_command(command)


def test_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"mtpkern\[(\w+)\]", README + CONTRIBUTING)) <= set(extras)


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README + CONTRIBUTING)
    assert not [link for link in links if not (ROOT / link).exists()]


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


def test_snippets_run_and_print_what_the_readme_shows(monkeypatch):
    """All Python blocks in order, in one namespace, from the clone's root; the first one's output is shown below it."""
    monkeypatch.chdir(ROOT)
    namespace: dict[str, object] = {}
    printed = []
    for snippet in blocks(README, "python"):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(snippet, "README.md", "exec"), namespace)
        printed.append(output.getvalue())
    (shown,) = blocks(README, "text")
    assert printed[0] == shown


def test_the_configuration_trains(tmp_path, monkeypatch):
    (tmp_path / "my.yaml").write_text(CONFIGURATION)
    (row,) = blocks(README, "json")
    (tmp_path / "my.jsonl").write_text(row)
    (tmp_path / "mtpkern").symlink_to(ROOT / "mtpkern")
    monkeypatch.chdir(tmp_path)
    (command,) = (line for line in COMMANDS if line.startswith("mtpkern train my.yaml"))
    assert main([*shlex.split(command)[1:], "--max-steps", "3", "--use-cpu"]) == 0
    saved = json.loads((tmp_path / "runs/mine/config.json").read_text())
    assert saved["mtpkern"]["k_max"] == 12


def test_no_figure_is_missing():
    assert "FIGURE" not in README
