from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.checkpoints.tensors import same_bits
from sphinx_pl.evaluation.losses import SourceLoss
from sphinx_pl.evaluation.mixtures.evaluator import MixtureEvaluator
from sphinx_pl.evaluation.mixtures.search import (
    REST,
    Trial,
    describe_search,
    greedy_soup,
    halves,
    search_parts,
    soup_weights,
    write_search,
)
from sphinx_pl.evaluation.objective import Objective
from sphinx_pl.mixing.mix import mix
from sphinx_pl.mixing.plan import MixPlan, MixRecipe, open_models, plan_mixture
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError

Models = Callable[..., list[Path]]


def plan_of(paths: list[Path], method: str = "linear") -> MixPlan:
    models, base = open_models(paths, own=False)
    weights = None if method == "uniform_soup" else [1 / len(paths)] * len(paths)
    return plan_mixture(models, base, MixRecipe(weights, method))


def measure_by(targets: dict[str, float], samples: int = 8) -> Callable[[Sphinx], dict[str, SourceLoss]]:
    """A loss that is lowest where the first element of each of these tensors has that value; the same in all samples
    but for a constant, which makes some harder."""

    def measure(model: Sphinx) -> dict[str, SourceLoss]:
        tensors = model.state_dict()
        distance = sum((float(tensors[name].flatten()[0]) - target) ** 2 for name, target in targets.items())
        sums = distance + torch.arange(samples, dtype=torch.float64)
        return {"loss/x": SourceLoss(sums, torch.ones(samples, dtype=torch.float64))}

    return measure


NORM, PROJECTION = "decoder.norm.weight", "mixer.visual_proj.0.weight"


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_what_is_evaluated_is_what_would_be_written(models: Models, tmp_path: Path, method: str) -> None:
    paths = models(2, dtype=torch.bfloat16)
    plan = plan_of(paths, method)
    evaluate = MixtureEvaluator(plan, lambda model: {}, torch.device("cpu"))
    for beta in (0.0, 0.3, 1.0):
        evaluate([beta, 1 - beta])
        own, _ = open_models(paths)
        out = tmp_path / f"mixed_{beta}"
        mix(plan_mixture(own, None, MixRecipe([beta, 1 - beta], method)), out)
        written = open_checkpoint(out)
        state = evaluate.model.state_dict()
        assert all(same_bits(state[name].bfloat16(), written.tensor(name)) for name in written)
    assert evaluate.evaluations == 3


def test_tensors_that_are_equal_are_read_once(models: Models) -> None:
    evaluate = MixtureEvaluator(plan_of(models(2, frozen="mixer.towers.")), lambda model: {}, torch.device("cpu"))
    assert any(name.startswith("mixer.towers.") for name in evaluate.changing)
    evaluate([0.5, 0.5])
    assert evaluate.changing
    assert not any(name.startswith("mixer.towers.") for name in evaluate.changing)


def test_a_beta_for_each_part_is_found(models: Models) -> None:
    paths = models(2, values={NORM: (0.0, 1.0), PROJECTION: (0.0, 1.0)})  # so a value is 1 - beta
    evaluate = MixtureEvaluator(plan_of(paths), measure_by({NORM: 0.125, PROJECTION: 0.875}), torch.device("cpu"))
    told = []
    trials, best = search_parts(evaluate, ["projections", "decoder"], 40, Objective(), report=told.append)
    assert trials[best].betas["decoder"] == 0.875
    assert trials[best].betas["projections"] == 0.125
    assert set(trials[best].betas) == {"projections", "decoder", REST}
    assert told == trials
    assert len(trials) <= 40
    assert len({tuple(trial.betas.values()) for trial in trials}) == len(trials)


