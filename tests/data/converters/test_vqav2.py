"""Structure: https://visualqa.org/download.html ("Input Questions Format", "Annotation Format")."""

from __future__ import annotations

from .conftest import Run


def test_the_most_frequent_answer_is_trained_on_and_all_are_kept(run: Run) -> None:
    info = {
        "info": {"version": "2.0"},
        "license": {"name": "CC BY 4.0"},
        "data_type": "mscoco",
        "data_subtype": "train2014",
    }
    questions = [
        {"question_id": 9000, "image_id": 9, "question": "What color is the bowl?", "unknown_field": [1]},
        {"question_id": 9001, "image_id": 9, "question": "How many forks?"},
        {"question_id": 9002, "image_id": "nine", "question": "broken: the id is a word"},
        {"question_id": 9003, "image_id": 9, "question": "Is it full?"},
    ]
    annotations = [
        {
            "question_id": question["question_id"],
            "image_id": 9,
            "question_type": "what color is the",
            "answer_type": "other",
            "multiple_choice_answer": answer,
            "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)],
        }
        for question, answer in zip(questions, ["red", "2", "x", "yes"], strict=True)
    ]
    records, report = run(
        "vqav2",
        {
            "v2_OpenEnded_mscoco_train2014_questions.json": info
            | {
                "task_type": "Open-Ended",
                "questions": [*questions, {"question_id": 9004, "image_id": 9, "question": "No annotation?"}],
            },
            "v2_mscoco_train2014_annotations.json": info | {"annotations": [*annotations, "broken: not an object"]},
        },
    )
    assert [(record.task, record.question, record.answer) for record in records] == [
        ("short_vqa", "What color is the bowl?", "red"),
        ("short_vqa", "How many forks?", "2"),
        ("yes_no", "Is it full?", "yes"),
    ]
    assert records[0].images[0].path == "train2014/COCO_train2014_000000000009.jpg"
    assert records[0].meta == {
        "answers": ["red"] * 10,
        "question_type": "what color is the",
        "answer_type": "other",
    }
    assert report.dropped == {"entry_malformed": 1, "annotation_missing": 1}
