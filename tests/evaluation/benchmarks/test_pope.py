"""Structure: output/coco of https://github.com/AoiDragon/POPE."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sphinx_pl.data.answer_parsing import read_yes_or_no
from sphinx_pl.data.schema import ImageRef
from sphinx_pl.evaluation.benchmarks.pope import POPEBenchmark
from tests.evaluation.official import pope_scores

from .conftest import Ask


def test_figures_agree_with_the_official_ones(ask: Ask, write: Callable[..., Path]) -> None:
    labels = ["yes", "no", "yes", "no", "yes", "no"]
    texts = ["Yes", "no.", "No, there is none", "yes", "what", "None"]
    lines = [
        {"question_id": n, "image": f"{n}.jpg", "text": f"Is there a thing {n} in the image?", "label": label}
        for n, label in enumerate(labels)
    ]
    odd = ['{"question_id": 9', json.dumps({"question_id": 10, "image": "x", "text": "?", "label": "maybe"})]
    src = write({"coco_pope_popular.json": "\n".join([*map(json.dumps, lines), *odd])})
    answers = {f"it/{n}": text for n, text in enumerate(texts)}
    asked = ask(POPEBenchmark(src, "popular"), lambda record: answers[record.key])
    expected = pope_scores([read_yes_or_no(text) for text in texts], [label == "yes" for label in labels])
    values = {metric: asked.values[metric, ""] for metric in ("accuracy", "precision", "recall", "f1", "yes")}
    assert values == pytest.approx(
        {"accuracy": expected.accuracy, "precision": expected.precision, "recall": expected.recall}
        | {"f1": expected.f1, "yes": expected.yes_ratio}
    )
    assert asked.result["unparsed"] == 2
    assert asked.result["lost"] == {"entry_malformed": 2}
    assert asked.questions.records[0].images == (ImageRef(str(src / "0.jpg")),)
