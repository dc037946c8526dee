"""The part that benchmarks of multiple choice share: an answer counts by its option."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from sphinx_pl.data.converters.common import asked, choice_turn, chosen, text
from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.evaluation.benchmarks.base import Benchmark
from sphinx_pl.evaluation.metrics import Metric, mean
from sphinx_pl.evaluation.scorers.base import Score
from sphinx_pl.evaluation.scorers.choices import score_choice

_NO_HINT = "N/A"


def letter_record(
    key: str, image: ImageRef, question: str, choices: Any, letter: str, meta: Mapping[str, Any]
) -> Record:
    """A question with choices in the wording of the task multiple_choice, whose right answer is a
    letter.

    Unlike in training, two choices may have the same text: then there is one more wrong letter.

    Raises:
        SkipSample: no choice has the letter, the question is empty, or there are not 2 to 26
            choices.
    """
    if not isinstance(choices, list):
        raise TypeError(f"{choices!r} should be a list")
    choices = [text(choice).strip() for choice in choices]
    letter = letter.strip().upper()
    if len(letter) != 1 or letter not in string.ascii_uppercase:
        raise SkipSample("choice_missing", f"{key}: {letter!r}")
    index = string.ascii_uppercase.index(letter)
    answer = chosen(choices, index)
    return Record(
        key=key,
        task="multiple_choice",
        images=(image,),
        turns=(choice_turn(asked(question), choices, index),),
        choices=tuple(choices),
        answer=answer,
        meta=dict(meta) | {"letter": letter},
    )


class MultipleChoiceBenchmark(Benchmark):
    """The records are `letter_record`s. An answer that names no option, or several, is wrong:
    nothing is guessed.

    Entries of the original's unified annotation have "choices", a letter as "gt_answers" and
    perhaps a "hint".
    """

    def annotation(self, key: str, entry: Mapping[str, Any]) -> Record:
        question, hint = text(entry["question"]), text(entry.get("hint") or _NO_HINT)
        question = question if hint == _NO_HINT else f"{hint}\n{question}"
        meta = {"question_id": entry.get("question_id")}
        image = ImageRef(text(entry["image_path"]))
        return letter_record(key, image, question, entry["choices"], text(entry["gt_answers"]), meta)

    def score(self, record: Record, answer: str, coordinates: Coordinates) -> Score:
        return score_choice(answer, record.choices, record.meta["letter"])

    @property
    def metrics(self) -> Sequence[Metric]:
        return (mean("accuracy", "Share of right answers."),)
