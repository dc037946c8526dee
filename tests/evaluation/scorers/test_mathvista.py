"""Against lmms-eval's copy of the official scripts where rules alone read the answer; the rest by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sphinx_pl.evaluation.scorers.mathvista import mathvista_match, read_answer


def test_what_the_official_rules_read_is_read_the_same(golden: dict[str, list[Any]]) -> None:
    """But "nan" and "inf" are no numbers here, "1,234" is one, and an option that is not named is not guessed."""
    counts = {"integer": 0, "float": 0, "text": 0}
    for response, question_type, answer_type, choices, precision, by_rules, official in golden["mathvista"]:
        if not by_rules or not response:
            continue
        ours = read_answer(response, question_type, answer_type, choices, precision)
        if answer_type == "float" and official is not None and not math.isfinite(float(official)):
            assert ours is None
        elif official is None:
            assert ours is None or "1,234" in response, response
        else:
            counts[answer_type] += 1
            assert ours == official, (response, choices)
    assert min(counts.values()) > 10, counts


def test_what_is_read_is_in_the_form_of_the_answers(golden: dict[str, list[Any]]) -> None:
    for response, question_type, answer_type, choices, precision, _, _ in golden["mathvista"]:
        ours = read_answer(response, question_type, answer_type, choices, precision)
        if ours is not None:
            repeat = ours if choices else read_answer(ours, question_type, answer_type, precision=precision)
            assert repeat == ours, response
            assert not choices or ours in choices
            assert mathvista_match(ours, ours)


FREE_FORM = [
    # worked by hand
    ("14", "integer", None, "14"),
    ("The number missing in the sequence is 14.", "integer", None, "14"),
    ("-3", "integer", None, "-3"),
    ("1e999", "integer", None, None),  # no number that can be written
    ("1e999", "float", 1, None),
    ("1,234 people", "integer", None, "1234"),
    ("14.7", "integer", None, "14"),
    ("5kg", "integer", None, "5"),
    ("$1.45", "float", 2, "1.45"),
    ("45%", "integer", None, "45"),
    ("0.65", "float", 1, "0.7"),  # 0.65 is 0.65000000000000002 in binary
    ("2.675", "float", 2, "2.67"),  # and this 2.67499999999999982
    ("14", "float", 1, "14.0"),
    (".5", "float", 1, "0.5"),
    ("1e3", "integer", None, "1000"),
    ("2 + 3 = 5", "integer", None, None),
    ("2 + 3 = 5. The answer is 5.", "integer", None, "5"),
    ('The answer is "7".', "integer", None, "7"),
    ("3/4", "float", 2, None),
    ("14-16", "integer", None, None),
    ("5 of the 5 dogs", "integer", None, "5"),
    ("fourteen", "integer", None, None),
    ("", "integer", None, None),
    ("nan", "float", 1, None),
    ("inf", "integer", None, None),
    ("[2007,2008]", "list", None, "[2007, 2008]"),
    ("Between 2007 and 2008: [2007, 2008].", "list", None, "[2007, 2008]"),
    ("[1.2, 1.3", "list", None, None),
    ("[1], [2]", "list", None, None),
    ("[x, y]", "list", None, None),
    ("2007, 2008", "list", None, None),
]


def test_free_form(subtests: pytest.Subtests) -> None:
    for response, answer_type, precision, read in FREE_FORM:
        with subtests.test(response=response, answer_type=answer_type):
            assert read_answer(response, "free_form", answer_type, precision=precision) == read


@pytest.mark.parametrize(
    ("response", "read"),
    [
        # worked by hand
        ("(B) 8/11", "8/11"),
        ("The correct answer is (B).", "8/11"),
        ("6/11", "6/11"),
        ('The answer is "6/11".', "6/11"),
        ("6/12", None),  # the official script takes 6/11, which is nearest
        ("E", None),
        ("", None),  # and of an empty answer the first of the shortest
    ],
)
def test_multiple_choice(response: str, read: str | None) -> None:
    assert read_answer(response, "multi_choice", "text", ["3/11", "8/11", "6/11", "3/5"]) == read


def test_mathvista_match() -> None:
    assert mathvista_match("14", " 14")
    assert not mathvista_match("14.0", "14")
    assert not mathvista_match(None, "None")
