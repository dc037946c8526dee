"""The task suite: instruction files of the test's own, and `pycocotools` beside it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sphinx_pl.data.converters import CONVERTERS, convert
from sphinx_pl.data.coordinates import COCO_KEYPOINTS, Coordinates
from sphinx_pl.data.schema import Record
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.evaluation.benchmarks.detection_ocr_pose import (
    DetectionBenchmark,
    LayoutBenchmark,
    OCRBenchmark,
    PoseBenchmark,
)
from sphinx_pl.evaluation.metrics import difference
from sphinx_pl.evaluation.scorers.coco import Detection, Pose, TrueBox, TruePose, detection_ap, keypoint_ap
from sphinx_pl.utils.errors import UserError

from .conftest import Ask

Write = Callable[..., Path]
FINE = Coordinates(6)
SIZE = (640, 480)


def right(record: Record) -> str:
    return TASKS[record.task].turns(record, FINE)[-1].answer


def entry(number: int, task: str, *regions: dict[str, Any], **more: Any) -> dict[str, Any]:
    values = {"id": f"e{number}", "image": f"{number}.jpg", "width": SIZE[0], "height": SIZE[1], "task": task}
    return values | {"regions": list(regions)} | more


def thing(label: str, *box: float) -> dict[str, Any]:
    return {"label": label, "box": list(box)}


def boxes(seed: int, count: int, labels: str = "cat dog") -> list[dict[str, Any]]:
    rng = random.Random(seed)
    items = []
    for _ in range(count):
        x, y = rng.uniform(0, 400), rng.uniform(0, 300)
        items.append(thing(rng.choice(labels.split()), x, y, x + rng.uniform(20, 200), y + rng.uniform(20, 150)))
    return items


def jittered(record: Record, amount: float = 12.0) -> str:
    """Boxes moved by a few pixels, some left out and some added, by label."""
    rng = random.Random(record.key)
    (size,) = record.sizes
    answer = ""
    for region in record.regions:
        box = tuple(value + rng.uniform(-amount, amount) for value in region.box)
        answer += FINE.grounded(region.label, [box], size) if rng.random() < 0.8 else ""
        answer += FINE.grounded("dog", [(5, 5, 90, 80)], size) if rng.random() < 0.3 else ""
    return answer or "nothing"


def test_all_boxes_right_is_1_and_none_is_0(ask: Ask, write: Write) -> None:
    file = write({"test.json": [entry(n, "detection_all", *boxes(n, 5)) for n in range(4)]}) / "test.json"
    perfect = ask(DetectionBenchmark(file, "detection_all"), right)
    assert perfect.values == {
        ("AP", ""): pytest.approx(1),
        ("AP50", ""): pytest.approx(1),
        ("AP75", ""): pytest.approx(1),
    }
    silent = ask(DetectionBenchmark(file, "detection_all"), lambda record: "I see nothing")
    assert set(silent.values.values()) == {0}
    assert silent.result["unparsed"] == 4
    assert perfect.questions.records[0].images[0].path == str(file.parent / "0.jpg")


def test_layout_agrees_with_pycocotools(ask: Ask, write: Write) -> None:
    file = write({"test.json": [entry(n, "layout", *boxes(n, 9, "Text Title Table")) for n in range(12)]}) / "test.json"
    asked = ask(LayoutBenchmark(file), jittered)
    sizes: dict[Any, Any] = {}
    truth, items = [], []
    for record, prediction in zip(asked.questions.records, asked.predictions, strict=True):
        image = record.key
        sizes[image] = SIZE
        truth += [TrueBox(image, region.label.lower(), region.box) for region in record.regions]
        answer = TASKS["layout"].parse(prediction.prediction, FINE)
        items += [Detection(image, region.label.lower(), region.box) for region in answer.regions(SIZE)]
    expected = detection_ap(items, truth, sizes)
    assert 0.05 < expected["AP"] < 0.95
    for name in ("AP", "AP50", "AP75"):
        assert asked.values[name, ""] == pytest.approx(expected[name], abs=1e-12)
    (value,) = (value for value in asked.result["values"] if value["measure"] == "AP")
    assert value["low"] < value["value"] < value["high"]


def test_a_class_that_is_asked_for_has_a_precision_of_its_own(ask: Ask, write: Write) -> None:
    cats, dogs = boxes(1, 3, "cat"), boxes(2, 3, "dog")
    entries = [
        entry(1, "detection", *cats, *dogs, question="cat"),
        entry(1, "detection", *cats, *dogs, question="dog"),
        entry(2, "detection", *dogs, question="cat"),  # none there: the answer None is right
        entry(3, "pose"),
    ]
    file = write({"test.jsonl": "\n".join(map(json.dumps, entries))}) / "test.jsonl"
    asked = ask(DetectionBenchmark(file), lambda record: right(record) if record.question == "cat" else "None")
    assert asked.values["AP", "cat"] == pytest.approx(1)
    assert asked.values["AP", "dog"] == 0
    assert asked.values["AP", ""] == pytest.approx(0.5)
    assert len(asked.predictions) == 3
    assert asked.result["unparsed"] == 0


def test_two_models_are_compared_image_by_image(ask: Ask, write: Write) -> None:
    file = write({"test.json": [entry(n, "detection_all", *boxes(n, 6)) for n in range(40)]}) / "test.json"
    benchmark = DetectionBenchmark(file, "detection_all")
    metric = benchmark.metrics[0]
    good, bad = (ask(benchmark, lambda record, amount=amount: jittered(record, amount)) for amount in (4.0, 14.0))
    result = difference(metric.prepare(bad.predictions), metric.prepare(good.predictions), resamples=300)
    assert result.units == 40
    assert result.low > 0
    same = difference(metric.prepare(bad.predictions), metric.prepare(bad.predictions), resamples=50)
    assert (same.low, same.high) == (0, 0)


def person(number: int, place: int = 0, **more: Any) -> dict[str, Any]:
    rng = random.Random(f"{number} {place}")
    x, y = 40 + 200 * place, 60
    points = [[x + rng.uniform(0, 120), y + rng.uniform(0, 260), rng.choice((0, 1, 2))] for _ in COCO_KEYPOINTS]
    points[0][2] = 2
    region = {"label": "person", "box": [x, y, x + 120, y + 260], "keypoints": points}
    return entry(number, "pose", region, **more) | {"id": f"{number}-{place}"}


def test_poses_agree_with_pycocotools(ask: Ask, write: Write) -> None:
    entries = [person(n, place, meta={"area": 9000 + n} if place else {}) for n in range(8) for place in range(3)]
    file = write({"test.json": entries}) / "test.json"

    def say(record: Record) -> str:
        rng = random.Random(record.key)
        moved = [(x + rng.gauss(0, 9), y + rng.gauss(0, 9), v) for x, y, v in record.regions[0].keypoints]
        return "no" if rng.random() < 0.1 else FINE.keypoints(moved, SIZE)

    asked = ask(PoseBenchmark(file), say)
    result, truth, sizes = [], [], {}
    for record, prediction in zip(asked.questions.records, asked.predictions, strict=True):
        image, region = record.images[0].path, record.regions[0]
        sizes[image] = SIZE
        area = record.meta.get("area", 120 * 260)
        truth.append(TruePose(image, region.keypoints, region.box, area))
        points = TASKS["pose"].parse(prediction.prediction, FINE).keypoints(SIZE)
        result += [Pose(image, points)] if any(v for *_, v in points) else []
    expected = keypoint_ap(result, truth, sizes)
    assert 0.1 < expected["AP"] < 0.95
    for name in ("AP", "AP50", "AP75"):
        assert asked.values[name, ""] == pytest.approx(expected[name], abs=1e-12)
    assert ask(PoseBenchmark(file), right).values["AP", ""] == pytest.approx(1)


@pytest.mark.parametrize("task", ["ocr_text", "ocr"])
def test_text_by_its_edit_distance(ask: Ask, write: Write, task: str) -> None:
    entries = [
        entry(1, task, thing("Hello  there", 0, 0, 90, 20), thing("World", 0, 50, 90, 70)),
        entry(2, task, thing("exit", 0, 0, 90, 20)),
    ]
    file = write({"test.json": entries}) / "test.json"
    perfect = ask(OCRBenchmark(file, task), right)
    assert perfect.values == {("1-NED", ""): 1, ("character error rate", ""): 0}

    def say(record: Record) -> str:
        lines = ["Hello there", "Word"] if "e1" in record.key else ["exits", "no"]
        return "\n".join(lines) if task == "ocr_text" else "".join(f"<p>{t}</p>[0,0,0.1,0.1]" for t in lines)

    # "Hello there\nWorld" has 17 characters, one is missing; "exit" has 4, to which 4 are added.
    asked = ask(OCRBenchmark(file, task), say)
    assert asked.values["1-NED", ""] == pytest.approx(((1 - 1 / 17) + (1 - 4 / 8)) / 2)
    assert asked.values["character error rate", ""] == pytest.approx(5 / 21)


def test_odd_records_are_counted(ask: Ask, write: Write) -> None:
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "<p>cat</p>[0,0,1,1]"}]
    entries: list[Any] = [
        entry(0, "detection_all", thing("cat", 0, 0, 9, 9)),
        {**entry(1, "detection_all", thing("cat", 0, 0, 9, 9)), "width": None},
        entry(2, "detection_all", thing("cat", 9, 9, 0, 0)),
        entry(3, "detection_all", thing("cat", 0, 0, 9000, 9)),
        entry(4, "detection_all"),
        entry(5, "detection_all", conversations=turns),
        entry(6, "detection_all", {"label": "cat", "box": "all"}),
        entry(7, "detection_all", {"label": 7, "box": [0, 0, 9, 9]}),
    ]
    file = write({"test.json": entries}) / "test.json"
    asked = ask(DetectionBenchmark(file, "detection_all"), right)
    assert asked.result["lost"] == {
        "size_unknown": 1,
        "box_inverted": 1,
        "box_outside": 1,
        "region_missing": 2,
        "entry_malformed": 2,
    }
    assert asked.values["AP", ""] == pytest.approx(1)


def test_a_folder_and_a_file_without_the_task(write: Write) -> None:
    src = write({"test.json": [entry(1, "layout", thing("Text", 0, 0, 9, 9))]})
    with pytest.raises(UserError, match="is a folder: name an instruction file with the task detection"):
        DetectionBenchmark(src)
    with pytest.raises(UserError, match="ocr_text"):
        list(OCRBenchmark(src / "test.json").read())


def test_what_a_converter_wrote_is_read(ask: Ask, write: Write, tmp_path: Path) -> None:
    keypoints = [v for n in range(17) for v in (20 + 5 * n, 30 + 5 * n, 2)]
    document = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 640, "height": 480}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 20, 110, 110], "area": 5000.5, "iscrowd": 0}
            | {"keypoints": keypoints, "num_keypoints": 17}
        ],
        "categories": [{"id": 1, "name": "person"}],
    }
    src = write({"person_keypoints_val2017.json": document})
    convert(CONVERTERS["coco_keypoints"](src, "val"), tmp_path / "pose.jsonl")
    asked = ask(PoseBenchmark(tmp_path / "pose.jsonl", images=src), right)
    assert asked.questions.records[0].meta == {"area": 5000.5}
    assert asked.questions.records[0].images[0].path == str(src / "val2017/1.jpg")
    assert asked.values["AP", ""] == pytest.approx(1)


@pytest.mark.parametrize(
    ("kind", "split"),
    [(DetectionBenchmark, "detection"), (LayoutBenchmark, "layout"), (PoseBenchmark, "pose"), (OCRBenchmark, "ocr")],
)
def test_the_sample_datas_own_answers_are_perfect(ask: Ask, sample_data: Path, kind: Any, split: str) -> None:
    asked = ask(kind(sample_data / "instructions" / "test.json", split), right)
    main = asked.result["values"][0]
    assert main["value"] == pytest.approx(1)
    assert asked.result["lost"] == {}
    assert len(asked.predictions) >= 3
