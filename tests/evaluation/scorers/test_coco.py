"""Against faster-coco-eval, and torchmetrics' mean average precision; what those do not take, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchmetrics.detection import MeanAveragePrecision

from sphinx_pl.evaluation.scorers.coco import Detection, Pose, TrueBox, TruePose, detection_ap, keypoint_ap
from sphinx_pl.utils.errors import UserError

Golden = dict[str, list[Any]]
SIZE = {"1": (100, 100)}


def boxes_of(case: list[Any]) -> tuple[list[Detection], list[TrueBox], dict[str | int, tuple[int, int]]]:
    sizes, true, guesses, _ = case
    return (
        [Detection(image, str(category), tuple(box), score) for image, category, box, score in guesses],
        [TrueBox(image, str(category), tuple(box), area, crowd) for image, category, box, area, crowd in true],
        {image: tuple(size) for image, size in enumerate(sizes)},
    )


def test_detection_ap_is_that_of_faster_coco_eval(golden: Golden) -> None:
    assert len(golden["detection"]) > 30
    for case in golden["detection"]:
        assert list(detection_ap(*boxes_of(case)).values()) == pytest.approx(case[3], abs=1e-6)


def test_detection_ap_is_that_of_torchmetrics_by_category(golden: Golden) -> None:
    for case in golden["detection"][:12]:
        guesses, true, sizes = boxes_of(case)
        # Its own thresholds are in single precision, which moves a point of the curve here and there.
        overlaps, recalls = ([i / n for i in range(low, n + 1)] for low, n in ((10, 20), (0, 100)))
        metric = MeanAveragePrecision(
            iou_thresholds=overlaps[:-1], rec_thresholds=recalls, class_metrics=True, backend="pycocotools"
        )
        for image in sizes:
            given = [item for item in guesses if item.image == image]
            there = [item for item in true if item.image == image]
            metric.update(
                [
                    {
                        "boxes": torch.tensor([item.box for item in given]).reshape(-1, 4).double(),
                        "scores": torch.tensor([item.score for item in given]).double(),
                        "labels": torch.tensor([int(item.category) for item in given], dtype=torch.int),
                    }
                ],
                [
                    {
                        "boxes": torch.tensor([item.box for item in there]).reshape(-1, 4).double(),
                        "labels": torch.tensor([int(item.category) for item in there], dtype=torch.int),
                        "iscrowd": torch.tensor([int(item.crowd) for item in there], dtype=torch.int),
                        "area": torch.tensor([item.area for item in there]).double(),
                    }
                ],
            )
        theirs = metric.compute()
        ours = detection_ap(guesses, true, sizes, per_category=True)
        assert [ours["AP"], ours["AP50"], ours["AP75"], ours["AR100"]] == pytest.approx(
            [float(theirs[name]) for name in ("map", "map_50", "map_75", "mar_100")], abs=1e-5
        )
        classes = dict(zip(*(theirs[name].reshape(-1).tolist() for name in ("classes", "map_per_class")), strict=True))
        assert {name: value for name, value in ours.items() if "/" in name} == pytest.approx(
            {f"AP/{category}": value for category, value in classes.items()}, abs=1e-5
        )


def test_keypoint_ap_is_that_of_faster_coco_eval(golden: Golden) -> None:
    assert len(golden["keypoints"]) > 5
    for sizes, true, guesses, figures in golden["keypoints"]:
        ours = keypoint_ap(
            [Pose(image, points, score) for image, points, score in guesses],
            [TruePose(image, points, tuple(box), area, crowd) for image, points, box, area, crowd in true],
            {image: tuple(size) for image, size in enumerate(sizes)},
        )
        assert list(ours.values()) == pytest.approx(figures, abs=1e-6)


TRUE = [TrueBox("1", "dog", (10, 10, 50, 50))]


@pytest.mark.parametrize(
    ("guesses", "average", "half"),
    [
        # worked by hand
        ([], 0, 0),
        ([Detection("1", "dog", (10, 10, 50, 50))], 1, 1),
        ([Detection("1", "dog", (10, 10, 50, 30))], 0.1, 1),  # an overlap of 0.5 is enough for one of ten thresholds
        ([Detection("1", "cat", (10, 10, 50, 50))], 0, 0),
        # a wrong box after the right one leaves the precision at full recall, one before it halves that
        ([Detection("1", "dog", (10, 10, 50, 50)), Detection("1", "dog", (60, 60, 90, 90))], 1, 1),
        ([Detection("1", "dog", (60, 60, 90, 90)), Detection("1", "dog", (10, 10, 50, 50))], 0.5, 0.5),
        # unless scores say otherwise
        ([Detection("1", "dog", (60, 60, 90, 90), 0.2), Detection("1", "dog", (10, 10, 50, 50), 0.9)], 1, 1),
        ([Detection("1", "dog", (10, 10, 50, 50))] * 2, 1, 1),  # the same box twice: the second is wrong, and later
    ],
)
def test_detection_ap(guesses: list[Detection], average: float, half: float) -> None:
    figures = detection_ap(guesses, TRUE, SIZE)
    assert [figures["AP"], figures["AP50"]] == pytest.approx([average, half])
    assert figures["APl"] == -1  # there is no large box


def test_boxes_are_cut_at_the_images_edges() -> None:
    true = [TrueBox("1", "dog", (0, 0, 100, 50))]
    guesses = [Detection("1", "dog", (-100, -40, 300, 50))]
    assert detection_ap(guesses, true, SIZE)["AP"] == pytest.approx(1)  # worked by hand: uncut, 5000 of 36000


def test_what_is_found_in_an_image_without_truth_is_wrong() -> None:
    sizes = {"0": (100, 100), "1": (100, 100)}
    wrong = Detection("0", "dog", (10, 10, 50, 50))
    figures = detection_ap([wrong, Detection("1", "dog", (10, 10, 50, 50))], TRUE, sizes)
    assert figures["AP"] == pytest.approx(0.5)  # worked by hand: of equal scores the first image's come first
    assert detection_ap([], TRUE, sizes)["AP"] == 0


def test_nothing_to_find() -> None:
    assert set(detection_ap([Detection("1", "dog", (1, 1, 5, 5))], [], SIZE).values()) == {-1}
    assert set(keypoint_ap([], [], SIZE).values()) == {-1}


def test_categories_of_a_page() -> None:
    true = [TrueBox("1", "table", (0, 0, 50, 50)), TrueBox("1", "title", (50, 50, 90, 90))]
    figures = detection_ap([Detection("1", "table", (0, 0, 50, 50))], true, SIZE, per_category=True)
    assert figures["AP/table"] == pytest.approx(1)  # worked by hand
    assert figures["AP/title"] == 0
    assert figures["AP"] == pytest.approx(0.5)


def test_a_pose_that_is_right_and_one_that_is_not_there() -> None:
    points = [(float(10 + i), float(20 + 2 * i), 2) for i in range(17)]
    truth = [TruePose("1", points, (10, 20, 30, 60), area=800)]
    assert keypoint_ap([Pose("1", points)], truth, SIZE)["AP50"] == pytest.approx(1)  # worked by hand
    assert keypoint_ap([], truth, SIZE)["AP"] == 0
    assert keypoint_ap([Pose("1", [(0.0, 0.0, 0)] * 17)], truth, SIZE)["AP"] == 0
    unlabelled = [TruePose("1", [(0.0, 0.0, 0)] * 17, (10, 20, 30, 60), area=800)]
    assert keypoint_ap([Pose("1", points)], unlabelled, SIZE)["AP"] == -1


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(UserError, match="image '2'"):
        detection_ap([Detection("2", "dog", (0, 0, 1, 1))], TRUE, SIZE)
    with pytest.raises(ValueError, match="17"):
        keypoint_ap([Pose("1", [(1.0, 1.0, 2)])], [], SIZE)
