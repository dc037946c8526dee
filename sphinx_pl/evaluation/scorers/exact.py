"""Exact match: answers of a word or two that have one right form."""

from __future__ import annotations

from collections.abc import Iterable

from sphinx_pl.data.answer_parsing import normalise


def exact_match(prediction: str, answers: Iterable[str]) -> bool:
    """Whether a prediction is one of the answers, but for case, white space and a full stop at the
    end.

    OCR-VQA (Mishra et al. 2019) reports the share of questions whose answer is predicted exactly;
    IconQA (Lu et al. 2021) the same of questions where something is filled in. GQA's `eval.py`
    (Hudson and Manning 2019) compares the strings as they are, and its answers are small words
    without punctuation; a model writes "Yes." for "yes".
    """
    return normalise(prediction) in {normalise(answer) for answer in answers}
