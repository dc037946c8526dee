"""VQAv2, OK-VQA, VizWiz, TextVQA: what is read, and VQA accuracy by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.evaluation.benchmarks import BENCHMARKS, load
from sphinx_pl.evaluation.scorers.tasks import last_turn

from .vqa_files import FILES, VQA, VQA_TRUTH, VQA_YES, VQA_YES_TRUTH, write

# Seven of ten said red, three pink: of those who are not left out, 2.7 on average agree with "pink".
PINK = (7 * 1 + 3 * 2 / 3) / 10


@pytest.mark.parametrize(
    ("answer", "score"), [("red", 1.0), ("Red.", 1.0), ("the red", 1.0), ("pink", PINK), ("reddish", 0.0)]
)
def test_accuracy_is_the_share_of_three_people_who_agree(tmp_path: Path, answer: str, score: float) -> None:
    write(tmp_path, FILES["vqav2"]["val"])
    asked = load("vqa", BENCHMARKS["vqav2"](tmp_path))
    assert asked.benchmark.score_answer(asked.records[0], answer, Coordinates()).score == pytest.approx(score)


@pytest.mark.parametrize("answer", ["yes", "Yes", "Yes."])
def test_where_all_agree_form_does_not_count_either(tmp_path: Path, answer: str) -> None:
    everyone = [{"answer": "Yes."}] * 10
    truth = VQA_YES_TRUTH | {"answers": everyone}
    files = FILES["vqav2"]["val"] | {"v2_mscoco_val2014_annotations.json": {"annotations": [VQA_TRUTH, truth]}}
    write(tmp_path, files)
    asked = load("vqa", BENCHMARKS["vqav2"](tmp_path))
    assert asked.benchmark.score_answer(asked.records[1], answer, Coordinates()).score == 1.0


def test_vqav2_is_reported_by_the_type_of_its_answers(tmp_path: Path) -> None:
    questions = [VQA, VQA_YES, VQA_YES | {"question_id": 9002}, {"question_id": 9003, "image_id": 9, "question": "?"}]
    annotations = [VQA_TRUTH, VQA_YES_TRUTH, VQA_YES_TRUTH | {"question_id": 9002}]
    write(
        tmp_path,
        {
            "v2_OpenEnded_mscoco_val2014_questions.json": {"questions": questions},
            "v2_mscoco_val2014_annotations.json": {"annotations": annotations},
        },
    )
    asked = load("vqa", BENCHMARKS["vqav2"](tmp_path))
    assert [record.images[0].path for record in asked.records] == [
        str(tmp_path / "val2014/COCO_val2014_000000000009.jpg")
    ] * 3
    answers = ("pink", "yes", "no")
    predictions = [
        asked.benchmark.score_answer(r, a, Coordinates()) for r, a in zip(asked.records, answers, strict=True)
    ]
    result = asked.result(predictions, {})
    values = {value["category"]: value["value"] for value in result["values"]}
    assert values == pytest.approx({"": (PINK + 1) / 3, "other": PINK, "yes/no": 0.5})
    assert result["lost"] == {"annotation_missing": 1}
    # The type is that of the answer, so a limit draws from all questions alike.
    assert len(load("vqa", BENCHMARKS["vqav2"](tmp_path), limit=1).records) == 1


def test_test_questions_lie_with_cocos_test2015(tmp_path: Path) -> None:
    write(tmp_path, FILES["vqav2"]["test-dev"])
    record = load("vqa", BENCHMARKS["vqav2"](tmp_path, "test-dev")).records[0]
    assert record.images[0].path == str(tmp_path / "test2015/COCO_test2015_000000000009.jpg")


def test_okvqa_has_kinds_of_knowledge(tmp_path: Path) -> None:
    write(tmp_path, FILES["okvqa"]["val"])
    asked = load("okvqa", BENCHMARKS["okvqa"](tmp_path))
    assert [asked.benchmark.category(r) for r in asked.records] == ["Objects, Material and Clothing", "Other"]
    del FILES_WITHOUT["mscoco_val2014_annotations.json"]["question_types"]
    write(tmp_path, FILES_WITHOUT)
    asked = load("okvqa", BENCHMARKS["okvqa"](tmp_path))
    assert [asked.benchmark.category(r) for r in asked.records] == ["three", "other"]


FILES_WITHOUT = {name: dict(content) for name, content in FILES["okvqa"]["val"].items()}


@pytest.mark.parametrize(("answer", "score"), [("Unanswerable", 1.0), ("Basil.", PINK), ("thyme", 0.0)])
def test_vizwiz_is_asked_with_its_hint(tmp_path: Path, answer: str, score: float) -> None:
    write(tmp_path, FILES["vizwiz"]["val"])
    asked = load("vizwiz", BENCHMARKS["vizwiz"](tmp_path))
    (record,) = asked.records
    assert last_turn(record, Coordinates()).question == (
        "What is this? When the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase."
    )
    assert asked.benchmark.category(record) == "unanswerable"
    assert asked.benchmark.score_answer(record, answer, Coordinates()).score == pytest.approx(score)


def test_textvqa_asks_what_cannot_be_answered_too(tmp_path: Path) -> None:
    write(tmp_path, FILES["textvqa"]["val"])
    asked = load("textvqa", BENCHMARKS["textvqa"](tmp_path))
    assert [record.answer for record in asked.records] == ["nokia", "unanswerable"]
    assert asked.records[0].images[0].path == str(tmp_path / "train_images/a.jpg")
    assert asked.benchmark.score_answer(asked.records[0], "Nokia, the", Coordinates()).score == 1.0
