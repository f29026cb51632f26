"""Grading: whether an answer is right. Everything here that counts right answers asks `is_right`.

    rule          what is compared
    hashes        the number behind the last #### (GSM8K)
    answer-is     what stands behind the last "The answer is", a number or LaTeX (MetaMathQA)
    last-number   the last number of the text
    exact         the text itself

"auto" takes a rule for each row by what its expected answer holds: the first two by their marks, the third where it is
nothing but a number, else the last. Numbers are compared as numbers: 1,250 is 1250.0, and \\frac{1}{2} is 0.5.
"""

from __future__ import annotations

import re
from fractions import Fraction

RULES = ("auto", "hashes", "answer-is", "last-number", "exact")

# A minus behind a digit is that of a difference.
_NUMBER = r"(?:(?<!\d)-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_HASHES = re.compile(rf"####\s*\$?({_NUMBER})")
_ANSWER_IS = re.compile(r"the answer is:?[ \t]*([^\n]+)", re.IGNORECASE)
# What may stand in LaTeX, or not, and says the same; the order counts.
_SAME = (
    (r"\\(?:left|right)(?![A-Za-z])|\\[!,;: ]|\\?[$%]|\^\{?\\circ\}?|\s", ""),
    (r"\\(?:text|mbox|mathrm)\{([^{}]*)\}", r"\1"),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\frac(\d)(\d)", r"\\frac{\1}{\2}"),
    (r"^\\boxed\{(.*)\}$", r"\1"),
)
# Longer ones are no result of a sum, and Python takes no number of thousands of digits from a text.
_MOST_DIGITS = 1000


def is_right(answer: str, expected: str, rule: str = "auto") -> bool:
    """Whether an answer comes to what is expected, by a rule of `RULES`.

    expected: a worked answer with the rule's mark, or the bare result.

        is_right("8 - 3 = 5\\n#### 5", "#### 5.0"), is_right("... The answer is: $0.5$.", "The answer is: \\\\frac12")
        # True, True
    """
    rule = rule_of(expected) if rule == "auto" else rule
    wanted = expected_answer(expected, rule)
    return wanted is not None and final_answer(answer, rule) == wanted


def rule_of(expected: str) -> str:
    """The rule that an expected answer asks for: `rule_of("long division\\n#### 7")` is "hashes"."""
    if _HASHES.search(expected):
        return "hashes"
    if _ANSWER_IS.search(expected):
        return "answer-is"
    return "last-number" if re.fullmatch(rf"\$?{_NUMBER}", expected.strip()) else "exact"


def final_answer(text: str, rule: str) -> Fraction | str | None:
    """What a text comes to by a rule other than "auto", None where it has no such thing.

    final_answer("#### 1,250", "hashes"), final_answer("It is 7", "hashes")  # Fraction(1250), None
    """
    if rule == "exact":
        return text.strip()
    found = {"hashes": _HASHES, "answer-is": _ANSWER_IS, "last-number": re.compile(_NUMBER)}[rule].findall(text)
    if not found:
        return None
    return _plain(found[-1]) if rule == "answer-is" else _number(found[-1])


def expected_answer(expected: str, rule: str) -> Fraction | str | None:
    """As `final_answer`, of a text that may be the bare result: `expected_answer("7", "hashes")` is Fraction(7)."""
    found = final_answer(expected, rule)
    if found is None and rule == "answer-is":
        return _plain(expected)
    return final_answer(f"#### {expected.strip()}", rule) if found is None and rule == "hashes" else found


def _plain(text: str) -> Fraction | str:
    """A result without what LaTeX may say in several ways; as a number where it is one."""
    text = text.strip().rstrip(".")
    for pattern, instead in _SAME:
        text = re.sub(pattern, instead, text)
    text = text.rstrip(".")
    fraction = re.fullmatch(r"(-?)(?:\\frac\{(-?\d+)\}\{(\d+)\}|(\d+)/(\d+))", text)
    if fraction is not None and len(text) <= _MOST_DIGITS:
        sign, *parts = fraction.groups()
        above, below = (int(part) for part in parts if part is not None)
        if below:
            return Fraction(-above if sign else above, below)
    return _number(text) if re.fullmatch(_NUMBER, text) else text


def _number(text: str) -> Fraction | str:
    text = text.replace(",", "")
    return Fraction(text) if len(text) <= _MOST_DIGITS else text
