"""OCR-VQA: questions about book covers (Mishra et al. 2019).

File: `dataset.json`, as the converter says (`sphinx_pl.data.converters.ocrvqa`).
"""

from __future__ import annotations

from collections.abc import Sequence

from sphinx_pl.data.converters import ocrvqa
from sphinx_pl.evaluation.benchmarks.short_answers import ShortAnswers
from sphinx_pl.evaluation.scorers.exact import exact_match


class OCRVQA(ShortAnswers, ocrvqa.OCRVQAConverter):
    """Questions with a blank answer (no author is known, say) are not asked. Titles get the room that they need."""

    name = "ocrvqa"
    family = "documents"
    splits = ("test", "val")
    max_new_tokens = 64
    measure = (
        "accuracy",
        "Share of answers that are the true one, but for case, white space and a full stop at the end.",
    )

    def score(self, prediction: str, answers: Sequence[str]) -> float:
        return float(exact_match(prediction, answers))
