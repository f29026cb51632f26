"""Cases: what a row asks and what is right."""

import json

import pytest

from mtpkern.cases import read_cases


def written(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_and_answers_by_every_name(tmp_path):
    talk = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "#### 2"}]
    path = written(
        tmp_path,
        {"prompt": "a", "result": 75},
        {"question": "b", "answer": "so\n#### 7"},
        {"messages": talk},
        {"messages": talk[:1], "completion": "two"},
    )
    cases = read_cases(path)
    assert [case.expected for case in cases] == ["75", "so\n#### 7", "#### 2", "two"]
    assert [case.fields for case in cases[:2]] == [{"prompt": "a"}, {"prompt": "b"}]
    assert [case.fields["messages"] for case in cases[2:]] == [talk[:1], talk[:1]]
    assert len(read_cases(path, 2)) == 2
    assert read_cases(written(tmp_path, {"prompt": "a", "answer": "1", "gold": "2"}), None, "gold")[0].expected == "2"
    assert read_cases(written(tmp_path, {"prompt": "a"}))[0].expected is None


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "at least one row"),
        ([{"text": "a"}], r"line 1: expected an object with one of prompt, question and messages; got \['text'\]"),
        ([{"prompt": "a", "question": "b"}], "one of prompt, question"),
        ([{"prompt": ""}], "prompt must be a string with text in it; got ''"),
        ([{"prompt": "a", "answer": ["1"]}], r"answer must be a text or a number; got \['1'\]"),
        ([{"prompt": "a", "answer": "1"}, {"prompt": "b"}], "line 2: has no answer, and .*line 1 has one"),
        ([{"prompt": "a"}, {"prompt": "b", "answer": "1"}], "line 2: has an answer, and .*line 1 has none"),
        ([{"messages": "hi"}], "messages must be a list"),
    ],
)
def test_what_is_no_case(tmp_path, rows, says):
    with pytest.raises(ValueError, match=says):
        read_cases(written(tmp_path, *rows))


def test_an_answer_field_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"no field 'gold' \(--answer-field\)"):
        read_cases(written(tmp_path, {"prompt": "a", "answer": "1"}), None, "gold")
