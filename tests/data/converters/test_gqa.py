"""Structure: https://cs.stanford.edu/people/dorarad/gqa/about.html ("Dataset Visualization", the questions' fields)."""

from __future__ import annotations

from .conftest import Run


def test_short_answers_and_yes_or_no(run: Run) -> None:
    room = {
        "semantic": [{"operation": "query", "dependencies": [0], "argument": "room"}],
        "entailed": ["20644645"],
        "equivalent": ["20644644"],
        "question": "Which room is it?",
        "imageId": "n250821",
        "isBalanced": True,
        "groups": {"global": "room", "local": "02q-room"},
        "answer": "bedroom",
        "semanticStr": "select: scene->query: room [0]",
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": {"detailed": "place", "semantic": "global", "structural": "query"},
        "fullAnswer": "It is a bedroom.",
        "unknown_field": {},
    }
    verify = room | {"question": "Is it indoors?", "answer": "yes", "fullAnswer": "Yes, it is indoors."}
    records, report = run(
        "gqa",
        {
            "testdev_balanced_questions.json": {
                "20644644": room,
                "20644645": verify,
                "20644646": room | {"imageId": 5},
                "20644647": {"question": "Broken: no image?"},
                "20644648": room | {"answer": ""},
            }
        },
        split="testdev",
    )
    assert [(record.task, record.question, record.answer) for record in records] == [
        ("short_vqa", "Which room is it?", "bedroom"),
        ("yes_no", "Is it indoors?", "yes"),
    ]
    assert records[0].images[0].path == "images/n250821.jpg"
    assert records[0].meta == {"full_answer": "It is a bedroom.", "types": room["types"]}
    assert report.dropped == {"entry_malformed": 2, "answer_empty": 1}
