"""Rows: the lines of a JSONL file, read so that whatever a line holds is a row or a fault, and text with its BOS.

`mtpkern generate --file` and the training data read the same files by the same rules.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class BadRow(ValueError):
    """What is wrong with a row: a kind to count by, and the details."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def parse(text: str, expected: str = "a JSON object") -> Any:
    """What a JSON text says. Raises BadRow for all that is no JSON, and for what no tokenizer or file would take.

    parse('{"prompt": "1 + 1?"}')  # {"prompt": "1 + 1?"}
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except BadRow:
        raise
    except (ValueError, RecursionError) as error:
        reason = str(error).split(";")[0]  # a number of thousands of digits, or lists in lists in lists
        if isinstance(error, json.JSONDecodeError):
            reason = f"line {error.lineno}: {error.msg}" if error.lineno > 1 else error.msg
        raise BadRow("no JSON", f"expected {expected}, got {shown(text.strip())} ({reason})") from None
    # Only an escape can bring half a character into a string, and looking at every string takes time.
    if "\\ud" in text or "\\uD" in text:
        for part in strings(value):
            require_text(part)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRow("doubled field", f"expected each field once; got {shown(twice)} twice")
    return fields


def require_text(text: str) -> str:
    """The same text. Raises BadRow for half a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow("no Unicode", f"expected characters; got half a surrogate pair, {text[error.start]!r}") from None
    return text


def strings(value: Any) -> Iterator[str]:
    """Every string of a JSON value, names of fields included. Not by recursion, whose depth a row could exhaust."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            waiting += [*part.keys(), *part.values()]
        elif isinstance(part, (list, tuple)):
            waiting += part


def require_file(path: Path) -> None:
    """Raise FileNotFoundError or IsADirectoryError for what cannot be read as a file; a pipe can."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file, this is a folder")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The lines of a JSONL file that are not blank: number, from 1 on, and the value, or the BadRow that it is.

    Raises OSError for what is no file.

    next(read_lines(Path("prompts.jsonl")))  # (1, {"prompt": "1 + 1?"})
    """
    require_file(path)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row: Any
            try:
                # Some editors put a byte order mark in front.
                row = parse(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                got = shown(line.strip().decode(errors="replace"))
                reason = f"no UTF-8: byte {line[error.start]:#x} at {error.start}"
                row = BadRow("no UTF-8", f"expected a JSON object, got {got} ({reason})")
            except BadRow as fault:
                row = fault
            yield number, row


def shown(value: Any) -> str:
    """A value for a message: on one line, and not long."""
    try:
        text = value[:61] if isinstance(value, str) else value
        text = repr(text)
    except (RecursionError, ValueError):  # nested too deeply, or a number of thousands of digits
        return f"<{type(value).__name__}>"
    return text if len(text) <= 60 else f"{text[:57]}..."


def require_prompt(where: str, name: str, value: Any) -> None:
    """Raise ValueError, which begins with `where`, for a row's prompt without text, or messages that are none."""
    if name != "messages":
        if not isinstance(value, str) or not value:
            raise ValueError(f"{where}: {name} must be a string with text in it; got {shown(value)}")
        return
    if (
        not isinstance(value, list)
        or not value
        or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    ):
        raise ValueError(f'{where}: messages must be a list of {{"role": str, "content": str}}; got {shown(value)}')


def own_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text without the BOS in front that the tokenizer puts there itself: one that is brought along is enough.

    own_bos(tokenizer, "<s>Hello")  # "Hello" where tokenizer("Hello") begins with <s>, else "<s>Hello"
    """
    bos = tokenizer.bos_token
    if not bos or not text.startswith(bos) or tokenizer("").input_ids[:1] != [tokenizer.bos_token_id]:
        return text
    return text.removeprefix(bos)