def test_a_search_stays_within_its_budget_and_says_what_it_is_worth(models: Models, tmp_path: Path) -> None:
    paths = models(2, values={NORM: (0.0, 1.0)})
    evaluate = MixtureEvaluator(plan_of(paths), measure_by({NORM: 0.0}), torch.device("cpu"))
    trials, best = search_parts(evaluate, ["decoder"], 3, Objective())
    assert evaluate.evaluations == len(trials) == 3
    content = write_search(trials, best, Objective(), tmp_path)
    assert content["gain"] == pytest.approx(0.25 - (1 - trials[best].betas["decoder"]) ** 2)
    assert content["gain_interval"] == pytest.approx((content["gain"], content["gain"]))  # no noise between the two
    assert (tmp_path / "search.csv").read_text().count("\n") == 4


@pytest.mark.parametrize(
    ("others", "kept", "message"), [(1.5, 0, "not better than beta=0.5"), (0.9, 1, "better than beta")]
)
def test_what_only_the_choosing_samples_like_is_not_kept(
    tmp_path: Path, others: float, kept: int, message: str
) -> None:
    """The first trial's losses are 1; of the second every second one is 0.5, and the others decide."""
    trials = [
        Trial({"decoder": beta}, {"loss/x": SourceLoss(torch.tensor(sums).double(), torch.ones(8).double())})
        for beta, sums in ((0.5, [1.0] * 8), (0.75, [0.5, others] * 4))
    ]
    content = write_search(trials, 1, Objective(), tmp_path)
    assert content["found"] == {"betas": {"decoder": 0.75}, "value": pytest.approx((0.5 + others) / 2)}
    assert content["betas"] == trials[kept].betas
    assert content["value"] == pytest.approx(Objective().value(trials[kept].measurements))
    assert content["gain"] == pytest.approx(1 - others)
    assert message in describe_search(content)
    assert ("stays" in describe_search(content)) == (kept == 0)
    assert json.loads((tmp_path / "search.json").read_text())["betas"] == content["betas"]


def test_the_choice_is_made_on_every_second_sample(models: Models) -> None:
    loss = SourceLoss(torch.arange(5.0), torch.ones(5))
    assert halves({"x": loss}, odd=False)["x"].sums.tolist() == [0, 2, 4]
    assert halves({"x": loss}, odd=True)["x"].sums.tolist() == [1, 3]


def test_parts_in_which_nothing_differs_are_not_moved(models: Models) -> None:
    paths = models(2, frozen="mixer.towers.")
    evaluate = MixtureEvaluator(plan_of(paths), measure_by({NORM: 5.0}), torch.device("cpu"))
    trials, _ = search_parts(evaluate, ["encoders", "decoder"], 8, Objective())
    assert {trial.betas["encoders"] for trial in trials} == {0.5}


@pytest.mark.parametrize(
    ("parts", "budget", "message"),
    [
        (["decodr"], 10, r"search\[0\].*did you mean 'decoder'"),
        (["decoder"], 1, "at least 2"),
        (["decoder.x.*"], 9, "fits nothing"),
    ],
)
def test_searches_that_cannot_be_are_refused(models: Models, parts: list[str], budget: int, message: str) -> None:
    evaluate = MixtureEvaluator(plan_of(models(2)), measure_by({NORM: 0.0}), torch.device("cpu"))
    with pytest.raises(UserError, match=message):
        search_parts(evaluate, parts, budget, Objective())


def test_a_greedy_soup_keeps_what_helps(models: Models) -> None:
    """Values 0.9, 0.2, -1 and 5, goal 0: the best is 0.2; with 0.9 it is 0.55, worse; with -1 it is -0.4, worse than
    0.2 too; nothing is kept. With the goal 0.5 the first two make 0.55, better than either."""
    paths = models(4, values={NORM: (0.9, 0.2, -1.0, 5.0)})
    for goal, soup in ((0.0, [1]), (0.5, [0, 1])):
        evaluate = MixtureEvaluator(plan_of(paths, "uniform_soup"), measure_by({NORM: goal}), torch.device("cpu"))
        tried: list[tuple[list[int], bool]] = []
        assert greedy_soup(evaluate, Objective(), lambda models, value, kept: tried.append((models, kept))) == soup  # noqa: B023
        assert len(tried) == 7
    assert soup_weights([0, 2], 3) == [0.5, 0, 0.5]
