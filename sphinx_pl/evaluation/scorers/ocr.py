"""Recognised text against true text."""

from __future__ import annotations

from sphinx_pl.evaluation.scorers.edits import similarity


def text_similarity(prediction: str, truth: str) -> float:
    """1 minus the normalised edit distance (1-NED), in 0..1, case counts, white space counts as single blanks.

    The mean over texts is the 1-NED of the ICDAR 2019 challenges on reading (ReCTS, LSVT, ArT): the distance of each
    text is divided by the length of the longer one. Two empty texts are alike.
    """
    return similarity(" ".join(prediction.split()), " ".join(truth.split()))


def word_match(prediction: str, truth: str) -> bool:
    """Whether a word was read right: word accuracy of scene text recognition (Baek et al. 2019).

    As is usual there, case does not count and only letters and digits are compared. A truth without any (a word of
    punctuation) must be met as it is.
    """
    if not (bare := _letters_and_digits(truth)):
        return prediction.strip() == truth.strip()
    return _letters_and_digits(prediction) == bare


def _letters_and_digits(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum())
