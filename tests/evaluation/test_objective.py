from __future__ import annotations

import pytest
import torch

from sphinx_pl.evaluation.bootstrap import interval
from sphinx_pl.evaluation.losses import SourceLoss
from sphinx_pl.evaluation.objective import Objective, resampled
from sphinx_pl.utils.errors import UserError


def loss(sums: list[float], tokens: list[float]) -> SourceLoss:
    return SourceLoss(torch.tensor(sums, dtype=torch.float64), torch.tensor(tokens, dtype=torch.float64))


MEASURES = {
    "loss/real": loss([3, 1], [3, 1]),
    "loss/synthetic": loss([9, 3], [3, 3]),
    "score/vqa": loss([1, 0], [1, 1]),
}


@pytest.mark.parametrize(
    ("name", "value", "cost"),
    [("loss", 1.5, 1.5), ("loss/synthetic", 2, 2), ("score", 0.5, -0.5), ("score/vqa", 0.5, -0.5)],
)
def test_an_objective_is_the_mean_of_its_values_each_counting_alike(name: str, value: float, cost: float) -> None:
    objective = Objective(name)
    assert objective.value(MEASURES) == value
    assert objective.cost(MEASURES) == cost


@pytest.mark.parametrize("name", ["los", "cider/vqa", ""])
def test_what_is_neither_loss_nor_score_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="must be loss, score"):
        Objective(name)


def test_a_measure_that_was_not_taken_is_named() -> None:
    with pytest.raises(UserError, match=r"objective=loss/reel is not measured: did you mean 'loss/real'\?"):
        Objective("loss/reel").value(MEASURES)


def test_points_are_resampled_together() -> None:
    """Two points that differ by a constant in every sample differ by it in every resample, however noisy they are."""
    generator = torch.Generator().manual_seed(0)
    hard = torch.randn(50, generator=generator, dtype=torch.float64) * 5 + 20
    tokens = torch.randint(1, 9, (50,), generator=generator).double()
    points = [{"loss/x": SourceLoss((hard + shift) * tokens, tokens)} for shift in (0.0, 0.25)]
    means = resampled(points, ["loss/x"], resamples=200)
    assert means.shape == (200, 2)
    torch.testing.assert_close(means[:, 1] - means[:, 0], torch.full((200,), 0.25, dtype=torch.float64))
    assert float(means[:, 0].std()) > 0.3


def test_the_interval_is_that_of_the_source_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(400, generator=generator, dtype=torch.float64)
    source = SourceLoss(values, torch.ones(400, dtype=torch.float64))
    low, high = interval(resampled([{"loss/x": source}], ["loss/x"], resamples=2000)[:, 0].numpy())
    error = 1.96 * float(values.std()) / 20
    assert source.mean - low == pytest.approx(error, rel=0.12)
    assert high - source.mean == pytest.approx(error, rel=0.12)
