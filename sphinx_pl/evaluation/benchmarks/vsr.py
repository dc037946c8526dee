"""VSR: whether a statement about a spatial relation is true of an image (Liu et al. 2023, arXiv 2205.00363).

Files: `test.jsonl` of the random and of the zeroshot split, as the converter says (`sphinx_pl.data.converters.vsr`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sphinx_pl.data.converters import vsr
from sphinx_pl.data.converters.common import asked
from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.schema import Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.evaluation.benchmarks import Benchmark, Verdict
from sphinx_pl.evaluation.measures import Measure, mean
from sphinx_pl.evaluation.scorers.exact import read_truth, vsr_match


class VSR(Benchmark, vsr.VSRConverter):
    """Asked in the original's words, with nothing after the question; both true and yes, false and no will do."""

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
        if read_truth(record.answer) is None:
            raise SkipSample("label_unknown", f"{key}: {record.answer}")
        return record

    def verdict(self, record: Record, answer: str, coordinates: Coordinates) -> Verdict:
        right = vsr_match(answer, read_truth(record.answer) is True)
        return Verdict(float(right), read_truth(answer) is not None)

    @property
    def measures(self) -> Sequence[Measure]:
        return (mean("accuracy", "Share of right answers; half of the statements are true."),)
