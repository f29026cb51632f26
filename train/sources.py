"""Sources: rows of files, folders and the hub, with the places where they stand.

Local files are read row by row rather than through Arrow, which refuses a file of mixed types without saying where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from mtpkern.loading import require_found
from mtpkern.rows import BadRow, parse, read_lines
from mtpkern.train.arguments import refuse

# Where a row stands ("problems.jsonl, line 3"), and the row, or what is wrong with it.
Located = tuple[str, Any]


def read_rows(
    source: Sequence[str], *, split: str = "train", subset: str | None = None, streaming: bool = False
) -> Iterator[Located]:
    """Rows with the places where they stand: of each source in turn, folders and hub ids through `datasets`.

    Raises FileNotFoundError for a file that is not there, ValueError for a file of another kind, a .json file that is
    no list and a .parquet file that is none.

        where, row = next(read_rows(["problems.jsonl"]))  # "problems.jsonl, line 1", {"question": ..., "answer": ...}
    """
    files = [Path(name) for name in source if Path(name).suffix in READERS]
    for path in files:
        # Before any is read: hours may lie between the first and the last.
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file")
    for name in source:
        path = Path(name)
        if path in files:
            yield from READERS[path.suffix](path)
        elif path.is_file():
            raise ValueError(f"{name}: a data file must be one of {', '.join(READERS)}, by its name")
        else:
            yield from _read_dataset(name, split, subset, streaming)


def _read_dataset(name: str, split: str, subset: str | None, streaming: bool) -> Iterator[Located]:
    require_found(name, "dataset")
    from datasets import load_dataset, load_from_disk

    # What `save_to_disk` has written, with a folder for each split where there are several.
    saved = Path(name, split) if Path(name, "dataset_dict.json").is_file() else Path(name)
    refuse(saved != Path(name) and not saved.exists(), f"{name} has no split {split!r}; name one that lies in it")
    try:
        if (saved / "state.json").is_file():
            rows = load_from_disk(str(saved))
        else:
            rows = load_dataset(name, subset, split=split, streaming=streaming)
        yield from ((f"{name}, row {number}", without_nulls(row)) for number, row in enumerate(rows, 1))
    except OSError as error:  # those of the hub have several lines and no name
        raise OSError(f"{name} cannot be read: {' '.join(str(error).split())}") from error


def _read_jsonl(path: Path) -> Iterator[Located]:
    yield from ((f"{path}, line {number}", row) for number, row in read_lines(path))


def _read_json(path: Path) -> Iterator[Located]:
    try:
        rows = parse(path.read_text(encoding="utf-8-sig"), "one JSON list of rows")
    except (BadRow, UnicodeDecodeError) as error:
        odd = f"expected UTF-8 text ({error}); convert it" if isinstance(error, UnicodeDecodeError) else error
        raise ValueError(f"{path}: {odd}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a JSON list of rows, got {type(rows).__name__}; for one a line use .jsonl")
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


def _read_parquet(path: Path) -> Iterator[Located]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches())
            for number, row in enumerate(rows, 1):
                yield f"{path}, row {number}", without_nulls(row)
    except (ArrowException, OSError, ValueError) as error:
        where = f" behind row {number}" if number else ""
        raise ValueError(f"{path}: no whole parquet file{where} ({error}); write it again") from None


def without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without the nulls inside its columns: Arrow gives every message the fields of all others."""

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: bare(x) for name, x in value.items() if x is not None}
        return [bare(x) for x in value] if isinstance(value, list) else value

    return {name: bare(value) for name, value in row.items()}


READERS: dict[str, Callable[[Path], Iterator[Located]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
