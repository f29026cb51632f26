"""Answers to a file of prompts, appended row by row: a run that was stopped goes on behind the last whole one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any, TextIO

from mtpkern.output import json_line, whole_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RESULT_FIELDS = ("text", "tokens", "blocks", "tokens_per_pass", "finished")


@contextmanager
def answers_file(
    path: Path, asked: Sequence[Mapping[str, Any]], options: Mapping[str, Any], *, overwrite: bool = False
) -> Iterator[tuple[int, TextIO]]:
    """How many of the rows `asked` have their answer at `path` already, and the file to which those of the others go.

    options    what decides the answers, by the names of a command's flags; kept beside the file, in `path`.options
    overwrite  begin anew, whatever is there

    The answers that are there must be to the first rows, field by field; half a line, of a run that was killed, is cut
    off. A pipe or a device holds none. Where no options are kept, nobody knows what wrote them. Raises ValueError for a
    file that holds anything else, that other options wrote, or that another run is writing, OSError for a place that
    cannot be written; all before anything is changed.

        with answers_file(Path("out.jsonl"), [{"prompt": "1 + 1?"}], {"--max-new-tokens": 256}) as (done, file):
            ...
    """
    if _is_no_file(path):
        with whole_file(path) as file:
            yield 0, file
        return
    kept = path.with_name(f"{path.name}.options")
    options = json.loads(json.dumps(options))
    with opened_alone(path) as file:
        try:
            done, size = (0, 0) if overwrite else _read(path, asked)
            if done and kept.is_file():
                before = json.loads(kept.read_text(encoding="utf-8"))
                changed = [name for name in {**before, **options} if before.get(name) != options.get(name)]
                if changed:
                    other = "; ".join(f"{name} {before.get(name)}, now {options.get(name)}" for name in changed)
                    raise ValueError(
                        f"{path} has {done} answers that other options wrote ({other}); give the same options, another "
                        "--output, or --overwrite to begin anew"
                    )
            if size < path.stat().st_size:
                os.truncate(path, size)
            if not done:
                with suppress(PermissionError):  # of the folder: the file itself may be written
                    kept.write_text(json_line(options) + "\n", encoding="utf-8")
            yield done, file
        finally:
            file.flush()
            if path.stat().st_size == 0:
                with suppress(PermissionError):  # Windows takes no file away that is open
                    kept.unlink(missing_ok=True)  # first: behind the other's end the next run begins
                    path.resolve().unlink()  # of a link what it points to: it stays for the next run


def _is_no_file(path: Path) -> bool:
    """Whether something else is there; in one look, as another run may take its file away."""
    with suppress(OSError):
        return not S_ISREG(path.stat().st_mode)
    return False


def opened_alone(path: Path) -> TextIO:
    """The file, to be written at its end, which no other run has; a file system may have no locks.

    It is made where it is missing, so that of several runs that begin at once one has it. Raises ValueError where
    another run has it, OSError where it cannot be written: `with opened_alone(Path("samples.jsonl")) as file: ...`.
    """
    tries = 0
    while True:
        tries += 1
        try:
            file = path.open("a", encoding="utf-8")
        except OSError as error:
            folder = Path(os.path.realpath(path)).parent
            says = f"nothing can be written in {folder} ({error.strerror})"
            if isinstance(error, PermissionError) and path.is_file():
                says = "this file may not be written; give another name or change its mode"
            elif not folder.exists():
                says = f"there is no folder {folder}; make it first"
            raise type(error)(f"{path}: {says}") from None
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(
                f"{path}: another run writes its answers there; wait for its end, or give another --output"
            ) from None
        except OSError:
            return file
        with suppress(FileNotFoundError):
            # Beyond a network the numbers of files may tell nothing.
            if tries == 100 or os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        # A run that has ended without answers took its file away between the two.
        file.close()


def _begins(half: bytes, asked: Mapping[str, Any]) -> bool:
    """Whether half a line, which may end inside a character, is the beginning of the answer to a row."""
    text, whole = half.decode(errors="ignore"), json_line(asked)[:-1]
    return whole.startswith(text) or text.startswith(whole)


def _read(path: Path, asked: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """How many whole lines there are, and their bytes. Raises ValueError for one that is no answer to its row."""
    done = size = 0
    with path.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n") and done < len(asked) and _begins(line, asked[done]):
                break
            try:
                row = json.loads(line)
                before = {name: value for name, value in row.items() if name not in RESULT_FIELDS}
                same = done < len(asked) and before == asked[done] and len(row) > len(before)
            except (ValueError, AttributeError):
                same = False
            if not same:
                raise ValueError(
                    f"{path}: line {done + 1} is no answer to row {done + 1} of the prompts, so this is no file of a "
                    "run that was stopped; give another --output, or remove it"
                )
            done += 1
            size += len(line)
    return done, size
