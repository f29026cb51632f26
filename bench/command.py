"""`mtpkern bench`: one entry to what this folder measures; `mtpkern bench NAME --help` has each one's own options.

With `--base REF` the same benchmark runs in another commit as well, in a worktree of its own and in turns with this
tree's, and every figure of the tables stands beside that of the base.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtpkern.bench.gpu import link
from mtpkern.bench.report import grid
from mtpkern.output import printable

ROOT = Path(__file__).resolve().parents[1]

GROUPS = {
    "ops": ("readout", "decode_attention", "span_attention", "linear", "packed", "gated_lora", "distill"),
    "step": ("gated_step", "compiled", "launches", "train_step"),
    "generation": ("decode", "call", "real", "throughput", "engine", "newcomers", "token_by_token", "assisted"),
    "all of it": ("preflight", "gpu", "aot"),
}
_NAMES = [name for names in GROUPS.values() for name in names]
_WITHOUT_TABLES = ("decode", "real", "preflight", "aot")


def listing() -> str:
    """A line for each benchmark: what its file says of it."""
    lines = []
    for group, names in GROUPS.items():
        lines.append(f"{group}:")
        for name in names:
            source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
            said = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0].replace("\n", " ")
            lines.append(f"  {name:<18}{said}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """The command line. Raises ValueError for what cannot be compared; ends as the benchmark itself does.

    main(["readout", "--device", "cpu"])
    """
    said = "Runs a benchmark; what follows its name are its own options."
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("mtpkern bench", description=said, epilog=listing(), formatter_class=as_it_is)
    parser.add_argument("--base", metavar="REF", help="a commit to compare with, run in turns with this tree")
    parser.add_argument("--rounds", type=int, metavar="N", help="with --base: so many turns (default 1)")
    parser.add_argument("name", nargs="?", choices=["list", *_NAMES], default="list", metavar="NAME")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="of the benchmark")
    args = parser.parse_args(argv)
    if args.base is not None and args.name == "list":
        raise ValueError("--base compares a benchmark with that of another commit; name one of mtpkern bench list")
    if args.rounds is not None and (args.base is None or args.rounds < 1):
        raise ValueError(f"--rounds is the number of turns with --base, at least 1; got {args.rounds}")
    if args.name == "list":
        print(listing())
    elif args.base is not None:
        _against(args.base, args.name, args.arguments, args.rounds or 1)
    else:
        sys.argv = [f"mtpkern.bench.{args.name}", *args.arguments]
        runpy.run_module(f"mtpkern.bench.{args.name}", run_name="__main__", alter_sys=True)


def _against(ref: str, name: str, arguments: Sequence[str], rounds: int) -> None:
    if name in _WITHOUT_TABLES:
        raise ValueError(f"--base: {name} writes no tables of figures that could be compared; run it by itself")
    if "--results" in arguments:
        raise ValueError("--results: with --base the figures of both trees are compared and not kept; leave it out")
    with tempfile.TemporaryDirectory(prefix="mtpkern-bench-") as work, worktree(ref, Path(work) / "base") as tree:
        trees = {"base": tree, "this": ROOT}
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in trees}
        for i in range(rounds):
            # In turns, and each round in the other order.
            for side in list(trees)[:: 1 if i % 2 == 0 else -1]:
                found[side].append(_run(trees[side], name, arguments, Path(work) / f"{side}-{i}"))
        facts = found["this"][0]["environment"]
        print(f"# {name}, this tree ({facts['commit']}) against {ref} ({found['base'][0]['environment']['commit']})\n")
        print("".join(f"- {key}: {value}\n" for key, value in facts.items() if key != "commit"))
        print(grid(("figure", "base", "this", "this / base"), compared(found["base"], found["this"])))


@contextmanager
def worktree(ref: str, folder: Path) -> Iterator[Path]:
    """Another commit's tree, which goes again. Raises ValueError for a ref that git does not know."""
    git = ["git", "-C", str(ROOT)]
    made = subprocess.run([*git, "worktree", "add", "--detach", str(folder), ref], capture_output=True, text=True)
    if made.returncode:
        raise ValueError(f"--base {ref}: git has no worktree of it: {printable(made.stderr.strip())}")
    try:
        yield folder
    finally:
        subprocess.run([*git, "worktree", "remove", "--force", str(folder)], capture_output=True)


def _run(tree: Path, name: str, arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run a benchmark of a tree, and return its results. Raises ValueError where it fails or writes none."""
    links = link(folder / "links", tree)
    words = [sys.executable, "-m", f"mtpkern.bench.{name}", *arguments, "--results", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(links)}
    # Elsewhere than in a clone, whose folders would be looked at first.
    done = subprocess.run(words, cwd=folder, env=environment, stdout=sys.stderr)
    results = folder / f"{name}.json"
    if done.returncode or not results.is_file():
        ended = f"{shlex.join(words[1:])} ended with {done.returncode}"
        raise ValueError(f"{tree}: {ended}, and no {results.name} to compare")
    return dict(json.loads(results.read_text(encoding="utf-8")))


def compared(base: Sequence[Mapping[str, Any]], this: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each figure that the tables of both have: its least over the rounds on either side, and their ratio.

    Raises ValueError where they have none in common.
    """
    there, here = _figures(base), _figures(this)
    both = ((name, there[name], here[name]) for name in here if there.get(name))
    rows: list[tuple[str, ...]] = [(name, f"{a:.4g}", f"{b:.4g}", f"{b / a:.3f}") for name, a, b in both]
    if not rows:
        raise ValueError("the results have no figures in common: nothing to compare")
    return rows


def _figures(rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for results in rounds:
        for table in results.get("tables", ()):
            for row, record in zip(_names(table["rows"]), table["records"]):
                for key, value in _numbers(record):
                    name = f"{table['caption']}: {row}, {key}"
                    found[name] = min(value, found.get(name, value))
    return found


def _names(rows: Sequence[Sequence[str]]) -> list[str]:
    """Of each row the first cells, as many as tell the rows of a table apart: a batch alone does not, say."""
    most = max(map(len, rows), default=0)
    names: list[str] = []
    for n in range(1, most + 1):
        names = [", ".join(row[:n]) for row in rows]
        if len(set(names)) == len(names):
            break
    return names


def _numbers(record: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The measured numbers of a record by their path: floats; whole numbers are shapes."""
    if isinstance(record, Mapping):
        for key, value in record.items():
            yield from _numbers(value, f"{name}.{key}" if name else str(key))
    elif isinstance(record, float):
        yield name, record
