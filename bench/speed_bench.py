"""SPEED-Bench for `mtpkern eval`: a JSONL file for each category. Its data may not be handed on, and so is not here.

    python -m mtpkern.bench.speed_bench runs/speed                       # from the hub, under its own licence
    python -m mtpkern.bench.speed_bench runs/speed --source qualitative.parquet
    mtpkern eval MODEL --data runs/speed/coding.jsonl --output runs/eval/coding

Some rows hold, instead of their text, a note that it is to be fetched from where it comes from: NVIDIA's own
preparation (Model-Optimizer, examples/specdec_bench) does that, and its files go in here as --source. A conversation's
first turn alone is asked: the later ones would stand behind answers of the model's own.

Source   arXiv 2604.09557; nvidia/SPEED-Bench: columns question_id, category, turns, multiturn
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtpkern.output import exit_status, json_line, printable, whole_file

NAME = "nvidia/SPEED-Bench"
CONFIGS = ("qualitative", *(f"throughput_{n}k" for n in (1, 2, 8, 16, 32)))
# How the note begins that stands for a text.
_MISSING = "FULL BENCHMARK DATA SHOULD BE FETCHED"
_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


def by_category(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the benchmark as `mtpkern eval` takes them, by category, as its file is named.

    Raises ValueError for rows without their text.

    by_category([{"question_id": "1", "category": "math", "turns": ["2 + 2?"]}])
    # {"math": [{"messages": [{"role": "user", "content": "2 + 2?"}], "id": "1", "turns": 1}]}
    """
    found: dict[str, list[dict[str, Any]]] = {}
    missing = 0
    for number, row in enumerate(rows, 1):
        lacking = [name for name in ("question_id", "category", "turns") if row.get(name) in (None, "", [])]
        if lacking:
            raise ValueError(f"row {number}: has no {', '.join(lacking)}; expected the columns of {NAME}")
        turns = list(row["turns"])
        if turns[0].startswith(_MISSING):
            missing += 1
            continue
        asked = {"messages": [{"role": "user", "content": turns[0]}], "id": row["question_id"], "turns": len(turns)}
        name = "".join(c if c.isalnum() else "_" for c in str(row["category"]))
        found.setdefault(name, []).append(asked)
    if missing:
        raise ValueError(
            f"{missing} rows hold a note instead of their text, which is to be fetched from its sources: run the "
            "preparation in NVIDIA's Model-Optimizer (examples/specdec_bench), and give its file as --source"
        )
    if not found:
        raise ValueError("there are no rows")
    return found


def read(config: str, source: Path | None) -> Iterable[Mapping[str, Any]]:
    """The rows of a file or, without one, of the hub."""
    try:
        import datasets
    except ImportError:
        raise ImportError("SPEED-Bench is read by datasets; run: pip install 'mtpkern[train]'") from None
    if source is not None and (source.suffix not in _READERS or not source.is_file()):
        raise ValueError(f"--source {source}: expected a .parquet or .jsonl file, there is none of that name")
    if source is None:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(NAME, config, split="test")
    else:
        rows = datasets.load_dataset(_READERS[source.suffix], data_files=str(source), split="train")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files and say what is in them."""
    parser = argparse.ArgumentParser(prog="python -m mtpkern.bench.speed_bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("output", type=Path, metavar="DIR", help="a JSONL file for each category goes there")
    parser.add_argument("--config", choices=CONFIGS, default=CONFIGS[0], help="of the hub's (default: qualitative)")
    parser.add_argument("--source", type=Path, metavar="FILE", help="a file with its rows, instead of the hub")
    args = parser.parse_args(argv)
    try:
        found = by_category(read(args.config, args.source))
    except (ValueError, OSError, ImportError) as error:
        print(f"speed_bench: {printable(str(error))}", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    for category, rows in sorted(found.items()):
        path = args.output / f"{category}.jsonl"
        with whole_file(path) as out:
            assert out is not None
            out.write("".join(json_line(row) + "\n" for row in rows))
        print(f"{printable(str(path))}: {len(rows)} prompts, {sum(row['turns'] > 1 for row in rows)} of conversations")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
