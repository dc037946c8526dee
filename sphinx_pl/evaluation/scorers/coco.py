"""Average precision of boxes and of key points, by COCO's own evaluation (`pycocotools`).

A language model gives boxes without confidences, and average precision is defined by their order.
Unless a score is given, every box has the score 1: boxes of an image then count in the order of the
answer, images in the order in which they are listed, and the precision-recall curve is little more
than the one point that the model chose. Such figures are below those of a detector that may add
hundreds of doubtful boxes, and say more beside each other than beside its.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sphinx_pl.data.coordinates import COCO_KEYPOINTS, Box4, Size
from sphinx_pl.utils.errors import UserError

ImageId = str | int
Keypoints = Sequence[tuple[float, float, int]]
"""(x, y, visibility) in pixels in COCO's order, as in `Region` and `Parsed.keypoints`."""


@dataclass(frozen=True, slots=True)
class Detection:
    """A box that a model gave: x1, y1, x2, y2 in pixels of the unpadded image."""

    image: ImageId
    category: str
    box: Box4
    score: float = 1.0


@dataclass(frozen=True, slots=True)
class TrueBox:
    """A true box. `area` in square pixels decides if it is small or large; None takes that of the
    box. Detections in a crowd's box are neither right nor wrong."""

    image: ImageId
    category: str
    box: Box4
    area: float | None = None
    crowd: bool = False


@dataclass(frozen=True, slots=True)
class Pose:
    """A person's key points that a model gave; missing ones are (0, 0, 0)."""

    image: ImageId
    keypoints: Keypoints
    score: float = 1.0


@dataclass(frozen=True, slots=True)
class TruePose:
    """A true person. Distances are relative to `area`, the person's area in square pixels, as in
    the annotations. A person without a labelled point counts neither as found nor as missed, like a
    crowd."""

    image: ImageId
    keypoints: Keypoints
    box: Box4
    area: float
    crowd: bool = False


def detection_ap(
    detections: Iterable[Detection], truth: Iterable[TrueBox], sizes: Mapping[ImageId, Size], per_category: bool = False
) -> dict[str, float]:
    """COCO's twelve figures of boxes: detection (Lin et al. 2014), and the mAP of page layout
    (PubLayNet, DocLayNet).

    Boxes are cut at their image's edges. A detection in an image without truth is wrong. A
    detection of a category that is nowhere in the truth is skipped, since it has no precision.

    Args:
        sizes: (width, height) in pixels of every image that was asked about, also of those without
            a box.
        per_category: also `AP/<category>` of each category in the truth.

    Returns:
        `AP` (mean over IoU 0.50 to 0.95), `AP50`, `AP75`, `APs`, `APm`, `APl`, `AR1`, `AR10`,
        `AR100`, `ARs`, `ARm`, `ARl`, in 0..1; -1, as there, where there is nothing to find.

    Raises:
        UserError: a box in an image that is not listed, or no `pycocotools`.
    """
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
    truth = list(truth)
    evaluation = match_boxes(detections, truth, sizes, all_figures=True)
    figures = dict(zip(names, map(float, evaluation.stats), strict=True))
    if per_category:
        for index, name in enumerate(dict.fromkeys(box.category for box in truth)):
            precision = evaluation.eval["precision"][:, :, index, 0, -1]  # [IoU, recall] of all areas, 100 boxes
            precision = precision[precision > -1]
            figures[f"AP/{name}"] = float(precision.mean()) if precision.size else -1.0
    return figures


def match_boxes(
    detections: Iterable[Detection], truth: Sequence[TrueBox], sizes: Mapping[ImageId, Size], all_figures: bool = False
) -> Any:
    """The `COCOeval` behind `detection_ap`, which has matched boxes of all areas; categories are in
    the truth's order.

    Args:
        all_figures: also by area, and summed up, which takes four times as long.

    Raises:
        UserError: as `detection_ap`.
    """
    images = _Images(sizes)
    categories = {name: number for number, name in enumerate(dict.fromkeys(box.category for box in truth), 1)}
    true = [
        _box_entry(images, item.image, item.box, categories[item.category])
        | {"iscrowd": int(item.crowd)}
        | ({} if item.area is None else {"area": item.area})
        for item in truth
    ]
    given = [
        _box_entry(images, item.image, item.box, categories[item.category]) | {"score": item.score}
        for item in detections
        if item.category in categories
    ]
    return _evaluate("bbox", images, categories, true, given, all_figures)


