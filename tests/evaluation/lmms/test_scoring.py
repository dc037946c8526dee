"""What our own tasks of lmms-eval ask, and what they count as right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from sphinx_pl.evaluation.lmms import TASKS
from sphinx_pl.evaluation.lmms.tasks import scoring
from sphinx_pl.utils.errors import UserError

TRUE = {"caption": "The cat is on the mat.", "label": 1}
FALSE = {"caption": "The cat is on the mat.", "label": 0}


def test_vsr_is_asked_as_in_training_or_as_the_original_asks_it() -> None:
    assert scoring.vsr_question(TRUE, {"wording": "yes_no"}) == (
        "Is this statement about the image true? The cat is on the mat.\n"
        "Answer the question using a single word or phrase."
    )
    assert scoring.vsr_question(TRUE, {"wording": "true_false"}) == (
        'Is the following statement "The cat is on the mat." true or false?'
    )


@pytest.mark.parametrize(
    ("doc", "answer", "score"),
    [(TRUE, "yes", 1), (TRUE, "True.", 1), (TRUE, "no", 0), (TRUE, "", 0), (TRUE, "a cat", 0), (TRUE, "yesterday", 0),
     (FALSE, "No, it is not", 1), (FALSE, "FALSE", 1), (FALSE, "true", 0), (FALSE, "none", 0)],
)  # fmt: skip
def test_vsr_reads_yes_and_true(doc: dict[str, Any], answer: str, score: int) -> None:
    assert scoring.vsr_score(doc, [answer]) == {"accuracy": score}


def test_vsr_finds_images_that_are_only_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMMS_EVAL_MEDIA_ROOT", str(tmp_path))
    doc = {"image": "1.jpg", "image_link": "http://images.cocodataset.org/train2017/1.jpg"}
    with pytest.raises(UserError, match=r"no image 1\.jpg in .*LMMS_EVAL_MEDIA_ROOT"):
        scoring.vsr_images(doc)
    (tmp_path / "train2017").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "train2017" / "1.jpg")
    assert scoring.vsr_images(doc) == [str(tmp_path / "train2017" / "1.jpg")]
    [picture] = scoring.vsr_images({"image": Image.new("L", (4, 4))})
    assert isinstance(picture, Image.Image)
    assert picture.mode == "RGB"


@pytest.mark.parametrize(("answer", "score"), [("Jane Doe", 1), (" jane  doe.", 1), ("Jane", 0), ("", 0)])
def test_ocrvqa_is_an_exact_match_but_for_case_and_spaces(answer: str, score: int) -> None:
    assert scoring.ocrvqa_score({"answer": "Jane Doe"}, [answer]) == {"exact_match": score}


def test_the_task_files_name_functions_that_exist() -> None:
    files = sorted(TASKS.glob("*.yaml"))
    assert [file.stem for file in files] == ["ocrvqa", "vsr", "vsr_true_false"]
    named = []

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: named.append(loader.construct_scalar(node)))
    for file in files:
        assert yaml.load(file.read_text(), Loader)["task"] == file.stem
    assert len(named) == 8
    for name in named:
        module, _, function = name.partition(".")
        assert module == "scoring"
        assert callable(getattr(scoring, function))
