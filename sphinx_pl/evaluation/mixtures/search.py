"""Weights that are looked for: those of each part of the model, and which checkpoints to average."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sphinx_pl.evaluation.losses import SourceLoss, interval
from sphinx_pl.evaluation.mixtures.evaluator import MixtureEvaluator
from sphinx_pl.evaluation.objective import Criterion, Measures, resampled
from sphinx_pl.mixing.mix import MixPlan
from sphinx_pl.mixing.rules import complement, resolve
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import finite, write_whole

REST = "the rest"
FEWEST = 4
"""Samples of a source: every second one chooses, the others judge."""
STEP = 0.25
SMALLEST = 1 / 64


@dataclass(frozen=True)
class Trial:
    """A β for each part, and what was measured with them."""

    betas: dict[str, float]
    measures: Measures


def halves(measures: Measures, odd: bool) -> dict[str, SourceLoss]:
    """Every second sample: one half to choose by, the other to say what the choice is worth."""
    return {name: SourceLoss(loss.sums[odd::2], loss.tokens[odd::2]) for name, loss in measures.items()}


def groups_of(plan: MixPlan, parts: Sequence[str], budget: int) -> dict[str, tuple[str, ...]]:
    """The tensors of each part that a search moves. Asked before what takes long, too.

    Raises:
        UserError: not two models, a part that is none or that no tensor fits, or too small a budget.
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
    criterion: Criterion,
    start: float = 0.5,
    report: Callable[[Trial], None] = lambda trial: None,
) -> tuple[list[Trial], int]:
    """Look for a β of its own for each part (two models), by pattern search (Hooke & Jeeves 1961).

    One part at a time is moved up and down by a step; what helps is kept, and where nothing does, the step is halved.
    Choices are made on every second sample of each source, so that the others can say what they are worth.

    Args:
        parts: parts or patterns of names as in rules; the first that fits a tensor moves it. What none fits moves too.
        budget: evaluations at most, of different mixtures.
        start: β of all parts in the first evaluation.
        report: told every trial.

    Returns:
        All trials, the first with equal β, and the best one's place.

    Raises:
        UserError: see `groups_of`, or a source with too few samples.
    """
    groups = groups_of(evaluate.plan, parts, budget)
    trials: list[Trial] = []
    known: dict[tuple[float, ...], int] = {}

    def cost(place: int) -> float:
        return criterion.cost(halves(trials[place].measures, odd=False))

    def attempt(betas: Mapping[str, float]) -> int | None:
        """The trial with these; None if it is not there and the budget is spent."""
        said = tuple(betas.values())
        if said not in known:
            if len(trials) >= budget:
                return None
            weights = {key: [betas[part], complement(betas[part])] for part, keys in groups.items() for key in keys}
            trials.append(Trial(dict(betas), evaluate(weights)))
            known[said] = len(trials) - 1
            report(trials[-1])
        return known[said]

    best = attempt(dict.fromkeys(groups, start))
    assert best is not None
    if any(len(loss.sums) < FEWEST for loss in trials[0].measures.values()):
        raise UserError(
            f"search= chooses on every second sample, and a source has fewer than {FEWEST}: raise data.val_samples"
        )
    # Moving what is equal in both models would be the same mixture again.
    changing = set(evaluate.changing)
    moved = [part for part, keys in groups.items() if changing.intersection(keys)]
    step = STEP
    while step >= SMALLEST:
        before = best
        for part in moved:
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


def write_search(trials: Sequence[Trial], best: int, criterion: Criterion, folder: Path) -> dict[str, Any]:
    """Write search.csv and search.json to `folder`; returns the latter's content.

    `gain` is by how much the best trial is better than the first one, on the samples that had no say in the choice. If
    it isn't, `betas` and `value` are the first one's: what was found is no more than an accident of the other samples.

    Raises:
        UserError: the criterion is no number for what was chosen.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sign = 1.0 if criterion.lower else -1.0
    others = [halves(trials[place].measures, odd=True) for place in (0, best)]
    costs = (sign * resampled(others, criterion.names(others[0]))).nan_to_num(math.inf, math.inf)
    gain = criterion.cost(others[0]) - criterion.cost(others[1])
    chosen = best if gain > 0 else 0
    criterion.check(criterion.cost(trials[chosen].measures))
    content: dict[str, Any] = {
        "criterion": criterion.said,
        "evaluations": len(trials),
        "betas": trials[chosen].betas,
        "value": criterion.value(trials[chosen].measures),
        "first": {"betas": trials[0].betas, "value": criterion.value(trials[0].measures)},
        "found": {"betas": trials[best].betas, "value": criterion.value(trials[best].measures)},
        "gain": gain,
        "gain_interval": interval(costs[:, 0] - costs[:, 1]),
    }
    table = io.StringIO()
    writer = csv.writer(table)
    names = list(trials[0].measures)
    writer.writerow([*trials[0].betas, *names, criterion.said])
    for trial in trials:
        measured = [trial.measures[name].mean for name in names]
        writer.writerow([*trial.betas.values(), *measured, criterion.value(trial.measures)])
    write_whole(folder / "search.csv", table.getvalue())
    write_whole(folder / "search.json", json.dumps(finite(content), indent=2) + "\n")
    return content


def describe_search(content: Mapping[str, Any]) -> str:
    """What was picked and why, of `write_search`'s content, in a sentence without its full stop."""
    (low, high), found = content["gain_interval"], content["found"]
    said = ", ".join(f"{part} {beta:g}" for part, beta in found["betas"].items())
    start = f"beta={next(iter(content['first']['betas'].values())):g} everywhere"
    if found["betas"] == content["first"]["betas"]:
        return f"{start}, where it began, is the best: {content['criterion']} {found['value']:.4f}"
    gain = f"by {content['gain']:.4f} (95 % interval {low:.4f} to {high:.4f})"
    held_out = "on the samples that had no say in the choice"
    if content["gain"] <= 0:
        return f"{said} is not better than {start} {held_out}: {gain}. So {start} is kept"
    chance = ", which may be chance" if low <= 0 else ""
    return f"{said}: {content['criterion']} {found['value']:.4f}; {held_out} better than {start}: {gain}{chance}"


def greedy_soup(
    evaluate: MixtureEvaluator, criterion: Criterion, report: Callable[[list[int], float, bool], None]
) -> list[int]:
    """Checkpoints whose plain average is best, greedily (Wortsman et al. 2022): from the best one on, each of the
    others, best first, stays in if the average is no worse with it.

    Args:
        report: told each set of checkpoints that was tried, its value, and whether it is kept.

    Raises:
        UserError: the criterion is a number of no checkpoint.
    """
    count = len(evaluate.plan.models)

    def measured(chosen: Sequence[int]) -> Measures:
        return evaluate(soup_weights(chosen, count))

    alone = [criterion.cost(measured([model])) for model in range(count)]
    order = sorted(range(count), key=lambda model: alone[model])
    criterion.check(alone[order[0]])
    sign = 1 if criterion.lower else -1
    for model in range(count):
        report([model], sign * alone[model], model == order[0])
    soup, cost = [order[0]], alone[order[0]]
    for model in order[1:]:
        tried = sorted([*soup, model])
        found = criterion.cost(measured(tried))
        report(tried, sign * found, found <= cost)
        if found <= cost:
            soup, cost = tried, found
    return soup


def soup_weights(chosen: Sequence[int], count: int) -> list[float]:
    return [1 / len(chosen) if model in chosen else 0.0 for model in range(count)]
