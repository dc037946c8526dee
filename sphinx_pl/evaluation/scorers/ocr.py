"""Recognised text against true text."""

from __future__ import annotations

from sphinx_pl.evaluation.scorers.edits import similarity


def text_similarity(prediction: str, truth: str) -> float:
    """1 minus the normalised edit distance (1-NED), from 0 to 1. Case counts, white space counts as
    single blanks.

    The mean over texts is the 1-NED of the ICDAR 2019 challenges on reading (ReCTS, LSVT, ArT): the
    distance of each text is divided by the length of the longer one. Two empty texts are alike.
    """
    return similarity(" ".join(prediction.split()), " ".join(truth.split()))
