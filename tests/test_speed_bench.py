"""SPEED-Bench's rows as `mtpkern eval` takes them; the data itself is not here."""

import json

import pytest

from mtpkern.bench.speed_bench import main
from mtpkern.cases import read_cases

ROWS = [
    {"question_id": "a", "category": "coding", "turns": ["Write a loop.", "Now in C."], "multiturn": True},
    {"question_id": "b", "category": "role play", "turns": ["Be a pirate."], "multiturn": False},
    {"question_id": "c", "category": "coding", "turns": ["Sort it."], "multiturn": False},
    {"question_id": 0, "category": "role-play", "turns": ["Be a parrot."], "multiturn": False},
]


def prepare(tmp_path, rows):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return main([str(tmp_path / "out"), "--source", str(tmp_path / "rows.jsonl")])


def test_a_file_a_category_that_eval_reads(tmp_path, capsys):
    assert prepare(tmp_path, ROWS) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["coding.jsonl", "role_play.jsonl"]
    said = capsys.readouterr().out
    assert "coding.jsonl: 2 prompts, 1 of conversations" in said
    # Neither overwritten by a category that is written the same, nor refused for a number that is 0.
    assert "role_play.jsonl: 2 prompts, 0 of conversations" in said
    cases = read_cases(tmp_path / "out" / "coding.jsonl")
    assert [case.fields for case in cases] == [
        {"messages": [{"role": "user", "content": text}]} for text in ("Write a loop.", "Sort it.")
    ]
    assert cases[0].expected is None


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"question_id": "d", "category": "qa", "turns": ["FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"]},
            "1 rows hold a note instead of their text",
        ),
        ({"question_id": "d", "category": "", "turns": ["x"]}, "row 5: has no category"),
    ],
)
def test_rows_without_their_text_are_refused(tmp_path, capsys, row, says):
    assert prepare(tmp_path, [*ROWS, row]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
