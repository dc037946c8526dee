"""Structure: https://github.com/lupantech/IconQA (README.md, tools/generate_img_choice_feature.py) and the data.json
that mmpretrain/datasets/iconqa.py of open-mmlab/mmpretrain quotes."""

from __future__ import annotations

import pytest

from sphinx_pl.utils.errors import UserError

from .conftest import Run

TXT = {
    "question": "How likely is it that you will pick a black one?",
    "choices": ["certain", "unlikely", "impossible", "probable"],
    "answer": 2,
    "ques_type": "choose_txt",
    "grade": "grade1",
    "label": "S2",
    "unknown_field": 1,
}
IMG = {
    "question": "Which shape comes next?",
    "choices": ["choice_0.png", "choice_1.png"],
    "answer": 1,
    "ques_type": "choose_img",
}
BLANK = {"question": "How many are there? _", "answer": "7", "ques_type": "fill_in_blank"}


def test_the_three_kinds(run: Run) -> None:
    records, report = run(
        "iconqa",
        {
            "iconqa/val/choose_txt/12/data.json": TXT,
            "iconqa/val/choose_txt/13/data.json": "{broken",
            "iconqa/val/choose_img/34/data.json": IMG,
            "iconqa/val/choose_img/35/data.json": IMG | {"choices": [1, 2]},
            "iconqa/val/choose_img/36/data.json": IMG | {"question": ""},
            "iconqa/val/fill_in_blank/56/data.json": BLANK,
            "iconqa/val/fill_in_blank/57/data.json": BLANK | {"answer": 8},
            "iconqa/val/fill_in_blank/58/data.json": BLANK | {"answer": None},
            "iconqa/train/choose_txt/1/data.json": TXT,
        },
        split="val",
    )
    txt, img, blank, number = records
    assert (txt.task, txt.question, txt.answer) == ("multiple_choice", TXT["question"], "impossible")
    assert txt.choices == ("certain", "unlikely", "impossible", "probable")
    assert [image.path for image in txt.images] == ["iconqa/val/choose_txt/12/image.png"]
    assert txt.meta == {"grade": "grade1", "label": "S2", "kind": "choose_txt"}
    assert img.task == "multiple_choice"
    assert [image.path for image in img.images] == [
        f"iconqa/val/choose_img/34/{name}.png" for name in ("image", "choice_0", "choice_1")
    ]
    assert [(turn.question, turn.answer) for turn in img.turns] == [
        (
            "<image>\nWhich shape comes next?\nA. <image>\nB. <image>\n"
            "Answer with the option's letter from the given choices directly.",
            "B",
        )
    ]
    assert [(record.task, record.question, record.answer) for record in (blank, number)] == [
        ("short_vqa", "How many are there? _", "7"),
        ("short_vqa", "How many are there? _", "8"),
    ]
    assert report.dropped == {"entry_malformed": 3, "question_empty": 1}


def test_a_folder_without_the_data_is_an_error_of_the_user(run: Run) -> None:
    with pytest.raises(UserError, match="choose_txt"):
        run("iconqa", {"problems.json": {}})
