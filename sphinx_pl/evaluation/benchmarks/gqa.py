"""GQA: compositional questions, the balanced ones of testdev (Hudson and Manning 2019, arXiv
1902.09506).

File: `testdev_balanced_questions.json` of questions1.2.zip, as the converter says
(`sphinx_pl.data.converters.gqa`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from sphinx_pl.data.converters import gqa
from sphinx_pl.data.schema import Record
from sphinx_pl.evaluation.benchmarks.short_answers import ShortAnswerBenchmark
from sphinx_pl.evaluation.runner import Prediction
from sphinx_pl.evaluation.scorers.exact import exact_match


class GQABenchmark(ShortAnswerBenchmark, gqa.GQAConverter):
    """Parts are those of the official script that need no other file: binary and open questions,
    structural and semantic types. Consistency, validity, plausibility and distribution are not
    computed."""

    name = "gqa"
    family = "vqa"
    splits = ("testdev", "val")
    metric = "accuracy", "Share of answers that are the true one, but for case and a full stop at the end."

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        for record in super().records(key, entry):
            types = record.meta["types"] or {}
            meta = {name: str(types.get(name) or "") for name in ("structural", "semantic")}
            yield dataclasses.replace(record, meta=meta)

    def agreement(self, prediction: str, answers: Sequence[str]) -> float:
        return float(exact_match(prediction, answers))

    def category(self, record: Record) -> str:
        return str(record.meta.get("structural", ""))

    def groups(self, prediction: Prediction) -> Sequence[str]:
        meta = prediction.record.get("meta", {})
        structural, semantic = meta.get("structural"), meta.get("semantic")
        parts = ["open" if structural == "query" else "binary", f"structural/{structural}"] if structural else []
        return [*parts, f"semantic/{semantic}"] if semantic else parts
