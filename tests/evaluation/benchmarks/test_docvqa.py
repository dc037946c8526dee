"""DocVQA, InfographicVQA and ChartQA: types, where images lie, ANLS and relaxed accuracy by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.evaluation.benchmarks import BENCHMARKS, load

from .vqa_files import CHART, INFOGRAPHIC, PAGE, write


def test_docvqa_is_reported_by_all_types_of_a_question(tmp_path: Path) -> None:
    pages = [PAGE, PAGE | {"questionId": 1, "question_types": ["form"]}, PAGE | {"questionId": 2, "answers": []}]
    write(tmp_path, {"val_v1.0_withQT.json": {"data": pages}})
    asked = load("docvqa", BENCHMARKS["docvqa"](tmp_path))
    assert asked.lost == {"entry_malformed": 1}
    # "1/8/94" is one of six characters away from "1/8/93"; "january" is three of ten away from "8 January" and more.
    answers = ("1/8/94", "9 january")
    predictions = [
        asked.benchmark.score_answer(r, a, Coordinates()) for r, a in zip(asked.records, answers, strict=True)
    ]
    assert [prediction.score for prediction in predictions] == pytest.approx([5 / 6, 8 / 9])
    values = {value["category"]: value["value"] for value in asked.result(predictions, {})["values"]}
    assert values == pytest.approx({"": (5 / 6 + 8 / 9) / 2, "form": (5 / 6 + 8 / 9) / 2, "handwritten": 5 / 6})
    assert asked.benchmark.score_answer(asked.records[0], "3", Coordinates()).score == 0.0


@pytest.mark.parametrize(("folder", "path"), [("documents", "documents/a_1.png"), ("x", "a_1.png")])
def test_docvqas_images_lie_in_a_folder_or_not(tmp_path: Path, folder: str, path: str) -> None:
    write(tmp_path, {"val_v1.0.json": {"data": [{key: PAGE[key] for key in PAGE if key != "question_types"}]}})
    (tmp_path / "images" / folder).mkdir(parents=True)
    asked = load("docvqa", BENCHMARKS["docvqa"](tmp_path, "val", tmp_path / "images"))
    assert asked.records[0].images[0].path == str(tmp_path / "images" / path)
    predictions = [asked.benchmark.score_answer(record, "8 January", Coordinates()) for record in asked.records]
    assert [value["category"] for value in asked.result(predictions, {})["values"]] == [""]


def test_infographics_have_types_of_three_kinds(tmp_path: Path) -> None:
    write(tmp_path, {"infographicsVQA_val_v1.0.json": {"data": [INFOGRAPHIC, INFOGRAPHIC | {"evidence": [1]}]}})
    asked = load("info", BENCHMARKS["infographicvqa"](tmp_path))
    assert asked.lost == {"duplicate_key": 1}
    prediction = asked.benchmark.score_answer(asked.records[0], "4 Million", Coordinates())
    assert prediction.score == 1.0
    assert list(asked.benchmark.groups(prediction)) == ["single span", "Text", "Figure"]
    assert asked.records[0].images[0].path == str(tmp_path / "37313.jpeg")


def test_chartqa_allows_five_per_cent(tmp_path: Path) -> None:
    human = [CHART, CHART | {"label": "Yes"}, CHART | {"label": 3}]
    write(tmp_path, {"test/test_human.json": human, "test/test_augmented.json": [CHART | {"label": "12%"}]})
    asked = load("chartqa", BENCHMARKS["chartqa"](tmp_path))
    assert asked.lost == {"entry_malformed": 1}
    assert asked.records[0].images[0].path == str(tmp_path / "test/png/41.png")
    answers = ("52.4", "yes", "0.13")
    predictions = [
        asked.benchmark.score_answer(r, a, Coordinates()) for r, a in zip(asked.records, answers, strict=True)
    ]
    values = {value["category"]: value["value"] for value in asked.result(predictions, {})["values"]}
    assert values == pytest.approx({"": 2 / 3, "human": 1.0, "augmented": 0.0})
    assert asked.benchmark.score_answer(asked.records[0], "52.6", Coordinates()).score == 0.0
