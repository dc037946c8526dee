"""Structure: https://okvqa.allenai.org/download.html, in VQA's format (https://visualqa.org/download.html)."""

from __future__ import annotations

from .conftest import Run


def test_the_most_frequent_answer_is_trained_on(run: Run) -> None:
    def annotation(question: int, *answers: str) -> dict[str, object]:
        return {
            "image_id": 51606,
            "answer_type": "other",
            "question_type": "four",
            "question_id": question,
            "answers": [
                {"answer_id": i, "raw_answer": answer, "answer_confidence": "yes", "answer": answer}
                for i, answer in enumerate(answers, 1)
            ],
            "confidence": 3,
        }

    records, report = run(
        "okvqa",
        {
            "OpenEnded_mscoco_val2014_questions.json": {
                "info": {"version": "1.1"},
                "questions": [
                    {"image_id": 51606, "question": "What is the hairstyle called?", "question_id": 516065, "new": 1},
                    {"image_id": 51606, "question": "Broken: nobody answered?", "question_id": 516066},
                    {"image_id": 51606, "question": "Is it old?", "question_id": 516067},
                ],
            },
            "mscoco_val2014_annotations.json": {
                "question_types": {"four": "Sports and Recreation"},
                "annotations": [
                    annotation(516065, "braid", "pony tail", "pony tail"),
                    annotation(516066),
                    annotation(516067, "no", "no"),
                ],
            },
        },
        split="val",
    )
    assert [(record.task, record.question, record.answer) for record in records] == [
        ("short_vqa", "What is the hairstyle called?", "pony tail"),
        ("yes_no", "Is it old?", "no"),
    ]
    assert records[0].images[0].path == "val2014/COCO_val2014_000000051606.jpg"
    assert records[0].meta["answers"] == ["braid", "pony tail", "pony tail"]
    assert report.dropped == {"answers_empty": 1}
