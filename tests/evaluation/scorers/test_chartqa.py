"""Against lmms-eval's copy of pix2struct's relaxed correctness."""

from __future__ import annotations

from typing import Any

import pytest

from sphinx_pl.evaluation.scorers.chartqa import relaxed_match


def test_it_is_that_of_lmms_eval(golden: dict[str, list[Any]]) -> None:
    cases = golden["chartqa"]
    assert sum(right for *_, right in cases) > 100
    assert len(cases) == 2500
    for prediction, answer, right in cases:
        assert relaxed_match(prediction, answer) is right, (prediction, answer)


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        # worked by hand
        ("105", "100", True),
        ("106", "100", False),
        ("-95", "-100", True),
        ("45%", "45%", True),
        ("45%", "0.45", True),
        ("45", "45%", False),  # 45 against 0.45
        ("1,000", "1000", False),  # no number to Python's float
        ("1,000", "1,000", True),
        ("0", "0", True),
        ("0.0", "0", False),  # 0 has no 5 %: met as a text
        ("0.01", "0", False),
        ("Yes", "yes", True),
        ("yes.", "yes", False),
        ("12 cm", "12", False),
        ("", "5", False),
        ("nan", "5", False),
        (" 45 \n", "45", True),
        (" red", "Red ", True),  # white space around counts in pix2struct: dropped here
    ],
)
def test_relaxed_match(prediction: str, answer: str, right: bool) -> None:
    assert relaxed_match(prediction, answer) is right
