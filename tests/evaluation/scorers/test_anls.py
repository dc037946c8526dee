"""Against anls_star, whose score of a text and several answers is ANLS, and lmms-eval's copy of the official script."""

from __future__ import annotations

import random
from typing import Any

import pytest
from anls_star import anls_score

from sphinx_pl.evaluation.scorers.anls import anls

# fmt: off
WORDS = (
    "the", "The", "a", "dont", "don't", "two", "2", "1,000", "1000", "$5.00", "5 kg", "5kg", "é", "日本", "", " ", "\n",
    "\t", "North-West", "north west", "(none)", ".", "U.S.A.", "usa",
)
# fmt: on


def test_it_is_the_score_of_anls_star() -> None:
    rng = random.Random(0)
    scores = set()
    for _ in range(4000):
        answers = tuple(" ".join(rng.choices(WORDS, k=rng.randint(0, 3))) for _ in range(rng.randint(1, 3)))
        letters = list(rng.choice(answers))
        for _ in range(rng.randint(0, 4)):
            letters.insert(rng.randint(0, len(letters)), rng.choice("aB .,\n"))
        prediction = "".join(letters)
        score = anls(prediction, answers)
        assert score == pytest.approx(anls_score(answers, prediction)), (prediction, answers)
        scores.add(round(score, 3))
    assert len(scores) > 30
    assert {0, 0.5, 1} <= scores


def test_it_is_the_score_of_lmms_eval_where_there_is_no_surplus_white_space(golden: dict[str, list[Any]]) -> None:
    """That divides by the lengths from before white space is reduced, so blanks raise its score."""
    cases = [case for case in golden["anls"] if all(" ".join(text.split()) == text for text in (case[0], *case[1]))]
    assert len(cases) > 600
    for prediction, answers, lmms in cases:
        assert anls(prediction, answers) == pytest.approx(lmms), (prediction, answers)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        # worked by hand
        ("Hello", ["hello"], 1),
        ("  hello\n world ", ["Hello World"], 1),
        ("helo", ["hello"], 4 / 5),
        ("ab", ["ax", "zz"], 1 / 2),  # exactly at the threshold: kept
        ("abc", ["axx"], 0),  # 1/3 is below it
        ("", ["hello"], 0),
        ("", [""], 1),
        ("$5", ["$5.00"], 0),  # 2/5
        ("1000", ["1,000"], 4 / 5),
        ("dont", ["don't"], 4 / 5),
        ("a    b", ["axb"], 2 / 3),  # blanks count once: not 1 - 1/6
    ],
)
def test_anls(prediction: str, answers: list[str], score: float) -> None:
    assert anls(prediction, answers) == pytest.approx(score)


def test_no_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one answer"):
        anls("x", [])
