"""`mtpkern bench`: the list, a benchmark by its name, and two commits side by side."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from mtpkern.bench import command
from mtpkern.cli import main

FOLDER = Path(command.__file__).parent


def test_every_benchmark_is_listed(capsys):
    programs = {p.stem for p in FOLDER.glob("*.py") if '__name__ == "__main__"' in p.read_text()}
    programs -= {"problems", "readme", "speed_bench"}  # they measure nothing
    listed = [name for names in command.GROUPS.values() for name in names]
    assert sorted(listed) == sorted(programs)
    assert main(["bench", "list"]) == 0
    out = capsys.readouterr().out
    for name in listed:
        assert re.search(rf"^  {name} +\S+", out, re.MULTILINE)


def test_arguments_are_handed_on(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "readout", "--help"])
    assert ended.value.code == 0
    assert "python -m mtpkern.bench.readout" in capsys.readouterr().out


def results(ms, commit):
    records = [{"R": 1, "ms": {"ours": ms}}, {"R": 2, "ms": {"ours": 2 * ms}}]
    tables = [
        {"caption": "Readout", "rows": [["a row"], ["two"]], "records": records},
        {"caption": f"only in {commit}", "rows": [["x"]], "records": [{"ms": 1.0}]},
    ]
    return {"environment": {"commit": commit, "hardware": "none", "seed": "0"}, "tables": tables}


def test_two_commits_side_by_side(monkeypatch, capsys):
    ran = []

    def run(tree, name, arguments, folder):
        side = "this" if tree == command.ROOT else "base"
        ran.append((side, name, arguments))
        assert (tree / "mtpkern").is_dir()
        return results({"base": 4.0, "this": 2.0}[side] + len(ran) / 100, side)

    monkeypatch.setattr(command, "_run", run)
    assert main(["bench", "--base", "HEAD", "--rounds", "2", "readout", "--quick"]) == 0
    assert [side for side, *_ in ran] == ["base", "this", "this", "base"]
    assert ran[0][1:] == ("readout", ["--quick"])
    out = capsys.readouterr().out
    assert "- hardware: none" in out
    # The least of each side's rounds; shapes, and tables of one side only, are not compared.
    assert "| Readout: a row, ms.ours | 4.01 | 2.02 | 0.504 |" in out
    assert "R |" not in out
    assert "only in" not in out


def test_rows_are_told_apart_by_as_many_cells_as_it_takes():
    """A batch stands in several rows, of which none may speak for the others."""

    def of(*rows):
        table = {"caption": "A", "rows": [row for row, _ in rows], "records": [{"us": us} for _, us in rows]}
        return [{"tables": [table]}]

    rows = [["1", "64", "x"], ["1", "128", "x"], ["2", "64", "x"]]
    base, this = of(*zip(rows, (8.0, 2.0, 4.0))), of(*zip(rows, (4.0, 2.0, 8.0)))
    assert command.compared(base, this) == [
        ("A: 1, 64, us", "8", "4", "0.500"),
        ("A: 1, 128, us", "2", "2", "1.000"),
        ("A: 2, 64, us", "4", "8", "2.000"),
    ]


def test_what_cannot_be_compared(capsys, monkeypatch):
    for name in ("decode", "real", "preflight", "aot"):
        assert main(["bench", "--base", "HEAD", name]) == 2
        assert f"{name} writes no tables" in capsys.readouterr().err
    assert main(["bench", "--base", "no-such-ref", "readout"]) == 2
    assert "--base no-such-ref: git has no worktree of it" in capsys.readouterr().err
    assert main(["bench", "--base", "HEAD", "readout", "--results", "x"]) == 2
    assert "leave it out" in capsys.readouterr().err
    for words, says in (
        (["--base", "HEAD"], "name one of"),
        (["--rounds", "2", "readout"], "with --base"),
        (["--base", "HEAD", "--rounds", "0", "readout"], "at least 1; got 0"),
    ):
        assert main(["bench", *words]) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(ValueError, match="no figures in common"):
        command.compared([results(1.0, "a") | {"tables": []}], [results(1.0, "b")])


def test_assisted_generation_writes_the_same_tokens():
    """Ours and theirs, on a CPU in a rehearsal; comparators are named where they are missing."""
    from mtpkern.bench import assisted
    from mtpkern.bench.report import COMPARATORS, environment

    *_, table = assisted.measure(torch.device("cpu"), True)
    assert [row[1] for row in table.rows] == ["2 of 2"] * 5
    for way in ("prompt lookup", "assisted by"):
        assert any(way in row[0] for row in table.rows)
    facts = environment(torch.device("cpu"))
    assert all(facts[name] for name in COMPARATORS)


@pytest.mark.parametrize("status", [0, 1])
def test_a_tree_is_run_as_a_package_of_its_own(tmp_path, monkeypatch, status):
    """Its process sees that tree's rooms as mtpkern, and works where no clone's folders are looked at first."""

    def run(words, *, cwd, env, stdout):
        assert words[1:3] == ["-m", "mtpkern.bench.readout"]
        package = Path(env["PYTHONPATH"]) / "mtpkern"
        assert (package / "bench").resolve() == command.ROOT / "bench"
        assert (package / "cli.py").resolve() == command.ROOT / "mtpkern/cli.py"
        assert cwd == Path(words[words.index("--results") + 1]) == tmp_path
        (tmp_path / "readout.json").write_text(json.dumps(results(1.0, "this")))
        return subprocess.CompletedProcess(words, status)

    monkeypatch.setattr(command.subprocess, "run", run)
    if status:
        with pytest.raises(ValueError, match="ended with 1"):
            command._run(command.ROOT, "readout", ["--quick"], tmp_path)
    else:
        assert command._run(command.ROOT, "readout", ["--quick"], tmp_path) == results(1.0, "this")


@pytest.mark.parametrize("name", ["readout", "decode", "real", "throughput", "preflight"])
def test_a_device_that_is_not_here_is_named(name, capsys):
    assert main(["bench", name, "--device", "cuda:77"]) == 2
    assert "--device cuda:77: torch finds no such device here" in capsys.readouterr().err
