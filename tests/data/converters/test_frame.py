"""What the frame does for every converter, with VQAv2 as the example."""

from __future__ import annotations

from pathlib import Path

import pytest

from sphinx_pl.data.converters import check
from sphinx_pl.data.schema import ImageRef, Record, Turn
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.utils.errors import UserError

from .conftest import Run

QUESTIONS = "v2_OpenEnded_mscoco_train2014_questions.json"
ANNOTATIONS = "v2_mscoco_train2014_annotations.json"


@pytest.mark.parametrize("questions", [[], {}, {"questions": None}, {"questions": 5}])
def test_a_file_that_is_wrong_as_a_whole_is_an_error_of_the_user(run: Run, questions: object) -> None:
    with pytest.raises(UserError, match="is not as https"):
        run("vqav2", {QUESTIONS: questions, ANNOTATIONS: {"annotations": []}})


def test_a_missing_file_is_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=ANNOTATIONS):
        run("vqav2", {QUESTIONS: {"questions": []}})
    assert not (tmp_path / "out.jsonl").exists()


def record(**fields: object) -> Record:
    return Record(**({"key": "1", "task": "chat", "question": "a?", "answer": "b"} | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record(images=(ImageRef("../a.jpg"),)), "image_path"),
        (record(images=(ImageRef("/a.jpg"),)), "image_path"),
        (record(turns=(Turn("see <image>", "b"),)), "image_absent"),
        (record(question="\ud800"), "entry_malformed"),
        (record(task="multiple_choice", images=(ImageRef("a.jpg"),), choices=(1, 2), answer=1), "entry_malformed"),
        (record(task="short_vqa"), "image_absent"),
    ],
)
def test_what_a_run_could_not_use_is_refused(bad: Record, reason: str) -> None:
    with pytest.raises(SkipSample) as caught:
        check(bad)
    assert caught.value.reason == reason
