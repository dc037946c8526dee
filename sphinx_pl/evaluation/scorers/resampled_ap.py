"""Average precision of many resamples of the images, after boxes and truth have been matched once.

Which box of an image is right does not depend on the other images, so `COCOeval` matches once. The
precision-recall curve depends on the sample: an image that was drawn twice counts twice in it.
numba compiles the code at its first use and caches it for later processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RECALLS = np.linspace(0.0, 1.0, 101)
SPACING = float(np.spacing(1))  # in the denominator, as `COCOeval` has it


@dataclass(frozen=True)
class Matched:
    """The D boxes of one category, in the order in which they count, at T thresholds, in N images.

    Attributes:
        image: [D] the image of each box.
        right: [T, D] whether the box was matched.
        ignored: [T, D] whether the box counts neither as right nor as wrong.
        true: [N] the number of true boxes in each image.
    """

    image: NDArray[np.int64]
    right: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    true: NDArray[np.int64]


def matched(evaluation: Any) -> list[Matched]:
    """The matches of a `COCOeval` for each category with a true box: all areas, the largest number
    of boxes.

    Images are in the order of `evaluation.params.imgIds`.
    """
    parameters = evaluation.params
    images, areas, thresholds = len(parameters.imgIds), len(parameters.areaRng), len(parameters.iouThrs)
    categories = []
    for number in range(len(parameters.catIds)):
        start = number * areas * images  # the first area is all
        matches = [(i, one) for i, one in enumerate(evaluation.evalImgs[start : start + images]) if one is not None]
        true = np.zeros(images, dtype=np.int64)
        for i, one in matches:
            true[i] = np.count_nonzero(np.asarray(one["gtIgnore"]) == 0)
        if not true.any():
            continue
        scores = np.concatenate([np.asarray(one["dtScores"], dtype=np.float64) for _, one in matches])
        order = np.argsort(-scores, kind="stable")
        image = np.concatenate([np.full(len(one["dtScores"]), i, dtype=np.int64) for i, one in matches])
        right, ignored = (
            np.concatenate([np.asarray(one[key]).reshape(thresholds, -1) != 0 for _, one in matches], axis=1)[:, order]
            for key in ("dtMatches", "dtIgnore")
        )
        categories.append(Matched(image[order], right, ignored, true))
    return categories


def average_precision(categories: Sequence[Matched], counts: NDArray[np.int64], thresholds: Sequence[int]) -> Floats:
    """COCO's AP of resamples: the mean over categories and thresholds of the precision at 101
    recalls.

    Args:
        counts: [R, N] how often each image counts.
        thresholds: indices of the thresholds that the mean is over.

    Returns:
        [R]; NaN without a true box.
    """
    values = np.full((len(counts), len(categories)), np.nan)
    chosen = list(thresholds)
    for column, one in enumerate(categories):
        _of_category(one.image, one.right[chosen], one.ignored[chosen], one.true, counts, RECALLS, values[:, column])
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(defined, values, 0).sum(axis=1) / defined.sum(axis=1))


@njit(nogil=True, cache=True, error_model="numpy")
def _of_category(image: Any, right: Any, ignored: Any, true: Any, counts: Any, recalls: Any, out: Any) -> None:
    """Write one category's values to `out` [R], which stays unchanged without a true box.

    The loop runs from the last box to the first. So it knows the highest precision at this recall
    or above, and the number of recalls that this box does not reach. Arrays of resamples and boxes
    would take many times the memory.
    """
    for resample in range(len(counts)):
        count = counts[resample]
        wanted = 0
        for i in range(len(true)):
            wanted += count[i] * true[i]
        if wanted == 0:
            continue
        total = 0.0
        for threshold in range(len(right)):
            hits, given = 0, 0
            for box in range(len(image)):
                if not ignored[threshold, box]:
                    given += count[image[box]]
                    if right[threshold, box]:
                        hits += count[image[box]]
            left = len(recalls)
            while left > 0 and recalls[left - 1] > hits / wanted:
                left -= 1
            best = 0.0
            for box in range(len(image) - 1, -1, -1):
                if ignored[threshold, box]:
                    continue
                weight = count[image[box]]
                if right[threshold, box]:
                    best = max(best, hits / (given + SPACING))
                    hits -= weight
                    # This box reaches the recalls above those of the boxes before it.
                    while left > 0 and recalls[left - 1] > hits / wanted:
                        total += best
                        left -= 1
                given -= weight
            total += best * left  # the recall 0, if there is any box
        out[resample] = total / (len(recalls) * len(right))
