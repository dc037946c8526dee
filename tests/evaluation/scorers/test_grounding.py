"""Against lmms-eval's RefCOCO on squares and torchvision's IoU on other images; odd texts by hand."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torchvision.ops import box_iou

from sphinx_pl.data.coordinates import Box4, Coordinates
from sphinx_pl.evaluation.scorers.base import Score
from sphinx_pl.evaluation.scorers.grounding import score_box


def test_it_is_that_of_lmms_eval_on_squares(golden: dict[str, list[Any]]) -> None:
    cases = golden["rec"]
    assert len(cases) == 800
    assert 150 < sum(right for *_, right in cases) < 600
    for text, truth, right in cases:
        assert bool(score_box(text, tuple(truth), (1, 1)).value) is right, (text, truth)


def test_it_is_torchvisions_overlap_in_the_unpadded_image() -> None:
    rng = random.Random(0)
    coordinates, rights = Coordinates(decimals=6), 0
    for _ in range(2000):
        size = rng.randint(20, 900), rng.randint(20, 900)

        def box(size: tuple[int, int] = size) -> Box4:
            (x1, x2), (y1, y2) = (sorted(rng.sample(range(length + 1), 2)) for length in size)
            return x1, y1, x2, y2

        truth = box()
        near = [value + rng.uniform(-0.1, 0.1) * max(size) for value in truth]
        given = tuple(min(max(v, 0), limit) for v, limit in zip(near, size * 2, strict=True))
        given = (*map(min, given[:2], given[2:]), *map(max, given[:2], given[2:]))
        overlap = float(box_iou(torch.tensor([given]).double(), torch.tensor([truth]).double()))
        if abs(overlap - 0.5) > 1e-3:  # nearer, the text's six decimals decide
            rights += overlap > 0.5
            assert bool(score_box(coordinates.box(given, size), truth, size).value) is (overlap > 0.5), (given, truth)
    assert 300 < rights < 1700


WIDE = (100, 50)  # in a square of 100, with 25 above and below
TRUTH: Box4 = (20.0, 10.0, 60.0, 30.0)  # in the square's fractions 0.2, 0.35, 0.6, 0.55


@pytest.mark.parametrize(
    ("text", "right"),
    [
        # worked by hand
        ("[0.200,0.350,0.600,0.550]", True),
        ("It is at [0.2, .35, 0.6, 0.55].", True),
        ("<p>dog</p>[0.200,0.350,0.600,0.550]", True),
        ("[0.600,0.550,0.200,0.350]", True),  # corners swapped
        ("[0.200,0.550,0.600,0.350]", True),  # of one axis only
        ("[0.200,0.350,0.400,0.550]", True),  # half of it: exactly 0.5
        ("[0.200,0.350,0.399,0.550]", False),
        ("[0.200,0.350,0.600,0.550;0.000,0.000,0.100,0.100]", True),  # the first of several counts
        ("[0.000,0.000,0.100,0.100;0.200,0.350,0.600,0.550]", False),
        ("[0.000,0.000,0.100,0.100] or [0.200,0.350,0.600,0.550]", False),
        ("[0.2,0.35,0.6] no, [0.200,0.350,0.600,0.550]", True),  # three numbers are no box
        ("[20,10,60,30]", False),  # pixels are no fractions
        ("[-0.2,0.35,0.6,0.55]", False),  # nor is what is further out than 0.1
        ("[0.200,0.350,0.600,0.550", False),  # cut off by generation
        ("(0.200,0.350,0.600,0.550)", False),
        ("none", False),
        ("", False),
        ("[0.200,0.100,0.600,0.300]", False),  # fractions of the image, not of the square
        ("[0.3,0.4,0.3,0.4]", False),  # without area
    ],
)
def test_score_box(text: str, right: bool) -> None:
    assert bool(score_box(text, TRUTH, WIDE).value) is right


def test_a_box_that_reaches_over_the_edge_is_cut_there() -> None:
    edge: Box4 = (0.0, 0.0, 100.0, 50.0)
    assert score_box("[-0.003,0.25,1.004,0.75]", edge, WIDE) == Score(1)
    assert score_box("[-0.003,0.25,1.2,0.75]", edge, WIDE) == Score(0, parsed=False)


def test_the_padding_is_not_cut_off() -> None:
    assert score_box("[0,0,1,1]", (0, -25, 100, 75), WIDE) == Score(1)
    assert score_box("[0,0,1,1]", (0, 0, 100, 49), WIDE) == Score(0)  # half of the square is padding
    assert score_box("nothing", TRUTH, WIDE) == Score(0, parsed=False)
