"""VSR: whether a statement about a spatial relation is true of an image (Liu et al. 2023, arXiv
2205.00363).

Files: `test.jsonl` of the random and of the zeroshot split, as the converter says
(`sphinx_pl.data.converters.vsr`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sphinx_pl.data.answer_parsing import TRUE_FALSE, read_yes_or_no
from sphinx_pl.data.converters import vsr
from sphinx_pl.data.converters.common import asked
from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.schema import Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.evaluation.benchmarks.base import Benchmark
from sphinx_pl.evaluation.metrics import Metric, mean
from sphinx_pl.evaluation.scorers.base import Score
from sphinx_pl.evaluation.scorers.yes_no import score_yes_no


class VSRBenchmark(Benchmark, vsr.VSRConverter):
    """The question has the original's words and nothing after them. True and yes count alike, as do
    false and no."""

    name = "vsr"
    family = "vqa"
    splits = ("test", "zeroshot_test", "dev", "zeroshot_dev")
    max_new_tokens = 10
    closed = ("true", "false")

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        for record in super().records(key, entry):
            question = f'Is the following statement "{asked(entry["caption"])}" true or false?'
            answer = "true" if record.answer == "yes" else "false"
            yield dataclasses.replace(record, task="chat", question=question, answer=answer)

    def annotation(self, key: str, entry: Mapping[str, Any]) -> Record:
        record = dataclasses.replace(super().annotation(key, entry), task="chat")
        if read_yes_or_no(record.answer, words=TRUE_FALSE) is None:
            raise SkipSample("label_unknown", f"{key}: {record.answer}")
        return record

    def score(self, record: Record, answer: str, coordinates: Coordinates) -> Score:
        truth = read_yes_or_no(record.answer, words=TRUE_FALSE) is True
        return score_yes_no(answer, truth, words=TRUE_FALSE)

    @property
    def metrics(self) -> Sequence[Metric]:
        return (mean("accuracy", "Share of right answers; half of the statements are true."),)
