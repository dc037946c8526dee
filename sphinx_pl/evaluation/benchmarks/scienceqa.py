"""ScienceQA: multiple-choice questions from school science, those of the test split with an image
(Lu et al. 2022).

Files: `problems.json` and `pid_splits.json`, as the converter says
(`sphinx_pl.data.converters.scienceqa`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sphinx_pl.data.converters import scienceqa
from sphinx_pl.data.converters.common import choice_record, text
from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.schema import Record, Turn
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import choice_letter
from sphinx_pl.evaluation.benchmarks.base import Benchmark
from sphinx_pl.evaluation.metrics import Metric, mean
from sphinx_pl.evaluation.runner import Prediction
from sphinx_pl.evaluation.scorers.base import Score
from sphinx_pl.evaluation.scorers.choices import score_choice

_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_LOWER_GRADES = 6
_CHOICE = re.compile(r"^([A-Z])\. (.*)$", re.MULTILINE)


class ScienceQABenchmark(Benchmark, scienceqa.ScienceQAConverter):
    """Parts are columns of the paper's table 3: subjects, questions with a hint (TXT), grades.

    The original's unified annotation has hint and choices in its question, which is asked as it
    stands; the words "The answer is", with which the original begins the answer for the model, are
    not written here.
    """

    name = "scienceqa"
    family = "vqa"
    splits = ("test", "val")

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        for record in super().records(key, entry):
            if not record.images:
                self.skipped["image_none"] += 1
                continue
            meta = {"subject": entry.get("subject"), "grade": entry.get("grade"), "hint": bool(entry.get("hint"))}
            yield dataclasses.replace(record, meta=meta)

    def annotation(self, key: str, entry: Mapping[str, Any]) -> Record:
        question, letter = text(entry["question"]), text(entry["gt_answers"])
        lines = _CHOICE.findall(question.partition("Choices:")[2])
        letters = [letter for letter, _ in lines]
        if letter not in letters or letters != sorted(set(letters)) or letters[0] != "A":
            raise SkipSample("choice_missing", f"{key}: {letter} of {letters}")
        choices = [choice for _, choice in lines]
        record = choice_record(key, text(entry["image_path"]), question, choices, letters.index(letter), {})
        return dataclasses.replace(record, turns=(Turn(question, letter),))

    def score(self, record: Record, answer: str, coordinates: Coordinates) -> Score:
        return score_choice(answer, record.choices, choice_letter(record))

    @property
    def metrics(self) -> Sequence[Metric]:
        return (mean("accuracy", "Share of right answers, of the questions with an image."),)

    def category(self, record: Record) -> str:
        return str(record.meta.get("subject") or "")

    def groups(self, prediction: Prediction) -> Sequence[str]:
        meta = prediction.record.get("meta", {})
        subject = _SUBJECTS.get(str(meta.get("subject")))
        grade = str(meta.get("grade") or "").removeprefix("grade")
        level = ("G1-6" if int(grade) <= _LOWER_GRADES else "G7-12") if grade.isdecimal() else None
        return [part for part in (subject, "TXT" if meta.get("hint") else None, level) if part]
