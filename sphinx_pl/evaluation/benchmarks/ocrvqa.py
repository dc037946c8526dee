"""OCR-VQA: questions about book covers (Mishra et al. 2019).

File: `dataset.json`, as the converter says (`sphinx_pl.data.converters.ocrvqa`).
"""

from __future__ import annotations

from collections.abc import Sequence

from sphinx_pl.data.converters import ocrvqa
from sphinx_pl.evaluation.benchmarks.short_answers import ShortAnswerBenchmark
from sphinx_pl.evaluation.scorers.exact import exact_match


class OCRVQABenchmark(ShortAnswerBenchmark, ocrvqa.OCRVQAConverter):
    """Questions with a blank answer, such as an unknown author, are not asked. Long titles fit into
    an answer."""

    name = "ocrvqa"
    family = "documents"
    splits = ("test", "val")
    max_new_tokens = 64
    metric = (
        "accuracy",
        "Share of answers that are the true one, but for case, white space and a full stop at the end.",
    )

    def agreement(self, prediction: str, answers: Sequence[str]) -> float:
        return float(exact_match(prediction, answers))
