"""Structure: https://github.com/allenai/aokvqa (README.md, "Example dataset entry", and load_aokvqa.py)."""

from __future__ import annotations

from .conftest import Run


def test_choices_and_direct_answers_are_records_of_their_own(run: Run) -> None:
    entry = {
        "split": "train",
        "image_id": 299207,
        "question_id": "22MexNkBPpdZGX6sxbxVBH",
        "question": "What is the man by the bags awaiting?",
        "choices": ["skateboarder", "train", "delivery", "cab"],
        "correct_choice_idx": 3,
        "direct_answers": ["ride", "ride", "bus", "taxi", "taxi", "taxi", "cab", "cab", "his ride", "travelling"],
        "difficult_direct_answer": False,
        "rationales": ["A train would not be on the street."],
        "unknown_field": None,
    }
    records, report = run(
        "aokvqa",
        {
            "aokvqa_v1p0_train.json": [
                entry,
                entry | {"question_id": "hard", "difficult_direct_answer": True},
                entry | {"question_id": "broken", "correct_choice_idx": 4},
                "broken",
            ]
        },
    )
    assert [(record.task, record.answer, record.choices) for record in records] == [
        ("multiple_choice", "cab", ("skateboarder", "train", "delivery", "cab")),
        ("short_vqa", "taxi", ()),
        ("multiple_choice", "cab", ("skateboarder", "train", "delivery", "cab")),
    ]
    assert {record.question for record in records} == {"What is the man by the bags awaiting?"}
    assert {record.images[0].path for record in records} == {"train2017/000000299207.jpg"}
    assert records[0].meta == {"rationales": ["A train would not be on the street."]}
    assert records[1].meta == {"rationales": entry["rationales"], "answers": entry["direct_answers"]}
    assert report.dropped == {"choice_missing": 1, "entry_malformed": 1}
    assert report.skipped == {"difficult_direct_answer": 1}
