"""Average precision of resamples, against `COCOeval` on the images drawn, written out as often as they were."""

from __future__ import annotations

import numpy as np
import pytest

from sphinx_pl.evaluation.scorers.coco import Detection, TrueBox, detection_ap, match_boxes
from sphinx_pl.evaluation.scorers.resampled_ap import average_precision, matched

IMAGES = 25


def scene(seed: int, crowds: bool = False) -> tuple[list[Detection], list[TrueBox]]:
    """Boxes of three categories with scores of their own, most of them near a true one."""
    rng = np.random.default_rng(seed)
    guesses, truth = [], []
    for image in range(IMAGES):
        for _ in range(rng.integers(0, 6)):
            x, y = rng.uniform(0, 300, 2)
            w, h = rng.uniform(20, 150, 2)
            name = str(rng.integers(0, 3))
            truth.append(TrueBox(image, name, (x, y, x + w, y + h), crowd=crowds and rng.random() < 0.2))
            dx, dy = rng.normal(0, 0.12, 2) * (w, h)
            if rng.random() < 0.8:
                guesses.append(Detection(image, name, (x + dx, y + dy, x + dx + w, y + dy + h), rng.random()))
            if rng.random() < 0.4:
                guesses.append(Detection(image, name, (x, y, x + 30, y + 30), rng.random()))
    return guesses, truth


@pytest.mark.parametrize("crowds", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_every_resample_is_what_pycocotools_says_of_it(seed: int, crowds: bool) -> None:
    guesses, truth = scene(seed, crowds)
    evaluation = match_boxes(guesses, truth, dict.fromkeys(range(IMAGES), (500, 500)))
    categories = matched(evaluation)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), size=6)
    counts[0] = 1
    for thresholds, name in ((range(10), "AP"), ((0,), "AP50"), ((5,), "AP75")):
        values = average_precision(categories, counts, thresholds)
        for count, value in zip(counts, values, strict=True):
            copies = [(image, copy) for image in range(IMAGES) for copy in range(count[image])]
            named = {image: [f"{i}-{copy}" for i, copy in copies if i == image] for image in range(IMAGES)}
            drawn = {f"{image}-{copy}": (500, 500) for image, copy in copies}
            expected = detection_ap(
                [Detection(name, d.category, d.box, d.score) for d in guesses for name in named[d.image]],
                [TrueBox(name, t.category, t.box, crowd=t.crowd) for t in truth for name in named[t.image]],
                drawn,
            )
            assert value == pytest.approx(expected[name], abs=1e-12)


def test_nothing_to_find_has_no_value() -> None:
    truth = [TrueBox(0, "a", (0, 0, 9, 9))]
    categories = matched(match_boxes([], truth, {0: (9, 9), 1: (9, 9)}))
    values = average_precision(categories, np.array([[1, 1], [0, 2]]), range(10))
    assert values[0] == 0
    assert np.isnan(values[1])
    assert np.isnan(average_precision([], np.ones((1, 2), dtype=np.int64), range(10))).all()
