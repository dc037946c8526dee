"""Structure: https://cocodataset.org/#format-data ("Object Detection", "Keypoint Detection", "Image Captioning")."""

from __future__ import annotations

from typing import Any

import pytest

from sphinx_pl.data.coordinates import COCO_KEYPOINTS
from sphinx_pl.data.schema import ImageRef, Record, Region
from sphinx_pl.utils.errors import UserError

from .conftest import Run

SIZE = ((640, 480),)


def document(annotations: list[Any], images: int = 2) -> dict[str, Any]:
    return {
        "info": {"description": "COCO 2017 Dataset", "year": 2017},
        "licenses": [{"id": 3, "name": "Attribution-NonCommercial-NoDerivs License"}],
        "images": [
            {
                "id": number,
                "file_name": f"{number:012d}.jpg",
                "width": 640,
                "height": 480,
                "license": 3,
                "coco_url": f"http://images.cocodataset.org/train2017/{number:012d}.jpg",
                "unknown_field": {},
            }
            for number in range(1, images + 1)
        ],
        "annotations": annotations,
        "categories": [
            {"supercategory": "person", "id": 1, "name": "person"},
            {"supercategory": "food", "id": 58, "name": "hot dog"},
        ],
    }


def thing(number: int, image: Any, category: Any, bbox: Any, **more: Any) -> dict[str, Any]:
    segmentation: Any = [[10.0, 10.0, 20.0, 20.0, 10.0, 20.0]]
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": bbox,
        "area": 50.0,
        "iscrowd": 0,
        "segmentation": segmentation,
    } | more


def test_every_caption_is_a_record(run: Run) -> None:
    captions = [
        {"image_id": 1, "id": 37, "caption": "A bicycle replica with a clock as the front wheel. \n", "extra": 0},
        {"image_id": 2, "id": 49, "caption": "A room."},
        {"image_id": 2, "id": 50, "caption": " \n"},
        {"image_id": 3, "id": 51, "caption": "Of an image that is not listed."},
        {"image_id": 2, "id": 52},
        "no annotation",
    ]
    records, report = run("coco_captions", {"annotations/captions_train2017.json": document(captions)})
    assert records == [
        Record(
            "37",
            "caption",
            (ImageRef("train2017/000000000001.jpg"),),
            SIZE,
            answer="A bicycle replica with a clock as the front wheel.",
        ),
        Record("49", "caption", (ImageRef("train2017/000000000002.jpg"),), SIZE, answer="A room."),
    ]
    assert report.dropped == {"answer_empty": 1, "image_unknown": 2, "entry_malformed": 1}


def test_detection_asks_for_each_class_and_for_all(run: Run) -> None:
    objects = [
        thing(1, 1, 1, [10.5, 20, 100.25, 200], unknown_field="x"),
        thing(2, 1, 58, [600.0, 400.0, 40.4, 80.0]),  # over the edge by a fraction
        thing(3, 1, 1, [300, 0, 50, 60]),
        thing(8, 7, 58, [0, 0, 10, 60]),
    ]
    records, report = run("coco_detection", {"annotations/instances_train2017.json": document(objects)})
    first, dog, second = (
        Region((10.5, 20.0, 110.75, 220.0), "person"),
        Region((600.0, 400.0, 640.4, 480.0), "hot dog"),
        Region((300.0, 0.0, 350.0, 60.0), "person"),
    )
    image = (ImageRef("train2017/000000000001.jpg"),)
    assert records == [
        Record("1-all", "detection_all", image, SIZE, regions=(first, dog, second)),
        Record("1-person", "detection", image, SIZE, question="person", regions=(first, second)),
        Record("1-hot dog", "detection", image, SIZE, question="hot dog", regions=(dog,)),
    ]
    assert not report.left_out
    assert report.skipped == {"image_without_objects": 1}
    assert report.dropped == {"image_unknown": 1}


