"""GQA: its parts are those of the official script."""

from __future__ import annotations

from pathlib import Path

import pytest

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.evaluation.benchmarks import BENCHMARKS, load
from tests.evaluation.official import gqa_summary

from .vqa_files import GQA, write


def test_parts_are_those_of_the_official_summary(tmp_path: Path) -> None:
    check = GQA | {"answer": "yes", "types": {"structural": "verify", "semantic": "rel"}}
    untyped = {key: value for key, value in GQA.items() if key != "types"}
    entries = {"1": GQA, "2": check, "3": check | {"answer": "no"}, "4": untyped, "5": {"imageId": 5}}
    write(tmp_path, {"testdev_balanced_questions.json": entries})
    asked = load("gqa", BENCHMARKS["gqa"](tmp_path))
    assert [record.images[0].path for record in asked.records] == [str(tmp_path / "images/n1.jpg")] * 4
    assert asked.lost == {"entry_malformed": 1}
    answers = ("Cat.", "yes", "Yes", "cats")
    predictions = [
        asked.benchmark.score_answer(r, a, Coordinates()) for r, a in zip(asked.records, answers, strict=True)
    ]
    assert [prediction.score for prediction in predictions] == [1.0, 1.0, 0.0, 0.0]
    assert [prediction.topic for prediction in predictions] == ["query", "verify", "verify", ""]
    values = {value["category"]: value["value"] for value in asked.result(predictions, {})["values"]}
    official = gqa_summary([(True, "query", "obj"), (True, "verify", "rel"), (False, "verify", "rel")])
    assert values.pop("") == 0.5
    assert values == pytest.approx({name: value for name, value in official.items() if name != "accuracy"})
