"""The mixing curve: losses and scores of mixtures of two models, or of three."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sphinx_pl.evaluation.bootstrap import interval
from sphinx_pl.evaluation.mixtures.evaluator import MixtureEvaluator
from sphinx_pl.evaluation.objective import Measurements, Objective, resampled
from sphinx_pl.mixing.methods import METHODS
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import finite, write_whole


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """The losses and scores with these weights, one for each model."""

    weights: tuple[float, ...]
    measurements: Measurements


def simplex(models: int, steps: int) -> list[tuple[float, ...]]:
    """Evenly spread weights that sum to 1, `steps` along each edge, from the last model to the
    first.

    Raises:
        UserError: not two or three models, or fewer than two steps.
    """
    if models not in (2, 3):
        raise UserError(f"a curve runs between 2 or 3 checkpoints, not {models}: give checkpoints=[A,B] or [A,B,C]")
    if steps < 2:
        raise UserError(f"curve={steps} must be at least 2, the ends")
    last = steps - 1
    if models == 2:
        return [(i / last, (last - i) / last) for i in range(steps)]
    return [(i / last, j / last, (last - i - j) / last) for i in range(steps) for j in range(steps - i)]


def measure_curve(evaluate: MixtureEvaluator, steps: int) -> list[CurvePoint]:
    """The evaluated points of `simplex`."""
    points = simplex(len(evaluate.plan.models), steps)
    return [CurvePoint(weights, evaluate(weights)) for weights in points]


def corners(points: Sequence[CurvePoint]) -> list[int]:
    """The places of the unmixed models, in their order."""
    count = len(points[0].weights)
    return [next(p for p, point in enumerate(points) if point.weights[model] == 1) for model in range(count)]


def barriers(points: Sequence[CurvePoint], values: torch.Tensor) -> torch.Tensor:
    """The height of values [..., points] above the line (the plane) between the unmixed models:
    [...].

    For a loss, 0 suggests that the models lie in one basin (linear mode connectivity, Frankle et
    al. 2020).
    """
    weights = torch.tensor([point.weights for point in points], dtype=values.dtype)
    return (values - values[..., corners(points)] @ weights.T).amax(-1).clamp(min=0)


def best_point(points: Sequence[CurvePoint], objective: Objective) -> int:
    """The place of the best point; among equals, the one nearest to equal weights."""
    count = len(points[0].weights)

    def rank(place: int) -> tuple[float, float]:
        weights = points[place].weights
        return objective.cost(points[place].measurements), max(abs(weight - 1 / count) for weight in weights)

    return min(range(len(points)), key=rank)


def summary(points: Sequence[CurvePoint], objective: Objective, method: str = "linear") -> dict[str, Any]:
    """The content of curve.json: the curve in lists, the best point by the objective, and each
    loss's barrier.

    `gain` is how much better the best point is than the best unmixed model, and `gain_interval` its
    95 % interval. `chosen` is the share of the resamples in which no other point is better.

    Raises:
        UserError: the objective is finite at no point.
    """
    every, sign = [point.measurements for point in points], 1.0 if objective.lower else -1.0
    values = [objective.value(measurements) for measurements in every]
    best, ends = best_point(points, objective), corners(points)
    objective.check(objective.cost(every[best]))
    costs = (sign * resampled(every, objective.names(every[0]))).nan_to_num(math.inf, math.inf)
    better = min(ends, key=lambda place: objective.cost(every[place]))
    weights = [list(point.weights) for point in points]
    content: dict[str, Any] = {"method": method, "models": len(weights[0]), "weights": weights}
    if len(points[0].weights) == 2:
        content["betas"] = [point.weights[0] for point in points]
    for kind, key in (("loss", "losses"), ("score", "scores")):
        named = {name.partition("/")[2]: name for name in every[0] if name.startswith(f"{kind}/")}
        if not named:
            continue
        content[key] = {short: [measurements[name].mean for measurements in every] for short, name in named.items()}
        content[f"{kind}_intervals"] = {
            short: [measurements[name].interval() for measurements in every] for short, name in named.items()
        }
        content["tokens" if kind == "loss" else "questions"] = {
            short: every[0][name].count for short, name in named.items()
        }
        content["mean" if kind == "loss" else "mean_score"] = [
            Objective(kind).value(measurements) for measurements in every
        ]
        if kind == "loss":
            content["barrier"], content["barrier_intervals"] = {}, {}
            for short, name in named.items():
                means = torch.tensor([measurements[name].mean for measurements in every], dtype=torch.float64)
                content["barrier"][short] = float(barriers(points, means))
                content["barrier_intervals"][short] = interval(barriers(points, resampled(every, [name])).numpy())
    content["objective"] = {"name": objective.name, "values": values}
    content["best"] = {
        "weights": list(points[best].weights),
        "value": values[best],
        "gain": objective.cost(every[better]) - objective.cost(every[best]),
        "gain_interval": interval((costs[:, ends].amin(1) - costs[:, best]).numpy()),
        "chosen": float((costs[:, best] <= costs.amin(1)).double().mean()),
        "best_unmixed": ends.index(better),
    }
    if len(points[0].weights) == 2:
        content["best"]["beta"] = points[best].weights[0]
    return content


def _end(method: str, model: int) -> str:
    """The name of an end: the checkpoint, or for a method with a base, the method's result from it."""
    checkpoint = f"the {('first', 'second', 'third')[model]} checkpoint"
    return f"{method} of {checkpoint}" if METHODS[method].base else checkpoint


