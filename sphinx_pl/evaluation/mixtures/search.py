"""Searches for weights: those of each part of the model, and which checkpoints to average."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sphinx_pl.evaluation.bootstrap import interval
from sphinx_pl.evaluation.losses import SourceLoss
from sphinx_pl.evaluation.mixtures.evaluator import MixtureEvaluator
from sphinx_pl.evaluation.objective import Measurements, Objective, resampled
from sphinx_pl.mixing.plan import MixPlan
from sphinx_pl.mixing.rules import complement, resolve
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import finite, write_whole

REST = "the rest"
FEWEST = 4
"""The fewest samples of a source: every second one chooses, and the others test the choice."""
STEP = 0.25
SMALLEST = 1 / 64


@dataclass(frozen=True)
class Trial:
    """A β for each part, with the losses and scores."""

    betas: dict[str, float]
    measurements: Measurements


def halves(measurements: Measurements, odd: bool) -> dict[str, SourceLoss]:
    """Every second sample: one half to choose by, the other to test the choice."""
    return {name: SourceLoss(loss.sums[odd::2], loss.tokens[odd::2]) for name, loss in measurements.items()}


def groups_of(plan: MixPlan, parts: Sequence[str], budget: int) -> dict[str, tuple[str, ...]]:
    """The tensors of each part that a search moves.

    Raises:
        UserError: not two models, an unknown part, a part without a tensor, or too small a budget.
    """
    if len(plan.models) != 2:
        raise UserError(f"search= is for 2 checkpoints, not {len(plan.models)}")
    if budget < 2:
        raise UserError(f"budget={budget} must be at least 2 evaluations")
    names = {key: plan.models[0].canonical_name(key) for key in plan.models[0]}
    _, rows = resolve([{"match": part, "beta": 0.5} for part in parts], [0.5, 0.5], names, list, "search")
    return {part: row.keys for part, row in zip([*parts, REST], rows, strict=False)}


def search_parts(
    evaluate: MixtureEvaluator,
    parts: Sequence[str],
    budget: int,
    objective: Objective,
    start: float = 0.5,
    report: Callable[[Trial], None] = lambda trial: None,
) -> tuple[list[Trial], int]:
    """Search a β for each part of two models, by pattern search (Hooke & Jeeves 1961).

    One part at a time moves up and down by a step. A move that helps stays; where none does, the
    step is halved. Every second sample of each source chooses, so that the others can test the
    choice.

    Args:
        parts: parts or patterns of names as in rules. The first that fits a tensor moves it, and
            the rest move together.
        budget: the most evaluations of different mixtures.
        start: β of all parts in the first evaluation.
        report: gets every trial.

    Returns:
        All trials, the first with equal β, and the place of the best one.

    Raises:
        UserError: see `groups_of`, or a source has too few samples.
    """
    groups = groups_of(evaluate.plan, parts, budget)
    trials: list[Trial] = []
    places: dict[tuple[float, ...], int] = {}

    def cost(place: int) -> float:
        return objective.cost(halves(trials[place].measurements, odd=False))

    def attempt(betas: Mapping[str, float]) -> int | None:
        """The place of the trial with these betas; None if it is new and the budget is spent."""
        values = tuple(betas.values())
        if values not in places:
            if len(trials) >= budget:
                return None
            weights = {key: [betas[part], complement(betas[part])] for part, keys in groups.items() for key in keys}
            trials.append(Trial(dict(betas), evaluate(weights)))
            places[values] = len(trials) - 1
            report(trials[-1])
        return places[values]

    best = attempt(dict.fromkeys(groups, start))
    assert best is not None
    if any(len(loss.sums) < FEWEST for loss in trials[0].measurements.values()):
        raise UserError(
            f"search= chooses on every second sample, and a source has fewer than {FEWEST}: raise data.val_samples"
        )
    # Moving a part that is equal in both models would repeat the mixture.
    changing = set(evaluate.changing)
    movable = [part for part, keys in groups.items() if changing.intersection(keys)]
    step = STEP
    while step >= SMALLEST:
        before = best
        for part in movable:
            for move in (step, -step):
                betas = dict(trials[best].betas)
                betas[part] = min(1.0, max(0.0, betas[part] + move))
                place = attempt(betas)
                if place is None:
                    return trials, best
                if cost(place) < cost(best):
                    best = place
                    break
        if best == before:
            step /= 2
    return trials, best


def write_search(trials: Sequence[Trial], best: int, objective: Objective, folder: Path) -> dict[str, Any]:
    """Write search.csv and search.json to `folder`; returns the content of search.json.

    `gain` is how much better the best trial is than the first one, on the samples that did not
    choose. If it is not positive, the choice was an accident of the other samples, and `betas` and
    `value` are the first trial's.

    Raises:
        UserError: the objective of the choice is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sign = 1.0 if objective.lower else -1.0
    others = [halves(trials[place].measurements, odd=True) for place in (0, best)]
    costs = (sign * resampled(others, objective.names(others[0]))).nan_to_num(math.inf, math.inf)
    gain = objective.cost(others[0]) - objective.cost(others[1])
    chosen = best if gain > 0 else 0
    objective.check(objective.cost(trials[chosen].measurements))
    content: dict[str, Any] = {
        "objective": objective.name,
        "evaluations": len(trials),
        "betas": trials[chosen].betas,
        "value": objective.value(trials[chosen].measurements),
        "first": {"betas": trials[0].betas, "value": objective.value(trials[0].measurements)},
        "found": {"betas": trials[best].betas, "value": objective.value(trials[best].measurements)},
        "gain": gain,
        "gain_interval": interval((costs[:, 0] - costs[:, 1]).numpy()),
    }
    table = io.StringIO()
    writer = csv.writer(table)
    names = list(trials[0].measurements)
    writer.writerow([*trials[0].betas, *names, objective.name])
    for trial in trials:
        means = [trial.measurements[name].mean for name in names]
        writer.writerow([*trial.betas.values(), *means, objective.value(trial.measurements)])
    write_whole(folder / "search.csv", table.getvalue())
    write_whole(folder / "search.json", json.dumps(finite(content), indent=2) + "\n")
    return content


