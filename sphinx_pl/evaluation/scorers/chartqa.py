"""Relaxed accuracy of ChartQA."""

from __future__ import annotations

TOLERANCE = 0.05
"""Of the true value, for numbers (Masry et al. 2022, section 5.1, after Methani et al. 2020)."""


def relaxed_match(prediction: str, answer: str) -> bool:
    """Whether a prediction is ChartQA's answer: within 5 % of it if both are numbers, else equal but for case.

    Official: `relaxed_correctness` of pix2struct (`metrics.py`), which others copied. A number is what Python's `float`
    reads; one that ends in "%" is divided by 100, so "45%" is 0.45 and not 45. "1,000" is a text and no number, and 0
    must be met as a text ("0.0" is not "0"), as there. What is not in it: white space around both is dropped.
    """
    prediction, answer = prediction.strip(), answer.strip()
    predicted, true = _number(prediction), _number(answer)
    if predicted is not None and true:
        return abs(predicted - true) / abs(true) <= TOLERANCE
    return prediction.lower() == answer.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
