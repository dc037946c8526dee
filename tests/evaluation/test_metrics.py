"""Measures, their intervals and paired differences, against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from sphinx_pl.evaluation.metrics import Additive, Sums, Unsplittable, difference, estimate, holm, mean, ratio
from sphinx_pl.evaluation.runner import Prediction


def prediction(key: str, score: float, topic: str = "") -> Prediction:
    return Prediction(key, "yes_no", "", topic, "m", "?", "yes", "yes", score, True)


def test_a_mean_and_a_ratio_of_sums_worked_by_hand() -> None:
    items = [prediction("a", 1), prediction("b", 0), prediction("c", 1), prediction("d", 1)]
    assert estimate(mean("accuracy", "").prepare(items)).value == 0.75
    # Right only if both of a unit are: (a, b) is not, (c, d) is.
    both = Additive("both", "", lambda g: (min(p.score for p in g), 1), ratio, unit=lambda p: str(p.key in "ab"))
    assert both.prepare(items).units == ["True", "False"]
    assert estimate(both.prepare(items)).value == 0.5


@pytest.mark.parametrize("count", [1, 7, 200])
def test_where_all_are_right_or_wrong_the_interval_is_the_binomial_one(count: int) -> None:
    for score in (0.0, 1.0):
        result = estimate(mean("accuracy", "").prepare([prediction(str(i), score) for i in range(count)]))
        exact = scipy.stats.binomtest(int(score) * count, count).proportion_ci(0.95, "exact")
        assert (result.value, result.low, result.high) == pytest.approx((score, exact.low, exact.high))


@pytest.mark.parametrize(("score", "count"), [(0.3, 1), (0.6, 8)])
def test_where_all_scores_are_the_same_the_others_may_be_anything(score: float, count: int) -> None:
    result = estimate(mean("F1", "").prepare([prediction(str(i), score) for i in range(count)]))
    # Worked by hand: 97.5 % of the samples of `count` would have shown one of the others if these were more.
    like = 0.025 ** (1 / count)
    assert (result.value, result.low, result.high) == pytest.approx((score, score * like, score * like + 1 - like))


def test_another_metric_of_units_that_are_all_alike_has_no_interval() -> None:
    points = Additive("points", "", lambda group: (len(group), 1), lambda sums: 100 * sums[..., 0] / sums[..., 1])
    result = estimate(points.prepare([prediction(str(i), 1.0) for i in range(9)]))
    assert result.value == 100
    assert np.isnan([result.low, result.high]).all()
    lengths = estimate(Sums(["a", "b"], np.array([[3.0, 3.0], [8.0, 8.0]]), ratio))
    assert (lengths.value, np.isnan(lengths.low)) == (1, True)


def test_a_value_of_all_units_together_has_no_interval() -> None:
    result = estimate(Unsplittable(["a", "b"], 0.3))
    assert result.value == 0.3
    assert np.isnan([result.low, result.high]).all()
    assert np.isnan(difference(Unsplittable(["a", "b"], 0.3), Unsplittable(["a", "b"], 0.5)).p)


def test_intervals_agree_with_scipy_for_a_ratio() -> None:
    rng = np.random.default_rng(3)
    rows = np.stack([rng.integers(0, 4, 80), rng.integers(4, 8, 80)], axis=1).astype(float)
    result = estimate(Sums([str(i) for i in range(80)], rows, ratio), resamples=20000)
    expected = scipy.stats.bootstrap(
        (rows[:, 0], rows[:, 1]),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        n_resamples=20000,
        method="percentile",
        rng=2,
    ).confidence_interval
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high), abs=3e-3)


def test_equal_rows_counted_together_have_the_distribution_of_separate_ones() -> None:
    rows = np.stack([np.repeat([0.0, 1.0], 30), np.ones(60)], axis=1)
    together = Sums([str(i) for i in range(60)], rows, ratio)

    class Apart:  # not a Sums: goes the general way
        units = together.units
        values = together.values

    first, second = estimate(together, resamples=20000), estimate(Apart(), resamples=20000)
    assert (first.low, first.high) == pytest.approx((second.low, second.high), abs=0.02)


def test_a_paired_difference_is_narrower_than_the_intervals() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(400)  # the same questions are hard for both
    a = [prediction(str(i), float(h < 0.6)) for i, h in enumerate(hard)]
    b = [prediction(str(i), float(h < 0.65)) for i, h in enumerate(hard)]
    metric = mean("accuracy", "")
    result = difference(metric.prepare(a), metric.prepare(b))
    assert result.value == pytest.approx(result.second - result.first)
    assert result.low > 0
    assert result.p < 0.01
    first, second = estimate(metric.prepare(a)), estimate(metric.prepare(b))
    assert first.high > second.low  # each alone would not tell
    same = difference(metric.prepare(a), metric.prepare(a))
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_two_equally_good_models_are_rarely_called_different() -> None:
    rng = np.random.default_rng(5)
    metric, called = mean("accuracy", ""), 0
    for trial in range(200):
        a, b = ([prediction(str(i), float(s)) for i, s in enumerate(rng.random(150) < 0.5)] for _ in range(2))
        called += difference(metric.prepare(a), metric.prepare(b), seed=trial, resamples=500).p < 0.05
    assert called <= 20  # 10 expected; more than 20 has a probability of 0.1 %


def test_other_questions_are_not_compared() -> None:
    metric = mean("accuracy", "")
    with pytest.raises(ValueError, match="did not answer the same questions"):
        difference(metric.prepare([prediction("a", 1)]), metric.prepare([prediction("b", 1)]))


def test_holm_worked_by_hand() -> None:
    # 3 * 0.01, then 2 * 0.02 and 1 * 0.03, none below the one before it.
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([]) == []


def test_an_undefined_value_is_nan_and_leaves_no_interval() -> None:
    result = estimate(Sums(["a"], np.zeros((1, 2)), ratio))
    assert np.isnan([result.value, result.low, result.high]).all()
