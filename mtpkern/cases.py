"""Cases: the rows of a file that a model is judged by, each a prompt and, where it can be wrong, what is right.

    fields                       prompt                        expected answer
    prompt or question           the text                      the answer field
    messages                     the conversation              the answer field
    messages, the last an        the conversation up to there  what the assistant says last
    assistant's

The answer field is the first there is of `ANSWER_FIELDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtpkern.grading import is_right
from mtpkern.rows import BadRow, read_lines, require_prompt, shown

ANSWER_FIELDS = ("answer", "result", "completion", "response", "expected")


@dataclass(frozen=True)
class Case:
    """Where a row stands, its prompt as `Prompting.encode` takes it, and the expected answer, if there is one."""

    where: str
    fields: Mapping[str, Any]
    expected: str | None = None

    @property
    def question(self) -> str:
        """What stands last in the prompt."""
        return str(self.fields["messages"][-1]["content"] if "messages" in self.fields else self.fields["prompt"])

    def right(self, text: str, rule: str = "auto") -> bool | None:
        """Whether an answer is right, by a rule of `mtpkern.grading`; None where nothing is expected."""
        return None if self.expected is None else is_right(text, self.expected, rule)


def read_cases(path: Path, limit: int | None = None, answer_field: str | None = None) -> list[Case]:
    """The first `limit` rows (all, if None) of a JSONL file; blank lines are skipped, but counted.

    Raises ValueError, by line, for what is no such row, and for a file in which some rows have an answer and others
    none; OSError for what is no file.

        read_cases(mtpkern.ASSETS / "problems.jsonl", 2)[0].expected  # "75"
    """
    cases: list[Case] = []
    for number, fields in read_lines(path):
        if len(cases) == limit:
            break
        where = f"{path}, line {number}"
        if isinstance(fields, BadRow):
            raise ValueError(f"{where}: {fields}")
        cases.append(_case(where, fields, answer_field))
        if (cases[-1].expected is None) != (cases[0].expected is None):
            one, other = ("an", "none") if cases[0].expected is None else ("no", "one")
            raise ValueError(
                f"{where}: has {one} answer, and {cases[0].where} has {other}: give all of them one, or none "
                f"(fields that hold it: {', '.join(ANSWER_FIELDS)}; --answer-field names another)"
            )
    if not cases:
        raise ValueError(f'{path}: expected at least one row such as {{"prompt": "...", "answer": "..."}}; got none')
    return cases


def _case(where: str, fields: Any, answer_field: str | None) -> Case:
    asked = [name for name in ("prompt", "question", "messages") if isinstance(fields, dict) and name in fields]
    if len(asked) != 1:
        got = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise ValueError(f"{where}: expected an object with one of prompt, question and messages; got {got}")
    (name,) = asked
    if answer_field is not None and answer_field not in fields:
        raise ValueError(f"{where}: has no field {answer_field!r} (--answer-field); it has {sorted(fields)}")
    found = answer_field or next((field for field in ANSWER_FIELDS if field in fields), None)
    expected = None if found is None else fields[found]
    if isinstance(expected, bool) or not isinstance(expected, str | int | float | None):
        raise ValueError(f"{where}: {found} must be a text or a number; got {shown(expected)}")
    prompt = fields[name]
    require_prompt(where, name, prompt)
    if name == "messages" and prompt[-1]["role"] == "assistant":
        expected = prompt[-1]["content"] if expected is None else expected
        prompt = prompt[:-1]
        require_prompt(where, name, prompt)
    kept = "messages" if name == "messages" else "prompt"
    return Case(where, {kept: prompt}, None if expected is None else str(expected))
