"""Structure: https://vizwiz.org/tasks-and-datasets/vqa ("Details about each visual question")."""

from __future__ import annotations

import pytest

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.utils.errors import UserError

from .conftest import Run


def question(image: str, answerable: object, *answers: str) -> dict[str, object]:
    return {
        "image": image,
        "question": "What is this? ",
        "answers": [{"answer": answer, "answer_confidence": "maybe"} for answer in answers],
        "answer_type": "other",
        "answerable": answerable,
        "unknown_field": 1,
    }


@pytest.mark.parametrize("folder", ["", "Annotations/"])
def test_what_cannot_be_answered_is_said_to_be_so(run: Run, folder: str) -> None:
    records, report = run(
        "vizwiz",
        {
            f"{folder}train.json": [
                question("1.jpg", 1, "unanswerable", "unsuitable image", "unanswerable", "basil", "Basil", "leaf"),
                question("2.jpg", 0, "basil", "unanswerable", "unanswerable"),
                question("3.jpg", 1, "unsuitable"),
                question("4.jpg", 1, "yes"),
                question("5.jpg", "broken", "yes"),
                question("6.jpg", 1, "yes") | {"question": ""},
                {"image": "7.jpg", "question": "Of the test split?"},
                None,
            ]
        },
    )
    assert [record.answer for record in records] == ["basil", "Unanswerable", "Unanswerable", "yes"]
    assert {record.task for record in records} == {"short_vqa"}
    assert [record.images[0].path for record in records] == [f"train/{i}.jpg" for i in (1, 2, 3, 4)]
    assert records[1].meta == {
        "answers": ["basil", "unanswerable", "unanswerable"],
        "answerable": 0,
        "answer_type": "other",
    }
    assert TASKS["short_vqa"].turns(records[0], Coordinates())[0].question == (
        "What is this? "
        "When the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase."
    )
    assert report.dropped == {"entry_malformed": 2, "question_empty": 1}
    assert report.skipped == {"answers_not_public": 1}


def test_both_places_of_the_file_are_named(run: Run) -> None:
    with pytest.raises(UserError, match=r"val.json or Annotations/val.json"):
        run("vizwiz", {"train.json": []}, split="val")
