"""Relaxed accuracy of ChartQA."""

from __future__ import annotations

from sphinx_pl.data.answer_parsing import read_number

TOLERANCE = 0.05
"""The allowed share of the true value, for numbers (Masry et al. 2022, section 5.1, after Methani
et al. 2020)."""


def relaxed_match(prediction: str, answer: str) -> bool:
    """Whether a prediction is ChartQA's answer: within 5 % of it if both are numbers, else equal
    but for case.

    Official: `relaxed_correctness` of pix2struct (`metrics.py`), which others copied. As there, 0
    must be met as a text: "0.0" is not "0". Unlike there, white space around both is dropped.
    """
    prediction, answer = prediction.strip(), answer.strip()
    predicted, true = (read_number(text, official="chartqa") for text in (prediction, answer))
    if predicted is not None and true:
        return abs(predicted - true) / abs(true) <= TOLERANCE
    return prediction.lower() == answer.lower()
