"""The scorer of questions whose answer is yes or no: POPE, MME, VSR."""

from __future__ import annotations

from collections.abc import Mapping

from sphinx_pl.data.answer_parsing import YES_NO, read_yes_or_no
from sphinx_pl.evaluation.scorers.base import Score


def score_yes_no(answer: str, truth: bool, official: str = "", words: Mapping[str, bool] = YES_NO) -> Score:
    """1 if the answer says what is true. An answer that says neither yes nor no, or both, is wrong.

    Args:
        official, words: see `read_yes_or_no`.
    """
    reading = read_yes_or_no(answer, official, words)
    return Score(float(reading is truth), reading is not None)
