"""What makes an answer right, by each rule and by what the expected answer holds."""

from fractions import Fraction

import pytest

from mtpkern.grading import RULES, expected_answer, final_answer, is_right, rule_of


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is\n#### 42", 42),
        ("#### 1 or rather #### -1,250", -1250),
        ("#### $3.50", 3.5),
        ("#### 12345", 12345),
        ("42", None),
        ("#### none", None),
        ("", None),
    ],
)
def test_the_number_behind_the_hashes(text, number):
    assert final_answer(text, "hashes") == number


@pytest.mark.parametrize(
    ("expected", "rule", "right", "wrong"),
    [
        # GSM8K, and MetaMathQA's half of it, which ends in both marks.
        ("long worked answer #### 1,250", "hashes", "therefore\n#### 1250.0", "1250"),
        ("#### 7\nThe answer is: 7", "hashes", "#### 7\nThe answer", "#### 8\nThe answer is: 7"),
        # MetaMathQA's half of MATH.
        ("So x = 5. The answer is: 5", "answer-is", "whatever. the answer is 5.0.", "#### 5"),
        ("The answer is: \\frac{1}{2}", "answer-is", "The answer is: $\\dfrac12$.", "The answer is: \\frac{1}{3}"),
        ("The answer is: \\frac{3}{4}", "answer-is", "The answer is: 3/4", "The answer is: -3/4"),
        ("The answer is: \\frac{-3}{4}", "answer-is", "The answer is: -0.75", "The answer is: 3/-4"),
        (
            "The answer is: (2, \\infty)",
            "answer-is",
            "The answer is: \\left( 2,\\infty \\right)",
            "The answer is: (2,3)",
        ),
        ("The answer is: \\text{blue}", "answer-is", "The answer is: \\boxed{blue}", "The answer is: red"),
        ("The answer is: 90", "answer-is", "The answer is: $90^\\circ$", "The answer is: 9"),
        ("The answer is: 1/0", "answer-is", "The answer is: 1/0", "The answer is: 1"),
        # A bare number, and free text.
        ("1,250", "last-number", "It costs $1,250.00.", "1,250 or 3"),
        ("-3", "last-number", "5 - 8 = -3", "8-3"),
        ("Red, green and 3 more.", "exact", " Red, green and 3 more.\n", "3"),
    ],
)
def test_the_expected_answer_chooses_the_rule(expected, rule, right, wrong):
    assert rule_of(expected) == rule
    assert is_right(right, expected)
    assert not is_right(wrong, expected)
    assert not is_right("", expected)


def test_a_rule_that_is_asked_for():
    expected = "Two and two. #### 4\nThe answer is: 5"
    for answer, rules in (
        ("#### 4", {"hashes"}),
        ("The answer is: 5", {"answer-is", "last-number"}),
        ("so 5", {"last-number"}),
        (expected, {*RULES} - {"auto"}),
    ):
        assert {rule for rule in RULES if rule != "auto" and is_right(answer, expected, rule)} == rules
    # The bare result does where the rule has a mark.
    assert expected_answer("1,250", "hashes") == 1250
    assert expected_answer("$\\frac12$", "answer-is") == Fraction(1, 2)
    assert expected_answer("a word", "hashes") is None
    assert not is_right("a word", "a word", "hashes")


def test_numbers_of_thousands_of_digits():
    """Models write such, and Python refuses to read them."""
    assert is_right("9" * 9000, "9" * 9000, "last-number")
    assert not is_right("The answer is: " + "9" * 9000 + "/1", "The answer is: 9")
