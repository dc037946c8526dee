from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from sphinx_pl.evaluation.curve import CurvePoint, barrier, best_beta, write_curve
from sphinx_pl.evaluation.losses import SourceLoss


def loss(mean: float) -> SourceLoss:
    return SourceLoss(
        torch.tensor([mean * 3, mean], dtype=torch.float64), torch.tensor([3.0, 1.0], dtype=torch.float64)
    )


def points(**losses: list[float]) -> list[CurvePoint]:
    count = len(next(iter(losses.values())))
    return [CurvePoint(i / (count - 1), {name: loss(v[i]) for name, v in losses.items()}) for i in range(count)]


def test_best_beta_minimises_the_mean_of_the_named_sources() -> None:
    curve = points(real=[4, 3, 2], synthetic=[1, 1.5, 3])
    assert best_beta(curve, ["real"]).beta == 1
    assert best_beta(curve, ["synthetic"]).beta == 0
    assert best_beta(curve, ["real", "synthetic"]).beta == 0.5
    assert best_beta(curve, ["real", "synthetic"]).mean(["real", "synthetic"]) == 2.25


@pytest.mark.parametrize(
    ("losses", "height"),
    [([1.0, 2.0, 3.0], 0.0), ([1.0, 3.5, 3.0], 1.5), ([1.0, 0.5, 3.0], 0.0), ([3.0, 2.5, 2.5, 0.0], 1.5)],
)
def test_barrier_is_the_height_above_the_straight_line(losses: list[float], height: float) -> None:
    assert barrier(points(x=losses), "x") == pytest.approx(height)
    assert barrier(points(x=losses)[::-1], "x") == pytest.approx(height)


def test_written_files_hold_the_curve(tmp_path: Path) -> None:
    curve = points(real=[4, 3, 2], synthetic=[1, 1.5, 3])
    write_curve(curve, tmp_path / "new" / "folder")
    content = json.loads((tmp_path / "new" / "folder" / "curve.json").read_text())
    assert content["betas"] == [0, 0.5, 1]
    assert content["losses"] == {"real": [4, 3, 2], "synthetic": [1, 1.5, 3]}
    assert content["mean"] == [2.5, 2.25, 2.5]
    assert content["best"] == {"beta": 0.5, "mean": 2.25, "gain": 0.25}
    assert content["barrier"] == {"real": 0, "synthetic": 0}
    assert content["tokens"] == {"real": 4, "synthetic": 4}
    with (tmp_path / "new" / "folder" / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["synthetic"]) for row in rows] == [1, 1.5, 3]
    assert float(rows[1]["mean"]) == 2.25
    assert (tmp_path / "new" / "folder" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_interval_resamples_whole_samples() -> None:
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
