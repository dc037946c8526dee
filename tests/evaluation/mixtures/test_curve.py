from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from sphinx_pl.evaluation.losses import SourceLoss
from sphinx_pl.evaluation.mixtures.curve import (
    CurvePoint,
    barriers,
    best_point,
    corners,
    describe_best,
    simplex,
    summary,
    write_curve,
)
from sphinx_pl.evaluation.objective import Objective
from sphinx_pl.utils.errors import UserError


def loss(mean: float) -> SourceLoss:
    return SourceLoss(
        torch.tensor([mean * 3, mean], dtype=torch.float64), torch.tensor([3.0, 1.0], dtype=torch.float64)
    )


def points(**measures: list[float]) -> list[CurvePoint]:
    """A curve between two models, or over the triangle of three where there are as many values as it has points."""
    count = len(next(iter(measures.values())))
    weights = simplex(2, count) if count != 6 else simplex(3, 3)
    named = {name.replace("_", "/"): values for name, values in measures.items()}
    return [CurvePoint(w, {name: loss(v[i]) for name, v in named.items()}) for i, w in enumerate(weights)]


def test_the_simplex_is_even_and_sums_to_one() -> None:
    assert simplex(2, 3) == [(0, 1), (0.5, 0.5), (1, 0)]
    triangle = simplex(3, 5)
    assert len(triangle) == len(set(triangle)) == 15
    assert all(sum(weights) == pytest.approx(1) and min(weights) >= 0 for weights in triangle)
    assert {(1, 0, 0), (0, 1, 0), (0, 0, 1)} <= set(triangle)
    with pytest.raises(UserError, match="2 or 3 checkpoints, not 4"):
        simplex(4, 3)


def test_the_best_point_minimises_the_objective() -> None:
    curve = points(loss_real=[4, 3, 2], loss_synthetic=[1, 1.5, 3], score_vqa=[0.1, 0.2, 0.3])
    assert curve[best_point(curve, Objective("loss/real"))].weights == (1, 0)
    assert curve[best_point(curve, Objective("loss/synthetic"))].weights == (0, 1)
    assert curve[best_point(curve, Objective("loss"))].weights == (0.5, 0.5)
    assert curve[best_point(curve, Objective("score"))].weights == (1, 0)
    assert best_point(points(loss_x=[2, 2, 2]), Objective()) == 1  # of equals the middle


@pytest.mark.parametrize(
    ("losses", "height"),
    [
        ([1.0, 2.0, 3.0], 0.0),
        ([1.0, 3.5, 3.0], 1.5),
        ([1.0, 0.5, 3.0], 0.0),
        ([3.0, 2.5, 2.5, 0.0], 1.5),
        # Three models: corners 3 (last), 2, 1 (first) in the order of the triangle, the plane's middles 2.5, 2, 1.5.
        ([3.0, 2.5, 2.0, 2.0, 1.5, 1.0], 0.0),
        ([3.0, 2.5, 2.0, 2.7, 1.5, 1.0], 0.7),
    ],
)
def test_a_barrier_is_the_height_above_the_line_or_plane_between_the_models(losses: list[float], height: float) -> None:
    curve = points(loss_x=losses)
    assert float(barriers(curve, torch.tensor(losses, dtype=torch.float64))) == pytest.approx(height)


def test_corners_are_in_the_order_of_the_models() -> None:
    triangle = points(loss_x=[1, 2, 3, 4, 5, 6])
    assert [triangle[place].weights.index(1) for place in corners(triangle)] == [0, 1, 2]


