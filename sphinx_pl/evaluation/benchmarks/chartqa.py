"""ChartQA: questions about charts, written by people or made of captions (Masry et al. 2022, arXiv
2203.10244).

Files (https://github.com/vis-nlp/ChartQA, folder "ChartQA Dataset"): `test/test_human.json` and
`test/test_augmented.json`, lists of {"imgname", "query", "label"}. Images are test/png/{imgname}.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sphinx_pl.data.converters.common import question_record, text
from sphinx_pl.data.schema import Record
from sphinx_pl.evaluation.benchmarks.short_answers import ShortAnswerBenchmark
from sphinx_pl.evaluation.scorers.chartqa import relaxed_match


class ChartQABenchmark(ShortAnswerBenchmark):
    """Categories are the two files. The number of all questions is the mean of both, since they are
    equally long."""

    name = "chartqa"
    title = "ChartQA"
    url = "https://github.com/vis-nlp/ChartQA"
    licence = "GPL-3.0"
    family = "documents"
    splits = ("test", "val")
    max_new_tokens = 32
    metric = "relaxed accuracy", "Share of answers within 5 % of a true number, or equal to a true text but for case."

    def entries(self) -> Iterator[tuple[str, Any]]:
        for kind in ("human", "augmented"):
            name = f"{self.split}/{self.split}_{kind}.json"
            for number, entry in enumerate(self.json_items(name)):
                yield f"{kind}-{number}", entry

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        image, label = f"{self.split}/png/{text(entry['imgname'])}", text(entry["label"])
        meta = {"answers": [label], "category": key.partition("-")[0]}
        yield question_record(key, image, text(entry["query"]), label, meta)

    def agreement(self, prediction: str, answers: Sequence[str]) -> float:
        return float(any(relaxed_match(prediction, answer) for answer in answers))
