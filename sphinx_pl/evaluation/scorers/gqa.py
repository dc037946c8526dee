"""GQA (Hudson and Manning 2019): exact match, and by question type, as in the official `eval.py`."""

from __future__ import annotations

from collections.abc import Iterable

from sphinx_pl.data.answer_parsing import normalise
from sphinx_pl.evaluation.scorers.groups import mean_by


def gqa_match(prediction: str, answer: str) -> bool:
    """Whether a prediction is GQA's answer.

    The official `eval.py` compares the strings as they are, and its answers are small words without punctuation. A
    model writes "Yes." for "yes", so the prediction is brought to that form first: small letters, single blanks, no
    full stop at the end. Nothing else is forgiven.
    """
    return normalise(prediction) == answer


def gqa_summary(results: Iterable[tuple[bool, str, str]]) -> dict[str, float]:
    """Accuracies in 0..1 as the official `eval.py` prints them.

    Args:
        results: for each question: whether it was answered right, its structural and its semantic type as in the
            question file ("verify", "query", ...; "rel", "attr", ...).

    Returns:
        `accuracy`, `binary` and `open` (structural type "query"), `structural/...` and `semantic/...`; {} of nothing.
    """
    scores: list[tuple[str, float]] = []
    for right, structural, semantic in results:
        kind = "open" if structural == "query" else "binary"
        names = ("accuracy", kind, f"structural/{structural}", f"semantic/{semantic}")
        scores += [(name, float(right)) for name in names]
    return mean_by(scores)
