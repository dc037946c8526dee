"""GQA: compositional questions, the balanced ones of testdev (Hudson and Manning 2019, arXiv 1902.09506).

File: `testdev_balanced_questions.json` of questions1.2.zip, as the converter says (`sphinx_pl.data.converters.gqa`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from sphinx_pl.data.answer_parsing import normalise
from sphinx_pl.data.converters import gqa
from sphinx_pl.data.schema import Record
from sphinx_pl.evaluation.benchmarks.short_answers import ShortAnswers
from sphinx_pl.evaluation.runner import Prediction
from sphinx_pl.evaluation.scorers.gqa import gqa_match


class GQA(ShortAnswers, gqa.GQAConverter):
    """Parts are those of the official script that need no other file: binary and open questions, structural and
    semantic types. Consistency, validity, plausibility and distribution are left out."""

    name = "gqa"
    family = "vqa"
    splits = ("testdev", "val")
    measure = "accuracy", "Share of answers that are the true one, but for case and a full stop at the end."

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        for record in super().records(key, entry):
            types = record.meta["types"] or {}
            meta = {name: str(types.get(name) or "") for name in ("structural", "semantic")}
            yield dataclasses.replace(record, meta=meta)

    def score(self, prediction: str, answers: Sequence[str]) -> float:
        return float(any(gqa_match(prediction, normalise(answer)) for answer in answers))

    def category(self, record: Record) -> str:
        return str(record.meta.get("structural", ""))

    def groups(self, prediction: Prediction) -> Sequence[str]:
        meta = prediction.record.get("meta", {})
        structural, semantic = meta.get("structural"), meta.get("semantic")
        found = ["open" if structural == "query" else "binary", f"structural/{structural}"] if structural else []
        return [*found, f"semantic/{semantic}"] if semantic else found
