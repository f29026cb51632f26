"""What leaves the program: files that appear whole, and text that cannot steer the terminal it is shown in."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

# Control characters of ASCII and of Latin-1 but tab and newline, marks that reorder text, other line ends, and halves
# of surrogate pairs, which no encoding takes. All are below U+10000.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with control characters as escapes, so that showing it moves no cursor and hides nothing.

    printable("\\x1b[2J two\\r\\n")  # the escapes in letters: \\x1b[2J two\\r, then a newline
    """
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def exit_status(main: Callable[[], int | None]) -> int:
    """What `main` returns, 0 for None; 130 after an interrupt, which it says, 141 where a pipe's reader has left.

    sys.exit(exit_status(main))
    """
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Else Python would complain once more when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return status or 0


def first_line(error: BaseException) -> str:
    """What kind of error it is, and the first line of what it says: `first_line(ValueError("a\\nb"))`."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def json_line(value: Any) -> str:
    """The value as JSON in one line, readable, with control characters as escapes: parsed, it is the same value."""
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A text file that appears at `path` complete or not at all.

    A link is followed, and what it points to is written. A device or a pipe, which cannot appear whole, is written
    directly, and so is what stdout or stderr already goes to. An existing file keeps its mode, its owner and its other
    names. Raises OSError at once, before anything is written, where the place cannot be written.

        with whole_file(Path("out.jsonl")) as out:
            out.write("...")
    """
    try:
        there = path.stat()
    except FileNotFoundError:
        there = None
    stream = None if there is None else _standard_stream(there)
    if stream is not None or (there is not None and (stat.S_ISCHR(there.st_mode) or stat.S_ISFIFO(there.st_mode))):
        with open(path if stream is None else os.dup(stream), "w", encoding="utf-8") as file:
            yield file
        return
    if there is not None and not stat.S_ISREG(there.st_mode):
        what = "a folder" if stat.S_ISDIR(there.st_mode) else "neither a file nor a pipe"
        raise OSError(f"{path}: expected a file to write to, this is {what}; give another name")
    if there is not None and not os.access(path, os.W_OK):
        raise PermissionError(f"{path}: this file may not be written; give another name or change its mode")
    target = path.resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {target.parent}; make it first")
    try:
        descriptor, name = tempfile.mkstemp(prefix=".mtpkern-", dir=target.parent)
    except OSError as error:
        raise type(error)(f"{path}: nothing can be written in {target.parent} ({error.strerror})") from None
    draft = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            yield file
        _put(draft, target, there)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """The text as a file that appears at `path` complete or not at all; see `whole_file`."""
    with whole_file(path) as out:
        out.write(text)


def _standard_stream(there: os.stat_result) -> int | None:
    """1 or 2, where that is what the program's stdout or stderr goes to (as /dev/stdout does); None for all else."""
    for stream in (1, 2):
        with suppress(OSError):  # it is closed
            if os.path.samestat(there, os.fstat(stream)):
                return stream
    return None


def _put(draft: Path, target: Path, there: os.stat_result | None) -> None:
    """The draft in the target's place, which keeps what others rely on: its mode, its owner, its other names."""
    if there is not None and (there.st_nlink > 1 or there.st_uid != draft.stat().st_uid):
        shutil.copyfile(draft, target)
        return
    if there is None:
        # The draft was made for its owner alone; a new file has what the umask leaves.
        mask = os.umask(0)
        os.umask(mask)
        draft.chmod(0o666 & ~mask)
    else:
        shutil.copymode(target, draft)
    draft.replace(target)
