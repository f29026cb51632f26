"""Results on paper: one Markdown and one JSON file of the same name in bench/results/."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtpkern.bench.harness import as_json

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Table:
    """A caption, a note below it, column names and rows of text."""

    caption: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table as Markdown; the first column is aligned left, the others right."""
        lines = [self.header, ["---"] + ["---:"] * (len(self.header) - 1), *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"## {self.caption}\n\n{self.note}\n\n{table}\n"


def write(
    name: str, title: str, environment: Mapping[str, str], tables: Sequence[Table], data: object, folder: Path = RESULTS
) -> Path:
    """Write name.md and name.json to `folder` and return the path of the former.

    write("decode", "Decoding", environment(device), [table], {"accuracy": {...}})
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = "\n".join(f"- {key}: {value}" for key, value in environment.items())
    page = folder / f"{name}.md"
    page.write_text(f"# {title}\n\n{facts}\n\n" + "\n".join(t.markdown() for t in tables), encoding="utf-8")
    record = json.dumps({"environment": environment, **_fields(data)}, indent=1, default=as_json)
    (folder / f"{name}.json").write_text(record + "\n", encoding="utf-8")
    return page


def _fields(data: object) -> dict[str, object]:
    if not isinstance(data, Mapping):
        raise TypeError(f"data must be a mapping of named results, got {type(data).__name__}")
    return dict(data)
