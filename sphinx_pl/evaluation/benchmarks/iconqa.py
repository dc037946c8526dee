"""IconQA: questions about abstract diagrams, with texts to choose from or a blank to fill in (Lu et
al. 2021).

Files: `iconqa/test/{choose_txt,fill_in_blank}/{id}/data.json` and image.png beside each, as the
converter says (`sphinx_pl.data.converters.iconqa`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sphinx_pl.data.converters import iconqa
from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.schema import Record
from sphinx_pl.data.tasks import choice_letter
from sphinx_pl.evaluation.benchmarks.base import Benchmark
from sphinx_pl.evaluation.metrics import Metric, mean
from sphinx_pl.evaluation.scorers.base import Score
from sphinx_pl.evaluation.scorers.choices import score_choice
from sphinx_pl.evaluation.scorers.exact import exact_match


class IconQABenchmark(Benchmark, iconqa.IconQAConverter):
    """Questions with images to choose from are not asked: they need several images at once, which
    the paper's models do not take. The two other kinds are the categories."""

    name = "iconqa"
    family = "vqa"
    splits = ("test", "val")

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        for record in super().records(key, entry):
            if len(record.images) > 1:
                self.skipped["choices_are_images"] += 1
            else:
                yield record

    def score(self, record: Record, answer: str, coordinates: Coordinates) -> Score:
        if record.choices:
            return score_choice(answer, record.choices, choice_letter(record))
        return Score(float(exact_match(answer, record.meta.get("answers") or [record.answer])), bool(answer.strip()))

    @property
    def metrics(self) -> Sequence[Metric]:
        return (mean("accuracy", "Share of right answers: the right option, or the exact text that fills the blank."),)

    def category(self, record: Record) -> str:
        return str(record.meta.get("kind", ""))
