"""Where a page's measured numbers come from: each stands in a file that its own sentence links to, or its section.

A sentence, or a table's row, that links to pages of its own has its numbers from these; others have them from any that
their section links to.

A number is one with decimals, thousands or a percent sign, outside of code, of tables that bench/readme.py writes, and
of paragraphs that cite a paper's address. It may be rounded, and a share said in percent. JSON beside a page counts as
the page, and so do all files of results beside a folder's README.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

_NUMBER = re.compile(r"(?<![\w.,:@-])(\d{1,3}(?:,\d{3})+|\d+\.\d+|\d+(?= ?%))(?![\d]|\.\d)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
# Behind it another begins; a row of a table is one, too.
_SENTENCE = re.compile(r"(?<=[.:;])\s+(?=[A-Z*`\[\"])|\n(?=[|*-])")
_DECIMAL = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.]*\.\d)")
_BESIDE = (".json", ".jsonl", ".txt", ".csv")
_READ = (".md", ".py", ".yaml", *_BESIDE)
_UNREAD = re.compile(r"```.*?```|<!-- results: .*?<!-- end of results -->|`[^`\n]*`", re.DOTALL)


def untraced(page: Path) -> list[str]:
    """The numbers of a page that no file has which they are to come from, each with the beginning of its sentence.

    untraced(Path("docs/performance.md"))
    """
    missing = []
    for section in re.split(r"^(?=#)", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        of_section = _linked(page, section)
        for block in re.split(r"\n\n+", _UNREAD.sub(" ", section)):
            if "arxiv.org" in block:
                continue
            for sentence in _SENTENCE.split(block):
                files = [file for file in _linked(page, sentence) if file.suffix != ".py"] or of_section
                said = re.sub(r"\]\([^)]*\)", "]", sentence)
                for number in _NUMBER.findall(said):
                    if not any(_has(file.resolve(), number) for file in files):
                        missing.append(f"{number}: {' '.join(said.split())[:60]}")
    return missing


def _linked(page: Path, text: str) -> list[Path]:
    """The files that a part of a page links to and numbers may come from."""
    links = [link.partition("#")[0] for link in _LINK.findall(text)]
    files = [page.parent / link for link in links if link and "://" not in link]
    files = [file for file in files if file.suffix in _READ and file.is_file()]
    for readme in [file for file in files if file.name == "README.md"]:
        files += [file for file in sorted(readme.parent.iterdir()) if file.suffix in _BESIDE]
    return files


def _has(file: Path, number: str) -> bool:
    text, values = _read(file)
    plain = number.replace(",", "")
    if any(re.search(rf"(?<![\d.,]){re.escape(form)}(?![\d]|[.,]\d)", text) for form in {number, plain}):
        return True
    digits = len(plain.partition(".")[2])
    # Of whole numbers of two digits one is always near.
    if not digits and len(plain) < 3:
        return False
    return any(f"{value:.{digits}f}" == plain for value in values)


@cache
def _read(file: Path) -> tuple[str, frozenset[float]]:
    """A file's text, and its decimals, or the numbers of the JSON beside it, as they are and in percent."""
    text, beside = file.read_text(encoding="utf-8"), file.with_suffix(".json")
    numbers = set(map(float, _DECIMAL.findall(text)))
    if beside.is_file():
        numbers |= set(_numbers(json.loads(beside.read_text(encoding="utf-8"))))
    return text, frozenset(numbers | {100 * x for x in numbers})


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        # A figure is a sum or a mean; among a hundred prompts' own k any number is found.
        value = [part for name, part in value.items() if name != "sample_ks"]
    if isinstance(value, list):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)
