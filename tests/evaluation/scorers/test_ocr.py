"""Against rapidfuzz; the rest by hand."""

from __future__ import annotations

import random

import pytest
from rapidfuzz.distance import Levenshtein

from sphinx_pl.evaluation.scorers.ocr import text_similarity


def test_text_similarity_is_that_of_rapidfuzz_on_single_blanks() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        a, b = ("".join(rng.choices("abC é\n.,1", k=rng.randint(0, 40))) for _ in range(2))
        theirs = Levenshtein.normalized_similarity(" ".join(a.split()), " ".join(b.split()))
        assert text_similarity(a, b) == pytest.approx(theirs), (a, b)


@pytest.mark.parametrize(
    ("prediction", "truth", "score"),
    [
        # worked by hand
        ("kitten", "sitting", 1 - 3 / 7),
        ("EXIT", "exit", 0),
        (" STOP\n", "STOP", 1),
        ("", "", 1),
        ("", "ab", 0),
    ],
)
def test_text_similarity(prediction: str, truth: str, score: float) -> None:
    assert text_similarity(prediction, truth) == pytest.approx(score)
