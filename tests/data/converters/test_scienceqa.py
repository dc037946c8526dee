"""Structure: https://github.com/lupantech/ScienceQA (data/scienceqa; models/base_prompt.py and tools/evaluate_acc.py
read these fields)."""

from __future__ import annotations

from .conftest import Run


def test_with_an_image_and_without(run: Run) -> None:
    problem = {
        "question": "Which of these states is farthest north?",
        "choices": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"],
        "answer": 0,
        "hint": "",
        "image": "image.png",
        "task": "closed choice",
        "grade": "grade2",
        "subject": "social science",
        "topic": "geography",
        "category": "Geography",
        "skill": "Read a map: cardinal directions",
        "lecture": "Maps have four cardinal directions.",
        "solution": "",
        "split": "train",
        "unknown_field": 1,
    }
    records, report = run(
        "scienceqa",
        {
            "problems.json": {
                "1": problem,
                "4": problem | {"image": None, "hint": "Look at the compass.", "answer": 2},
                "5": problem | {"answer": 9},
                "6": problem | {"question": " "},
                "7": problem | {"split": "test"},
            },
            "pid_splits.json": {"train": ["1", "4", "5", "6", "99"], "test": ["7"], "minitrain": ["1"]},
        },
    )
    image, text = records
    assert (image.task, image.question, image.answer) == ("multiple_choice", problem["question"], "West Virginia")
    assert image.choices == ("West Virginia", "Louisiana", "Arizona", "Oklahoma")
    assert image.images[0].path == "train/1/image.png"
    assert image.meta == {
        "subject": "social science",
        "grade": "grade2",
        "lecture": "Maps have four cardinal directions.",
    }
    assert (text.task, text.images) == ("chat", ())
    assert [(turn.question, turn.answer) for turn in text.turns] == [
        (
            "Context: Look at the compass.\nWhich of these states is farthest north?\n"
            "A. West Virginia\nB. Louisiana\nC. Arizona\nD. Oklahoma\n"
            "Answer with the option's letter from the given choices directly.",
            "C",
        )
    ]
    assert report.dropped == {"choice_missing": 1, "question_empty": 1, "problem_missing": 1}
