"""The scorer of referring expression comprehension: RefCOCO, RefCOCO+ and RefCOCOg."""

from __future__ import annotations

from sphinx_pl.data.coordinates import Box4, Size, iou, to_pixels
from sphinx_pl.evaluation.scorers.base import READER, Score

IOU_THRESHOLD = 0.5


def score_box(answer: str, truth: Box4, size: Size) -> Score:
    """1 if the answer's first box has an intersection over union of at least 0.5 with the true one.

    The accuracy of referring expression comprehension (Mao et al. 2016) is the mean of these. The
    threshold is that of MDETR and later evaluations: at least 0.5, not above it. An answer without
    a box is wrong, and later boxes do not count. Boxes are compared in pixels of the image; a part
    that lies in the padding is not cut off.

    Args:
        truth: x1, y1, x2, y2 in pixels of the unpadded image.
        size: of that image, (width, height).
    """
    boxes = READER.parse_boxes(answer)
    right = bool(boxes) and iou(to_pixels(boxes[0], size), truth) >= IOU_THRESHOLD
    return Score(float(right), bool(boxes))
