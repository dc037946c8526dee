"""Exact match: answers of a word or two that have one right form."""

from __future__ import annotations

from collections.abc import Iterable

from sphinx_pl.data.answer_parsing import leading_value, normalise

_TRUTH = {"true": True, "yes": True, "false": False, "no": False}


def exact_match(prediction: str, answers: Iterable[str]) -> bool:
    """Whether a prediction is one of the answers, but for case, white space and a full stop at the end.

    OCR-VQA (Mishra et al. 2019) reports the share of questions whose answer is predicted exactly; IconQA (Lu et al.
    2021) the same of questions where something is filled in.
    """
    return normalise(prediction) in {normalise(answer) for answer in answers}


def read_truth(text: str) -> bool | None:
    """True of a text that begins with "true" or "yes", false of "false" or "no"; None of any other, and of both."""
    return leading_value(text, _TRUTH)


def vsr_match(prediction: str, label: bool) -> bool:
    """Whether a prediction says rightly if a caption is true of its image: VSR (Liu et al. 2023), `label` 1 or 0 there.

    Read by `read_truth`; a prediction that says neither is wrong.
    """
    return read_truth(prediction) is bool(label)
