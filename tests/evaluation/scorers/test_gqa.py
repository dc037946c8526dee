"""Cases worked by hand: no package on PyPI has GQA's own evaluation, which compares strings as they are."""

from __future__ import annotations

import pytest

from sphinx_pl.evaluation.scorers.exact import exact_match
from tests.evaluation.official import gqa_summary


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        # worked by hand
        ("yes", "yes", True),
        ("Yes", "yes", True),
        ("Yes.", "yes", True),
        (" yes \n", "yes", True),
        ("yes, it is", "yes", False),
        ("fire  truck.", "fire truck", True),
        ("the dog", "dog", False),
        ("two", "2", False),
        ("t-shirt", "t-shirt", True),
        ("t shirt", "t-shirt", False),
        ("", "yes", False),
    ],
)
def test_exact_match_of_gqa(prediction: str, answer: str, right: bool) -> None:
    assert exact_match(prediction, [answer]) is right


def test_the_prediction_is_cleaned_before_it_is_compared() -> None:
    predictions, answers = ("Yes.", "Left. ", "RED"), ("yes", "left", "red")
    assert all(exact_match(prediction, [answer]) for prediction, answer in zip(predictions, answers, strict=True))
    assert sum(prediction == answer for prediction, answer in zip(predictions, answers, strict=True)) == 0


def test_gqa_summary() -> None:
    results = [(True, "query", "attr"), (False, "query", "rel"), (True, "verify", "attr"), (True, "choose", "rel")]
    assert gqa_summary(results) == {  # worked by hand
        "accuracy": 3 / 4,
        "open": 1 / 2,
        "binary": 2 / 2,
        "structural/query": 1 / 2,
        "structural/verify": 1,
        "structural/choose": 1,
        "semantic/attr": 2 / 2,
        "semantic/rel": 1 / 2,
    }
    assert gqa_summary([]) == {}
