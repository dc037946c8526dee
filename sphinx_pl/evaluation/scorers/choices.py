"""The scorer of multiple choice, and the rule of MMBench's rotations."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

from sphinx_pl.data.answer_parsing import read_letter
from sphinx_pl.evaluation.scorers.base import Score


def score_choice(answer: str, options: Sequence[str], letter: str) -> Score:
    """1 if the answer names the right option, by its letter or its text (`read_letter` with
    `stated`).

    The accuracy of ScienceQA (Lu et al. 2022), SEED-Bench (Li et al. 2023), MMBench, and IconQA
    with choices is the mean of these. Nothing is guessed: an answer that names no option is wrong.
    ScienceQA's script draws a letter there, and MMBench's asks a language model and then draws one.
    SEED-Bench's compares the losses of the options' texts instead of reading an answer.

    Args:
        letter: the right option's.
    """
    named = read_letter(answer, options, stated=True)
    return Score(float(named == letter.strip().upper()), named is not None)


def circular(
    results: Iterable[tuple[Hashable, bool]], rotations: Mapping[Hashable, int] | None = None
) -> dict[Hashable, bool]:
    """Which questions of MMBench (Liu et al. 2023, CircularEval) or CCBench count as right: all
    rotations were.

    A question with n options is asked n times, and each time its options move on by one. It is
    right only if every answer is. The accuracy is the mean of the values.

    Args:
        results: (question, whether this rotation was answered right), in any order.
            `mmbench_question` gives the first.
        rotations: how often each question has to be asked; one with fewer answers is wrong. None:
            as often as it was.
    """
    answers: dict[Hashable, list[bool]] = {}
    for question, right in results:
        answers.setdefault(question, []).append(right)
    for question in rotations or ():
        answers.setdefault(question, [])
    return {
        question: all(rights) and len(rights) >= (rotations or {}).get(question, 1)
        for question, rights in answers.items()
    }


def mmbench_question(index: int) -> int:
    """The question that a row of MMBench's table belongs to: rotations have its index plus a
    multiple of a million."""
    return index % 1_000_000