def describe_search(content: Mapping[str, Any]) -> str:
    """The choice and its reason, from search.json, in a sentence without its full stop."""
    (low, high), best = content["gain_interval"], content["found"]
    betas = ", ".join(f"{part} {beta:g}" for part, beta in best["betas"].items())
    start = f"beta={next(iter(content['first']['betas'].values())):g} everywhere"
    if best["betas"] == content["first"]["betas"]:
        return f"{start}, where the search began, is the best: {content['objective']} {best['value']:.4f}"
    gain = f"by {content['gain']:.4f} (95 % interval {low:.4f} to {high:.4f})"
    held_out = "on the samples that did not choose"
    if content["gain"] <= 0:
        return f"{betas} is not better than {start} {held_out}: {gain}. So {start} stays"
    chance = ", which may be chance" if low <= 0 else ""
    return f"{betas}: {content['objective']} {best['value']:.4f}; {held_out} better than {start}: {gain}{chance}"


def greedy_soup(
    evaluate: MixtureEvaluator, objective: Objective, report: Callable[[list[int], float, bool], None]
) -> list[int]:
    """The checkpoints whose plain average is best, chosen greedily (Wortsman et al. 2022).

    The soup begins with the best one. Each of the others, best first, joins if the average is no
    worse with it.

    Args:
        report: gets each set of checkpoints, its value, and whether it is kept.

    Raises:
        UserError: the objective is finite for no checkpoint.
    """
    count = len(evaluate.plan.models)

    def measure(chosen: Sequence[int]) -> Measurements:
        return evaluate(soup_weights(chosen, count))

    alone = [objective.cost(measure([model])) for model in range(count)]
    order = sorted(range(count), key=lambda model: alone[model])
    objective.check(alone[order[0]])
    sign = 1 if objective.lower else -1
    for model in range(count):
        report([model], sign * alone[model], model == order[0])
    soup, cost = [order[0]], alone[order[0]]
    for model in order[1:]:
        larger = sorted([*soup, model])
        its_cost = objective.cost(measure(larger))
        report(larger, sign * its_cost, its_cost <= cost)
        if its_cost <= cost:
            soup, cost = larger, its_cost
    return soup


def soup_weights(chosen: Sequence[int], count: int) -> list[float]:
    return [1 / len(chosen) if model in chosen else 0.0 for model in range(count)]