def test_written_files_hold_the_curve(tmp_path: Path) -> None:
    curve = points(loss_real=[4, 3, 2], loss_synthetic=[1, 1.5, 3])
    folder = tmp_path / "new" / "folder"
    write_curve(curve, folder)
    content = json.loads((folder / "curve.json").read_text())
    assert content["betas"] == [0, 0.5, 1]
    assert content["losses"] == {"real": [4, 3, 2], "synthetic": [1, 1.5, 3]}
    assert content["mean"] == content["objective"]["values"] == [2.5, 2.25, 2.5]
    assert content["best"]["beta"] == 0.5
    assert content["best"]["value"] == 2.25
    assert content["best"]["gain"] == 0.25
    assert content["barrier"] == {"real": 0, "synthetic": 0}
    assert content["tokens"] == {"real": 4, "synthetic": 4}
    with (folder / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["beta"]) for row in rows] == [0, 0.5, 1]
    assert [float(row["loss/synthetic"]) for row in rows] == [1, 1.5, 3]
    assert float(rows[1]["loss"]) == 2.25
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_scores_have_a_picture_beside_the_losses(tmp_path: Path) -> None:
    write_curve(points(loss_x=[3, 2, 3], score_vqa=[0, 1, 0]), tmp_path)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_triangle_is_written_with_a_weight_for_each_model(tmp_path: Path) -> None:
    content = write_curve(points(loss_x=[3, 2, 2, 1, 2, 3], score_vqa=[0, 0, 0, 1, 0, 0]), tmp_path)
    assert "betas" not in content
    assert content["best"]["weights"] == [0.5, 0, 0.5]
    with (tmp_path / "curve.csv").open() as file:
        header = next(csv.reader(file))
    assert header[:3] == ["weight_0", "weight_1", "weight_2"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def noisy(means: list[float], noise: float, samples: int = 200) -> list[CurvePoint]:
    """Samples of different hardness, which is common to all points, and noise of each point."""
    generator = torch.Generator().manual_seed(0)
    hard = torch.randn(samples, generator=generator, dtype=torch.float64)
    tokens = torch.ones(samples, dtype=torch.float64)
    drawn = [torch.randn(samples, generator=generator, dtype=torch.float64) for _ in means]
    curve = []
    for weights, mean, own in zip(simplex(2, len(means)), means, drawn, strict=True):
        own = (own - own.mean()) * noise
        curve.append(CurvePoint(weights, {"loss/x": SourceLoss(hard - hard.mean() + own + mean, tokens)}))
    return curve


def test_a_gain_is_sure_or_said_to_be_chance() -> None:
    sure = summary(noisy([2.0, 1.8, 2.0], noise=0.1), Objective())
    assert sure["best"]["gain"] == pytest.approx(0.2)
    assert 0.15 < sure["best"]["gain_interval"][0] < 0.2 < sure["best"]["gain_interval"][1] < 0.25
    assert sure["best"]["chosen"] == 1
    assert "better than the first checkpoint alone" in describe_best(sure)
    assert "chance" not in describe_best(sure)
    chance = summary(noisy([2.0, 1.99, 2.0], noise=1.0), Objective())
    assert chance["best"]["gain_interval"][0] < 0
    assert "may be chance" in describe_best(chance)
    worse = summary(noisy([1.0, 1.8, 2.0], noise=0.1), Objective())
    assert worse["best"]["beta"] == 0
    assert describe_best(worse).endswith("no mixture is better than the second checkpoint alone.")


def test_equals_are_as_good_as_the_best() -> None:
    curve = points(score_x=[0.5, 0.8, 0.8, 0.8, 0.6])
    content = summary(curve, Objective("score"))
    assert (content["best"]["beta"], content["best"]["chosen"]) == (0.5, 1)


def test_ends_alone_are_no_mixtures() -> None:
    assert describe_best(summary(points(loss_x=[1, 2]), Objective())).endswith(
        "no mixture was evaluated, only the ends."
    )


@pytest.mark.parametrize("losses", [[math.nan, 2, 3], [math.inf, 2.0, math.nan], [3, math.nan, 5, 4, 7, 6]])
def test_what_is_no_number_is_never_the_best(tmp_path: Path, losses: list[float]) -> None:
    content = write_curve(points(loss_x=losses), tmp_path)
    assert content["best"]["value"] == min(value for value in losses if math.isfinite(value))
    assert content["best"]["chosen"] == 1
    assert "no finite one" in describe_best(content)
    json.loads((tmp_path / "curve.json").read_text(), parse_constant=pytest.fail)


def test_a_curve_without_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no evaluated model or mixture has a finite loss"):
        write_curve(points(loss_x=[math.nan, math.nan, math.inf]), tmp_path)


def test_the_interval_of_a_source_resamples_whole_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    per_sample = 2 + torch.randn(400, generator=generator, dtype=torch.float64)
    tokens = torch.full((400,), 5.0, dtype=torch.float64)
    source = SourceLoss(per_sample * tokens, tokens)
    low, high = source.interval()
    # All tokens of a sample alike: the standard error is that of 400 numbers, not of 2000.
    error = 1.96 * float(per_sample.std()) / 20
    assert source.mean == pytest.approx(float(per_sample.mean()))
    assert source.mean - low == pytest.approx(error, rel=0.15)
    assert high - source.mean == pytest.approx(error, rel=0.15)
