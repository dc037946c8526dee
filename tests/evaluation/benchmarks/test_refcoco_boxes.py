"""Structure: as the converter's test says; the unified annotation as `evaluate.py` of the original reads it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.evaluation.benchmarks.refcoco import RefCOCOBenchmark, RefCOCOgBenchmark, RefCOCOPlusBenchmark
from sphinx_pl.utils.errors import UserError

from .conftest import Ask, Say

Write = Callable[..., Path]

INSTANCES = {
    "images": [{"file_name": "COCO_train2014_000000581857.jpg", "id": 581857, "width": 640, "height": 427}],
    "annotations": [
        {"id": 1, "image_id": 581857, "bbox": [100, 100, 200, 100]},
        {"id": 2, "image_id": 581857, "bbox": [100, 100, -3, 100]},
    ],
    "categories": [],
}


def ref(number: int, *sentences: str, split: str = "testA", ann_id: int = 1) -> dict[str, Any]:
    items = [{"sent": sentence, "sent_id": i} for i, sentence in enumerate(sentences)]
    return {"ref_id": number, "ann_id": ann_id, "image_id": 581857, "split": split, "sentences": items}


def files(*refs: Any, name: str = "refs(unc).p") -> dict[str, Any]:
    return {"instances.json": INSTANCES, name: pickle.dumps(list(refs), 2)}


def box(record: Record, x1: float, y1: float, x2: float, y2: float) -> str:
    return Coordinates(3).box((x1, y1, x2, y2), record.sizes[0])


def test_each_phrase_is_asked_for_its_box(ask: Ask, write: Write, question: Say) -> None:
    src = write(
        files(
            ref(0, "lady in blue", "the left lady"),
            ref(1, "of another split", split="val"),
            ref(2, "no such box", ann_id=9),
        )
    )
    images = src.parent / "coco"
    images.mkdir()
    asked = ask(RefCOCOBenchmark(src, "testA", images), lambda record: box(record, 100, 100, 300, 200))
    first, _ = asked.questions.records
    assert first.images == (ImageRef(str(images / "train2014/COCO_train2014_000000581857.jpg")),)
    assert question(first) == (
        "Please provide the bounding box coordinate of the region this sentence describes: lady in blue."
    )
    assert asked.values == {("accuracy", ""): 1}
    assert asked.result["lost"] == {"object_unknown": 1}


@pytest.mark.parametrize(
    ("answer", "score", "parsed"),
    [
        ((100, 100, 300, 200), 1, True),
        ((100, 100, 200, 200), 1, True),  # half of it: exactly 0.5, and pixels of the file, not of the square
        ((100, 100, 198, 200), 0, True),
        ((100, 90, 300, 190), 1, True),
        ("to the left", 0, False),
        ("[0.1,0.2,0.3]", 0, False),
    ],
)
def test_the_overlap_counts_from_one_half(ask: Ask, write: Write, answer: Any, score: int, parsed: bool) -> None:
    benchmark = RefCOCOBenchmark(write(files(ref(0, "it"))), "testA")
    asked = ask(benchmark, lambda record: answer if isinstance(answer, str) else Coordinates(6).box(answer, (640, 427)))
    (prediction,) = asked.predictions
    assert (prediction.score, prediction.parsed) == (score, parsed)


def test_the_other_two_and_their_splits(ask: Ask, write: Write) -> None:
    plus = ask(RefCOCOPlusBenchmark(write(files(ref(0, "it", split="testB"))), "testB"), lambda record: "")
    assert [record.key for record in plus.questions.records] == ["it/0-0-rec"]
    g = ask(RefCOCOgBenchmark(write(files(ref(0, "it", split="test"), name="refs(umd).p")), "test"), lambda record: "")
    assert (g.values["accuracy", ""], g.result["unparsed"]) == (0, 1)
    with pytest.raises(UserError, match="refcocog has no split 'testA'"):
        RefCOCOgBenchmark(write({}), "testA")


def test_a_pickle_runs_nothing(write: Write, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.mkdir, (tmp_path / "ran",)

    with pytest.raises(UserError, match="is no pickle of plain data"):
        list(RefCOCOBenchmark(write(files(Hostile())), "testA").read())
    assert not (tmp_path / "ran").exists()


def test_the_unified_annotation(ask: Ask, write: Write) -> None:
    entry = {"image_path": "a.jpg", "question": "it", "question_id": "7_height427_width640", "gt_answers": [0, 0, 9, 9]}
    odd = [
        entry | {"question_id": "7"},
        entry | {"gt_answers": [1, 2, 3]},
        entry | {"gt_answers": "[1, 2, 3, 4]"},
        entry | {"question": " "},
        [],
    ]
    src = write({"all.json": [entry, *odd]})
    asked = ask(RefCOCOBenchmark(src / "all.json"), lambda record: box(record, 0, 0, 9, 9))
    assert asked.values == {("accuracy", ""): 1}
    assert asked.questions.records[0].sizes == ((640, 427),)
    assert asked.result["lost"] == {"entry_malformed": 4, "question_empty": 1}