def test_what_lost_an_object_is_not_asked_for_as_all(run: Run) -> None:
    objects = [
        *(thing(1, 1, 1, [300, 0, 50, 60]), thing(2, 1, 1, [300, 0, 0, 60]), thing(3, 1, 58, [1, 2, 3, 4])),
        *(thing(4, 2, 1, [300, 0, 50, 60]), thing(5, 2, 58, [630, 0, 100, 60]), thing(6, 2, 58, [630, 0])),
        # An unknown class could be any of those that are asked for.
        *(thing(7, 3, 1, [300, 0, 50, 60]), thing(8, 3, 99, [300, 0, 10, 60])),
    ]
    records, report = run("coco_detection", {"annotations/instances_train2017.json": document(objects, images=3)})
    assert [(record.key, len(record.regions)) for record in records] == [("1-hot dog", 1), ("2-person", 1)]
    assert report.left_out == {"box_inverted": 1, "category_unknown": 1, "part_malformed": 1, "box_outside": 1}
    assert report.skipped == {"detection_all_incomplete": 3, "detection_incomplete": 2}


def test_no_class_with_a_crowd_is_asked_for(run: Run) -> None:
    objects = [
        thing(1, 1, 1, [10, 20, 100, 200], iscrowd=1, segmentation={"counts": [1, 2], "size": [480, 640]}),
        thing(2, 1, 1, [10, 20, 10, 20]),
        thing(3, 1, 58, [30, 20, 10, 20]),
        thing(4, 2, 1, [30, 20, 10, 20]),
    ]
    names = "annotations/instances_val2014.json"
    records, report = run("coco_detection", {names: document(objects)}, split="val2014")
    assert [(record.key, record.task) for record in records] == [
        ("1-hot dog", "detection"),
        ("2-all", "detection_all"),
        ("2-person", "detection"),
    ]
    assert records[0].images == (ImageRef("val2014/000000000001.jpg"),)
    assert report.skipped == {"detection_all_with_crowd": 1, "detection_with_crowd": 1}
    assert not report.dropped


def test_a_person_is_a_pose(run: Run) -> None:
    points = [0, 0, 0] * 15 + [100, 50, 2, 120, 60, 1]
    objects = [
        thing(1, 1, 1, [90, 40, 60, 70], keypoints=points, num_keypoints=2, unknown_field=1, area=2100.5),
        thing(2, 1, 1, [90, 40, 60, 70], keypoints=points, num_keypoints=2, iscrowd=1),
        thing(3, 1, 1, [90, 40, 60, 70], keypoints=[0] * 51, num_keypoints=0),
        thing(4, 1, 1, [90, 40, 60, 70], keypoints=points[3:], num_keypoints=2),
        thing(5, 1, 1, [90, 40, 60, 70], keypoints=[*points[3:], 9000, 1, 2], num_keypoints=3),
        thing(6, 1, 1, [90, 40, 60, 70], num_keypoints=3),
        thing(7, 1, 1, [90, 40, 0, 70], keypoints=points, num_keypoints=2),
    ]
    records, report = run("coco_keypoints", {"person_keypoints_train2017.json": document(objects)})
    absent = ((0.0, 0.0, 0),) * (len(COCO_KEYPOINTS) - 2)
    person = Region((90.0, 40.0, 150.0, 110.0), "person", (*absent, (100.0, 50.0, 2), (120.0, 60.0, 1)))
    image, meta = (ImageRef("train2017/000000000001.jpg"),), {"area": 2100.5}
    assert records == [Record("1", "pose", image, SIZE, regions=(person,), meta=meta)]
    assert report.skipped == {"crowd": 1, "no_keypoints": 1}
    assert report.dropped == {"keypoints_count": 1, "keypoint_outside": 1, "entry_malformed": 1, "box_inverted": 1}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"other.json": {}}, "has no annotations/captions_train2017.json or captions_train2017.json"),
        ({"captions_train2017.json": "[1, 2"}, "is not readable as JSON"),
        ({"captions_train2017.json": {"images": []}}, "KeyError: 'annotations'"),
        ({"captions_train2017.json": [1]}, "is not as https://cocodataset.org/#download says"),
    ],
)
def test_files_that_are_wrong_as_a_whole(run: Run, files: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        run("coco_captions", files)


def test_a_file_name_that_no_file_can_have(run: Run) -> None:
    captions = [{"image_id": number, "id": number, "caption": "A room."} for number in (1, 2)]
    whole = document(captions)
    whole["images"][1]["file_name"] = "\ud800.jpg"
    records, report = run("coco_captions", {"captions_train2017.json": whole})
    assert [record.key for record in records] == ["1"]
    assert report.dropped == {"entry_malformed": 1}