def describe_best(content: dict[str, Any]) -> str:
    """The best point and why it was chosen, in two sentences."""
    best, name = content["best"], content["objective"]["name"]
    alone = f"{_end(content['method'], best['best_unmixed'])} alone"
    where = f"beta={best['beta']:g}" if "beta" in best else "weights " + ", ".join(f"{w:g}" for w in best["weights"])
    low, high = best["gain_interval"]
    what = f"{where} has the {'lowest' if name.startswith('loss') else 'highest'} {name} of {len(content['weights'])}"
    what += f" points, {best['value']:.4f}"
    if broken := sum(not math.isfinite(value) for value in content["objective"]["values"]):
        what += f" ({broken} of them {'has' if broken == 1 else 'have'} no finite one)"
    if all(max(weights) == 1 for weights in content["weights"]):
        return f"{what}: no mixture was evaluated, only the ends."
    if best["gain"] <= 0:
        return f"{what}: no mixture is better than {alone}."
    gain = f"{best['gain']:.4f} (95 % interval {low:.4f} to {high:.4f})"
    chance = "" if low > 0 else " That may be chance: the interval reaches 0."
    return (
        f"{what}: better than {alone}, the best end, by {gain}.{chance} "
        f"In {100 * best['chosen']:.0f} % of the resamples no other point is better."
    )


def write_curve(
    points: Sequence[CurvePoint], folder: Path, objective: Objective | None = None, method: str = "linear"
) -> dict[str, Any]:
    """Write curve.csv, curve.json and curve.png to `folder`; returns `summary`."""
    objective = objective or Objective()
    content = summary(points, objective, method)
    folder.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    writer = csv.writer(table)
    names = list(points[0].measurements)
    head = ["beta"] if "betas" in content else [f"weight_{model}" for model in range(len(points[0].weights))]
    writer.writerow([*head, *(f"{name}{end}" for name in names for end in ("", "/low", "/high")), objective.name])
    for point, value in zip(points, content["objective"]["values"], strict=True):
        cells = [(point.measurements[name].mean, *point.measurements[name].interval()) for name in names]
        writer.writerow([*point.weights[: len(head)], *(number for cell in cells for number in cell), value])
    write_whole(folder / "curve.csv", table.getvalue())
    write_whole(folder / "curve.json", json.dumps(finite(content), indent=2) + "\n")
    write_whole(folder / "curve.png", _picture(content))
    return content


def _picture(content: dict[str, Any]) -> bytes:
    from matplotlib.figure import Figure  # without pyplot: no display, no state between calls

    kinds = [kind for kind in ("losses", "scores") if kind in content]
    if "betas" in content:
        figure = Figure(figsize=(6 * len(kinds), 4), layout="constrained")
        for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
            _lines(axes, content, kind)
    else:
        panels = [(kind, name) for kind in kinds for name in content[kind]]
        figure = Figure(figsize=(4.4 * len(panels), 4), layout="constrained")
        for axes, (kind, name) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _triangle(figure, axes, content, kind, name)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


def _lines(axes: Any, content: dict[str, Any], kind: str) -> None:
    betas, one = content["betas"], {"losses": "loss", "scores": "score"}[kind]
    for name, values in content[kind].items():
        (line,) = axes.plot(betas, values, "o-", markersize=3, label=name)
        low, high = zip(*content[f"{one}_intervals"][name], strict=True)
        axes.fill_between(betas, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        ends = [values[betas.index(0)], values[betas.index(1)]]
        axes.plot([0, 1], ends, ":", color=line.get_color(), linewidth=1)
    axes.plot(betas, content["mean" if one == "loss" else "mean_score"], "k--", label="mean")
    axes.axvline(content["best"]["beta"], color="grey", linewidth=0.8)
    label = "held-out loss (nats per token)" if one == "loss" else "score"
    axes.set(xlabel=f"β (1: {_end(content['method'], 0)}, 0: the second)", ylabel=label)
    axes.legend(frameon=False)


def _triangle(figure: Any, axes: Any, content: dict[str, Any], kind: str, name: str) -> None:
    """Draw the triangle, whose corners are the models, the first on top."""
    place = [(w[2] - w[1], 1.7320508 * w[0]) for w in content["weights"]]
    x, y = zip(*place, strict=True)
    values, colours = content[kind][name], "viridis_r" if kind == "losses" else "viridis"
    if all(map(math.isfinite, values)):
        surface = axes.tricontourf(x, y, values, levels=20, cmap=colours)
    else:
        surface = axes.scatter(x, y, c=values, cmap=colours)
    axes.plot(x, y, ".", color="white", markersize=2)
    best = place[content["weights"].index(content["best"]["weights"])]
    axes.plot(*best, "o", markerfacecolor="none", markeredgecolor="red", markersize=9)
    for model, (dx, dy) in enumerate(((0, 0.06), (-0.12, -0.14), (0.12, -0.14))):
        corner = ((0, 1.7320508), (-1, 0), (1, 0))[model]
        axes.text(corner[0] + dx, corner[1] + dy, _end(content["method"], model), ha="center")
    axes.set(title=name, aspect="equal", ylim=(-0.25, 2.0))
    axes.axis("off")
    figure.colorbar(surface, ax=axes, shrink=0.8, label="loss (nats per token)" if kind == "losses" else "score")
