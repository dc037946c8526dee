"""ANLS: average normalised Levenshtein similarity, of DocVQA and InfographicVQA."""

from __future__ import annotations

from collections.abc import Sequence

from sphinx_pl.evaluation.scorers.edits import similarity

THRESHOLD = 0.5


def anls(prediction: str, answers: Sequence[str]) -> float:
    """The score of one answer, from 0 to 1; a benchmark's ANLS is the mean over its questions.

    It is the best similarity (1 minus edit distance over the longer length) to any true answer, in
    lower case and with single blanks, and 0 if that is below 0.5. Official: the evaluation script
    of the DocVQA and InfographicVQA challenges on the Robust Reading Competition's site. The
    sources differ in two points. At exactly 0.5 the script gives 0.5 and the paper (Biten et al.
    2019) 0; here it is 0.5. The script divides by lengths before white space is reduced, and the
    paper knows one text only; here they are the lengths of the compared texts, so that blanks gain
    nothing.

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("ANLS needs at least one answer")
    best = max(similarity(_reduced(prediction), _reduced(answer)) for answer in answers)
    return best if best >= THRESHOLD else 0.0


def _reduced(text: str) -> str:
    return " ".join(text.lower().split())
