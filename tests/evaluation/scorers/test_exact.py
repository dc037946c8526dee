"""Against torchmetrics' exact match of SQuAD on plain words; what is forgiven and what is not, by hand."""

from __future__ import annotations

import random

import pytest
from torchmetrics.functional.text import squad

from sphinx_pl.data.answer_parsing import TRUE_FALSE, read_yes_or_no
from sphinx_pl.evaluation.scorers.exact import exact_match
from sphinx_pl.evaluation.scorers.yes_no import score_yes_no


def test_exact_match_is_that_of_torchmetrics_but_for_articles_and_punctuation() -> None:
    """SQuAD's match also drops articles and all punctuation: texts have none of either, but a full stop at the end."""
    rng = random.Random(0)
    words = ("red", "Red", "RED", "dog", "two", "2", "é", "日本", "")
    for _ in range(300):
        prediction, *answers = (" ".join(rng.choices(words, k=rng.randint(1, 2))) for _ in range(3))
        prediction += rng.choice(("", ".", " "))
        theirs = squad(
            [{"prediction_text": prediction, "id": "0"}],
            [{"answers": {"answer_start": [0], "text": answers}, "id": "0"}],
        )
        assert exact_match(prediction, answers) is bool(theirs["exact_match"]), (prediction, answers)


@pytest.mark.parametrize(
    ("prediction", "answers", "right"),
    [
        # worked by hand
        ("Stephen  King.", ["stephen king"], True),
        ("the end", ["end"], False),
        ("U.S.A.", ["u.s.a"], True),
        ("1,000", ["1000"], False),
        ("12 cm", ["12"], False),
        ("5", ["4", "5"], True),
        ("dont", ["don't"], False),
        ("", ["x"], False),
        ("x", [], False),
    ],
)
def test_exact_match(prediction: str, answers: list[str], right: bool) -> None:
    assert exact_match(prediction, answers) is right


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        # worked by hand
        ("True", True),
        ("false.", False),
        ("Yes, the cat is under the table", True),
        ("no", False),
        ('"No"', False),
        ("No-one is", None),
        ("truely", None),
        ("It is true", None),
        ("not", None),
        ("1", None),
        ("", None),
        ("true or false", None),  # the question's own words
        ("True/False", None),
        ("False, yes", None),
        ("True, yes.", True),
    ],
)
def test_true_and_false(text: str, truth: bool | None) -> None:
    assert read_yes_or_no(text, words=TRUE_FALSE) is truth
    assert score_yes_no(text, True, words=TRUE_FALSE).value == (truth is True)
    assert score_yes_no(text, False, words=TRUE_FALSE).value == (truth is False)