def keypoint_ap(poses: Iterable[Pose], truth: Iterable[TruePose], sizes: Mapping[ImageId, Size]) -> dict[str, float]:
    """COCO's ten figures of key points, by object keypoint similarity (OKS) with COCO's 17 sigmas.

    Args:
        sizes: (width, height) in pixels of every image that was asked about.

    Returns:
        `AP` (mean over OKS 0.50 to 0.95), `AP50`, `AP75`, `APm`, `APl`, `AR`, `AR50`, `AR75`,
        `ARm`, `ARl`, in 0..1; -1, as there, where there is nothing to find.

    Raises:
        UserError: a person in an image that is not listed, or no `pycocotools`.
        ValueError: not 17 key points.
    """
    names = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
    evaluation = match_poses(poses, truth, sizes, all_figures=True)
    return dict(zip(names, map(float, evaluation.stats), strict=True))


def match_poses(
    poses: Iterable[Pose], truth: Iterable[TruePose], sizes: Mapping[ImageId, Size], all_figures: bool = False
) -> Any:
    """The `COCOeval` behind `keypoint_ap`, as `match_boxes`.

    Raises:
        UserError, ValueError: as `keypoint_ap`.
    """
    images = _Images(sizes)
    true = [
        _box_entry(images, item.image, item.box, 1)
        | {"keypoints": _flat(item.keypoints), "area": item.area, "iscrowd": int(item.crowd)}
        | {"num_keypoints": sum(visibility > 0 for *_, visibility in item.keypoints)}
        for item in truth
    ]
    given = []
    for item in poses:
        xs, ys = zip(*((x, y) for x, y, _ in item.keypoints), strict=True)
        # As in pycocotools: the extent of all 17, missing ones too.
        extent = _box_entry(images, item.image, (min(xs), min(ys), max(xs), max(ys)), 1)
        given.append(extent | {"keypoints": _flat(item.keypoints), "score": item.score})
    return _evaluate("keypoints", images, {"person": 1}, true, given, all_figures)


class _Images:
    """The images by number, in the order of their list."""

    def __init__(self, sizes: Mapping[ImageId, Size]) -> None:
        self._sizes = sizes
        self.numbers = {image: number for number, image in enumerate(sizes, 1)}

    def entries(self) -> list[dict[str, Any]]:
        return [
            {"id": self.numbers[image], "width": width, "height": height}
            for image, (width, height) in self._sizes.items()
        ]

    def cut(self, image: ImageId, box: Box4) -> tuple[int, Box4]:
        """The image's number, and the box within its edges."""
        if image not in self.numbers:
            raise UserError(f"a box is in image '{image}', which is not among the {len(self.numbers)} images evaluated")
        width, height = self._sizes[image]
        x1, y1, x2, y2 = box
        left, right = (min(max(x, 0.0), width) for x in (x1, x2))
        top, bottom = (min(max(y, 0.0), height) for y in (y1, y2))
        return self.numbers[image], (left, top, right, bottom)


def _box_entry(images: _Images, image: ImageId, box: Box4, category: int) -> dict[str, Any]:
    number, (x1, y1, x2, y2) = images.cut(image, box)
    width, height = x2 - x1, y2 - y1
    entry = {"image_id": number, "category_id": category, "bbox": [x1, y1, width, height], "area": width * height}
    return entry | {"iscrowd": 0}


def _flat(keypoints: Keypoints) -> list[float]:
    if len(keypoints) != len(COCO_KEYPOINTS):
        raise ValueError(f"a person has {len(COCO_KEYPOINTS)} key points, not {len(keypoints)}")
    return [value for point in keypoints for value in point]


def check_coco_tools() -> None:
    """Check that average precision can be computed on this machine.

    Raises:
        UserError: `pycocotools` is missing.
    """
    if importlib.util.find_spec("pycocotools") is None:
        raise UserError("average precision needs pycocotools: pip install 'sphinx-pl[eval]'")


def _evaluate(
    kind: str,
    images: _Images,
    categories: Mapping[str, int],
    true: list[dict[str, Any]],
    given: list[dict[str, Any]],
    all_figures: bool,
) -> Any:
    """The `COCOeval` after matching. Its output is suppressed."""
    check_coco_tools()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def indexed(annotations: list[dict[str, Any]]) -> Any:
        coco = COCO()
        names = [{"id": number, "name": name} for name, number in categories.items()]
        numbered = [annotation | {"id": number} for number, annotation in enumerate(annotations, 1)]
        coco.dataset = {"images": images.entries(), "categories": names, "annotations": numbered}
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):
        # Not `loadRes`, which fails on an empty list.
        evaluation = COCOeval(indexed(true), indexed(given), kind)
        if not all_figures:
            evaluation.params.areaRng = evaluation.params.areaRng[:1]
            evaluation.params.areaRngLbl = evaluation.params.areaRngLbl[:1]
        evaluation.evaluate()
        if all_figures:
            evaluation.accumulate()
            evaluation.summarize()
    return evaluation
