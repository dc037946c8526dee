from __future__ import annotations

import random

import pytest
from rapidfuzz.distance import Levenshtein

from sphinx_pl.evaluation.scorers.edits import edit_distance, similarity


def test_theedit_distance_is_that_of_the_table() -> None:
    def table(a: str, b: str) -> int:
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            before, row[0] = row[0], i
            for j, y in enumerate(b, 1):
                before, row[j] = row[j], min(before + (x != y), row[j] + 1, row[j - 1] + 1)
        return row[-1]

    rng = random.Random(0)
    for _ in range(2000):
        a, b = ("".join(rng.choices("abcé", k=rng.randint(0, 12))) for _ in range(2))
        assert edit_distance(a, b) == table(a, b), (a, b)
    assert edit_distance("a" * 5000, "b" * 3000 + "a" * 2000) == 3000


def test_it_is_the_distance_that_rapidfuzz_gives() -> None:
    rng = random.Random(1)
    for _ in range(3000):
        a, b = ("".join(rng.choices("abcd é\n", k=rng.randint(0, 90))) for _ in range(2))
        assert edit_distance(a, b) == Levenshtein.distance(a, b), (a, b)
        assert similarity(a, b) == pytest.approx(Levenshtein.normalized_similarity(a, b)), (a, b)


def test_two_empty_texts_are_alike() -> None:
    assert similarity("", "") == 1
    assert similarity("", "a") == similarity("a", "") == 0
