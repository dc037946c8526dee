"""ScienceQA and IconQA: which questions are asked, and how their letters count."""

from __future__ import annotations

from pathlib import Path

import pytest

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.evaluation.benchmarks import BENCHMARKS, load
from sphinx_pl.evaluation.scorers.tasks import last_turn
from tests.evaluation.official import scienceqa_summary

from .vqa_files import FILES, PROBLEM, write


def test_scienceqa_asks_questions_with_an_image_and_reports_the_papers_columns(tmp_path: Path) -> None:
    problems = {
        "1": PROBLEM,
        "2": PROBLEM | {"image": None},
        "3": PROBLEM | {"hint": "", "grade": "grade8", "subject": "social science", "answer": 0},
        "4": PROBLEM | {"grade": "grade7", "subject": "language science"},
        "5": PROBLEM | {"answer": 2},
    }
    splits = {"test": [*problems, "6"], "val": []}
    write(tmp_path, {"problems.json": problems, "pid_splits.json": splits})
    asked = load("sqa", BENCHMARKS["scienceqa"](tmp_path))
    assert [record.images[0].path for record in asked.records] == [
        str(tmp_path / f"test/{number}/image.png") for number in (1, 3, 4)
    ]
    assert asked.lost == {"image_none": 1, "choice_missing": 1, "problem_missing": 1}
    assert "lecture" not in asked.records[0].meta
    assert last_turn(asked.records[0], Coordinates()).question == (
        "Context: Animals.\nWhich is bigger?\nA. ant\nB. elephant\n"
        "Answer with the option's letter from the given choices directly."
    )
    answers = ("B. elephant", "The answer is B.", "elephant")
    predictions = [
        asked.benchmark.score_answer(r, a, Coordinates()) for r, a in zip(asked.records, answers, strict=True)
    ]
    assert [(prediction.score, prediction.parsed) for prediction in predictions] == [(1, True), (0, True), (1, True)]
    assert not asked.benchmark.score_answer(asked.records[0], "A or B", Coordinates()).parsed
    values = {value["category"]: value["value"] for value in asked.result(predictions, {})["values"]}
    official = scienceqa_summary(
        [
            (True, "natural science", True, True, 2),
            (False, "social science", False, True, 8),
            (True, "language science", True, True, 7),
        ]
    )
    values["average"] = values["IMG"] = values.pop("")
    assert values == pytest.approx(official)


@pytest.mark.parametrize(
    ("question", "letter"),
    [
        ("Which?\nChoices:\nA. a\nB. b", "C"),
        ("Which?\nA. a\nB. b", "A"),
        ("Choices:\nB. a\nA. b", "A"),
        ("Choices:", "A"),
    ],
)
def test_a_unified_question_without_its_choices_is_skipped(tmp_path: Path, question: str, letter: str) -> None:
    good = {"image_path": "a.png", "question": "Choices:\nA. a\nB. b", "gt_answers": "A"}
    write(tmp_path, {"a.json": [good, good | {"question": question, "gt_answers": letter}]})
    asked = load("sqa", BENCHMARKS["scienceqa"](tmp_path / "a.json"))
    assert len(asked.records) == 1
    assert asked.lost == {"choice_missing": 1}


def test_iconqa_asks_one_image_at_a_time(tmp_path: Path) -> None:
    write(tmp_path, FILES["iconqa"]["test"])
    asked = load("iconqa", BENCHMARKS["iconqa"](tmp_path))
    assert [asked.benchmark.category(record) for record in asked.records] == ["choose_txt", "fill_in_blank"]
    assert asked.lost == {"choices_are_images": 1}
    judged = [
        [
            (p.score, p.parsed)
            for p in (asked.benchmark.score_answer(record, answer, Coordinates()) for record in asked.records)
        ]
        for answer in ("(A)", "7.", "B", "certainly")
    ]
    assert judged == [
        [(1, True), (0, True)],
        [(0, False), (1, True)],
        [(0, True), (0, True)],
        [(0, False), (0, True)],
    ]
