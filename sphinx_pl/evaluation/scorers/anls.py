"""ANLS: average normalised Levenshtein similarity, of DocVQA and InfographicVQA."""

from __future__ import annotations

from collections.abc import Sequence

from sphinx_pl.evaluation.scorers.edits import similarity

THRESHOLD = 0.5


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Score in 0..1 of one question; a benchmark's ANLS is the mean over its questions.

    The best similarity (1 minus edit distance over the longer length) to any answer, small letters
    and single blanks, 0 if it is below 0.5. Official: the evaluation script of the DocVQA and
    InfographicVQA challenges on the Robust Reading Competition's site. Two points are open in the
    sources. At exactly 0.5 the script gives 0.5, the paper (Biten et al. 2019) 0: here the script
    is followed. The script divides by lengths from before white space is reduced, the paper knows
    one text only: here lengths are those of what is compared, so that blanks earn nothing.

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("ANLS needs at least one answer")
    best = max(similarity(_reduced(prediction), _reduced(answer)) for answer in answers)
    return best if best >= THRESHOLD else 0.0


def _reduced(text: str) -> str:
    return " ".join(text.lower().split())
