"""Structure: https://ocr-vqa.github.io (dataset.json; loadDataset.py beside it names the images and the splits)."""

from __future__ import annotations

from .conftest import Run


def test_each_question_of_a_book_is_a_record(run: Run) -> None:
    book = {
        "imageURL": "http://ecx.images-amazon.com/images/I/61Y5cOdHJbL.jpg",
        "questions": ["Who wrote this book?", "What is the title of this book?", "Is this a games related book?"],
        "answers": ["", "Mom's Family Wall Calendar 2016", "No"],
        "title": "Mom's Family Wall Calendar 2016",
        "authorName": "",
        "genre": "Calendars",
        "split": 1,
        "unknown_field": 1,
    }
    records, report = run(
        "ocrvqa",
        {
            "dataset.json": {
                "761183272": book,
                "1": book | {"split": 2},
                "2": book | {"split": 3},
                "3": book | {"split": 4},
                "4": book | {"answers": ["one"]},
                "5": "broken",
            }
        },
    )
    assert [(record.task, record.question, record.answer) for record in records] == [
        ("short_vqa", "What is the title of this book?", "Mom's Family Wall Calendar 2016"),
        ("yes_no", "Is this a games related book?", "no"),
    ]
    assert {record.images[0].path for record in records} == {"images/761183272.jpg"}
    assert report.entries == 4
    assert report.dropped == {"split_unknown": 1, "answers_count": 1, "entry_malformed": 1}
    assert report.skipped == {"answer_empty": 1}
