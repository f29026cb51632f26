"""docs/models.md says what the tests hold, and lists what the library lists."""

import re
from pathlib import Path

import pytest

from mtpkern import wrappers
from mtpkern.model import TESTED

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/models.md").read_text()
ROWS = re.findall(r"^\| (?!works|---)(.+?) \| (.+?) \| (.+?) \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_every_row_names_a_test_that_is_there(row: tuple[str, str, str]) -> None:
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", row[2])
    assert named
    for file, name in named:
        text = (ROOT / "tests" / file).read_text()
        assert not name or re.search(rf"^def {name}\(", text, re.MULTILINE), f"{file} has no {name}"


def row_of(begin: str) -> str:
    (what,) = (what for what, _, _ in ROWS if what.startswith(begin))
    return what


def test_it_lists_what_the_library_lists() -> None:
    assert len(ROWS) > 20
    assert set(row_of("llama").split(", ")) == TESTED
    assert set(re.findall(r"\b[A-Z][A-Z0-9_]+\b", row_of("those in the layers"))) == wrappers._ROW_WISE
