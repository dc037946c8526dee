"""Every value of every file replaced by what it should not be: a converter drops it or names the file, never fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sphinx_pl.data.converters import CONVERTERS, convert
from sphinx_pl.utils.errors import UserError
from tests.fuzzing import replaced

from .conftest import Run

VQA = {"question_id": 1, "image_id": 9, "question": "What?"}
ANSWERS = {"question_id": 1, "multiple_choice_answer": "a", "answers": [{"answer": "a"}]}
CHAT = [
    {"id": "1", "image": "1.jpg", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
]
CHOICES = {"question": "Which?", "choices": ["a", "b"], "answer": 1}

FILES: dict[str, dict[str, Any]] = {
    "vqav2": {
        "v2_OpenEnded_mscoco_train2014_questions.json": {"questions": [VQA]},
        "v2_mscoco_train2014_annotations.json": {"annotations": [ANSWERS]},
    },
    "okvqa": {
        "OpenEnded_mscoco_train2014_questions.json": {"questions": [VQA]},
        "mscoco_train2014_annotations.json": {"annotations": [ANSWERS]},
    },
    "aokvqa": {
        "aokvqa_v1p0_train.json": [
            VQA | {"choices": ["a", "b"], "correct_choice_idx": 1, "direct_answers": ["a"], "rationales": ["c"]}
        ]
    },
    "gqa": {"train_balanced_questions.json": {"1": {"imageId": "9", "question": "What?", "answer": "a"}}},
    "ocrvqa": {"dataset.json": {"1": {"imageURL": "a/b.jpg", "questions": ["What?"], "answers": ["a"], "split": 1}}},
    "textvqa": {
        "TextVQA_0.5.1_train.json": {"data": [VQA | {"image_id": "9", "answers": ["a", "b"]}]},
    },
    "textcaps": {"TextCaps_0.1_train.json": {"data": [{"image_id": "9", "caption_id": 1, "caption_str": "a"}]}},
    "vizwiz": {"train.json": [{"image": "1.jpg", "question": "What?", "answers": [{"answer": "a"}], "answerable": 1}]},
    "scienceqa": {
        "problems.json": {"1": CHOICES | {"image": "image.png", "hint": "a", "split": "train"}},
        "pid_splits.json": {"train": ["1"]},
    },
    "iconqa": {
        "iconqa/train/choose_txt/1/data.json": CHOICES,
        "iconqa/train/choose_img/2/data.json": CHOICES,
        "iconqa/train/fill_in_blank/3/data.json": {"question": "What?", "answer": "1"},
    },
    "vsr": {
        "random/train.jsonl": [{"image": "1.jpg", "image_link": "x/train2017/1.jpg", "caption": "A cat.", "label": 1}]
    },
    "llava_instruct": {"llava_instruct_150k.json": CHAT},
    "llavar": {"llava_instruct_150k_llavar_20k.json": CHAT},
    "sharegpt": {"ShareGPT_V3_unfiltered_cleaned_split.json": CHAT},
}
JUNK = (None, True, -1, 1.5, float("nan"), "", "\ud800", "../x", [], [[]], {}, {"a": 1})


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(part, (*path, key))


@pytest.mark.parametrize("name", FILES)
def test_no_value_breaks_a_conversion(run: Run, tmp_path: Path, name: str) -> None:
    assert run(name, FILES[name])[0]
    for place, content in FILES[name].items():
        for path in places(content):
            for junk in JUNK:
                lines = place.endswith(".jsonl")
                if (lines and not path) or (isinstance(junk, str) and len(path) <= lines):
                    continue  # the fixture writes these as they are
                files = FILES[name] | {place: replaced(content, path, junk)}
                try:
                    run(name, files)
                except UserError as error:
                    assert name in str(error)  # noqa: PT017 - it may also be of use as it is


@pytest.mark.parametrize("name", FILES)
def test_a_folder_without_the_files_is_an_error_of_the_user(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=name):
        convert(CONVERTERS[name](tmp_path, CONVERTERS[name].splits[0]), tmp_path / "out.jsonl")
