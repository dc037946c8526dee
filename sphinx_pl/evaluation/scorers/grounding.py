"""Referring expression comprehension: RefCOCO, RefCOCO+ and RefCOCOg."""

from __future__ import annotations

from sphinx_pl.data.coordinates import Box4, Coordinates, Size, iou, to_pixels

IOU_THRESHOLD = 0.5

# Reading tolerates any number of decimals.
_READER = Coordinates()


def read_box(text: str, size: Size) -> Box4 | None:
    """The first well-formed box of a text in pixels of the image (width, height); None if it has none.

    The text has fractions of the padded square. Swapped corners are put right, numbers up to 0.1 outside the square
    moved to its edge, later boxes are not looked at. Part of the box may lie in the padding, so outside the image: it
    is not cut.
    """
    boxes = _READER.parse_boxes(text)
    return to_pixels(boxes[0], size) if boxes else None


def rec_match(text: str, truth: Box4, size: Size) -> bool:
    """Whether a text's first box has an intersection over union of at least 0.5 with the true one.

    The accuracy of referring expression comprehension (Mao et al. 2016) is the mean of these, at the threshold as
    MDETR's and later evaluations have it (at least, not above). A text without a box is wrong.

    Args:
        truth: x1, y1, x2, y2 in pixels of the unpadded image.
        size: of that image, (width, height).
    """
    box = read_box(text, size)
    return box is not None and iou(box, truth) >= IOU_THRESHOLD
