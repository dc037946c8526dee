"""POPE: yes/no questions on objects that are or are not in the picture (Li et al. 2023, arXiv
2305.10355).

Files (https://github.com/AoiDragon/POPE, output/coco):
`coco_pope_{random,popular,adversarial}.json`, jsonl of {"question_id", "image":
"COCO_val2014_….jpg", "text": "Is there a … in the image?", "label": "yes" or "no"}. The splits
differ in how the absent objects were chosen. Images are COCO's val2014.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sphinx_pl.data.answer_parsing import read_yes_or_no
from sphinx_pl.data.converters.common import text
from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.evaluation.benchmarks.base import Benchmark
from sphinx_pl.evaluation.bootstrap import Floats
from sphinx_pl.evaluation.metrics import Additive, Metric, mean, ratio
from sphinx_pl.evaluation.runner import Prediction
from sphinx_pl.evaluation.scorers.base import Score
from sphinx_pl.evaluation.scorers.yes_no import score_yes_no


class POPEBenchmark(Benchmark):
    """Answers count by the word they begin with, yes or no. The official script takes any text
    without "no" or "not" in its first sentence for yes, even one that says neither. Here such an
    answer is wrong and counts as unparsed."""

    name = "pope"
    title = "POPE"
    url = "https://github.com/AoiDragon/POPE"
    licence = "MIT"
    family = "mllm"
    splits = ("random", "popular", "adversarial")
    closed = ("yes", "no")

    def entries(self) -> Iterator[tuple[str, Any]]:
        for number, entry in self.json_lines(f"coco_pope_{self.split}.json"):
            yield str(number), entry

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        answer = text(entry["label"]).strip().lower()
        if answer not in ("yes", "no"):
            raise ValueError(f"label {answer}")
        meta = {"question_id": entry["question_id"]}
        image = (ImageRef(text(entry["image"])),)
        yield Record(key, "yes_no", image, question=text(entry["text"]), answer=answer, meta=meta)

    def score(self, record: Record, answer: str, coordinates: Coordinates) -> Score:
        return score_yes_no(answer, record.answer == "yes")

    @property
    def metrics(self) -> Sequence[Metric]:
        return (
            mean("accuracy", "Share of right answers."),
            Additive("precision", "Share of the answers yes that are right.", _counts, _precision),
            Additive("recall", "Share of the objects in the pictures that are found.", _counts, _recall),
            Additive("f1", "Harmonic mean of precision and recall of the answer yes.", _counts, _f1),
            Additive("yes", "Share of the answers yes; half of the objects are in the pictures.", _said_yes, ratio),
        )


def _said_yes(group: Sequence[Prediction]) -> Sequence[float]:
    (prediction,) = group
    return float(read_yes_or_no(prediction.prediction) is True), 1.0


def _counts(group: Sequence[Prediction]) -> Sequence[float]:
    """True positives, false positives, false negatives."""
    yes, there = bool(_said_yes(group)[0]), group[0].answer == "yes"
    return float(yes and there), float(yes and not there), float(there and not yes)


def _precision(sums: Floats) -> Floats:
    return np.asarray(sums[..., 0] / (sums[..., 0] + sums[..., 1]))


def _recall(sums: Floats) -> Floats:
    return np.asarray(sums[..., 0] / (sums[..., 0] + sums[..., 2]))


def _f1(sums: Floats) -> Floats:
    return np.asarray(2 * sums[..., 0] / (2 * sums[..., 0] + sums[..., 1] + sums[..., 2]))
