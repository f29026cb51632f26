"""What README.md and CONTRIBUTING.md tell a reader to type works: snippets run, commands and options exist."""

import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


COMMANDS = [line for text in (README, CONTRIBUTING) for block in blocks(text, "sh") for line in block.splitlines()]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def check_command(command: str) -> None:
    """Raise AssertionError where a shell command of the text names what does not exist."""
    words = shlex.split(command)
    if words[0] == "make":
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
    ["make demonstration", "mtpkern solve", "mtpkern demo --page x", "python -m mtpkern.train.nothing", "rm x"],
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


def test_no_figure_is_missing():
    assert "FIGURE" not in README
