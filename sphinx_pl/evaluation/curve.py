"""The mixing curve: held-out losses of β·first + (1-β)·second for β from 0 to 1."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

from sphinx_pl.checkpoint.format import Checkpoint, copy_into
from sphinx_pl.checkpoint.mixing import Mixture, check_compatible
from sphinx_pl.errors import UserError
from sphinx_pl.evaluation.losses import SourceLoss
from sphinx_pl.files import write_whole
from sphinx_pl.models.sphinx import Sphinx


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """The loss of each source at `beta`, the first checkpoint's weight."""

    beta: float
    losses: Mapping[str, SourceLoss]

    def mean(self, names: Iterable[str]) -> float:
        """The sources' mean losses, averaged: each source counts alike, whatever its size."""
        means = [self.losses[name].mean for name in names]
        return math.fsum(means) / len(means)


def check_ends(checkpoints: Sequence[Checkpoint]) -> None:
    """Raises: UserError: not two checkpoints."""
    if len(checkpoints) != 2:
        raise UserError(f"a curve runs between 2 checkpoints, not {len(checkpoints)}: give checkpoints=[A,B]")


def mixing_curve(
    model: Sphinx,
    checkpoints: Sequence[Checkpoint],
    betas: Sequence[float],
    losses_fn: Callable[[Sphinx], Mapping[str, SourceLoss]],
    method: str = "linear",
) -> list[CurvePoint]:
    """Evaluate `losses_fn` at every β, overwriting the weights of one `model` of the checkpoints' architecture.

    The weights at each β are those that `mix_checkpoints` would write.

    Raises:
        UserError: not two checkpoints, or two that cannot be mixed or do not fit the model.
    """
    check_ends(checkpoints)
    check_compatible(checkpoints)
    checkpoints[0].load_into(model)  # names and shapes are checked here, once
    target = model.state_dict()
    points = []
    for beta in track(betas, description="Mixing curve"):
        mixture = Mixture(checkpoints, [beta, 1 - beta], method)
        copy_into(target, ((name, mixture.tensor(name)) for name in mixture))
        points.append(CurvePoint(beta, losses_fn(model)))
    return points


def best_beta(points: Sequence[CurvePoint], names: Sequence[str]) -> CurvePoint:
    """The point where the mean over the sources `names` is lowest; the first of equals."""
    return min(points, key=lambda point: point.mean(names))


def barrier(points: Sequence[CurvePoint], name: str) -> float:
    """How far the loss of `name` rises above the straight line between the curve's ends, in nats; 0 if nowhere.

    Zero means that the two models lie in one basin, as far as this source shows (linear mode connectivity,
    Frankle et al. 2020).
    """
    ordered = sorted(points, key=lambda point: point.beta)
    low, high = ordered[0], ordered[-1]
    slope = (high.losses[name].mean - low.losses[name].mean) / (high.beta - low.beta)
    return max(p.losses[name].mean - low.losses[name].mean - slope * (p.beta - low.beta) for p in ordered)


def summary(points: Sequence[CurvePoint], names: Sequence[str]) -> dict[str, Any]:
    """The content of curve.json: the curve in lists, the best β for the mean of all sources, and each one's barrier.

    `gain` is by how much the best mean lies below the better of the curve's two ends, in nats.
    """
    means = [point.mean(names) for point in points]
    best = best_beta(points, names)
    return {
        "betas": [point.beta for point in points],
        "losses": {name: [point.losses[name].mean for point in points] for name in names},
        "intervals": {name: [point.losses[name].interval() for point in points] for name in names},
        "tokens": {name: points[0].losses[name].count for name in names},
        "mean": means,
        "best": {"beta": best.beta, "mean": best.mean(names), "gain": min(means[0], means[-1]) - best.mean(names)},
        "barrier": {name: barrier(points, name) for name in names},
    }


def write_curve(points: Sequence[CurvePoint], folder: Path) -> dict[str, Any]:
    """Write curve.csv, curve.json and curve.png to `folder` and return `summary`. Points go from end to end."""
    names = list(points[0].losses)
    content = summary(points, names)
    folder.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["beta", *(f"{name}{suffix}" for name in names for suffix in ("", "/low", "/high")), "mean"])
    for i, point in enumerate(points):
        cells = [(content["losses"][name][i], *content["intervals"][name][i]) for name in names]
        writer.writerow([point.beta, *(value for cell in cells for value in cell), content["mean"][i]])
    write_whole(folder / "curve.csv", table.getvalue())
    write_whole(folder / "curve.json", json.dumps(content, indent=2) + "\n")
    write_whole(folder / "curve.png", _picture(content))
    return content


def _picture(content: dict[str, Any]) -> bytes:
    from matplotlib.figure import Figure  # without pyplot: no display, no state between calls

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    betas = content["betas"]
    for name, losses in content["losses"].items():
        (line,) = axes.plot(betas, losses, "o-", markersize=3, label=name)
        low, high = zip(*content["intervals"][name], strict=True)
        axes.fill_between(betas, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.plot(betas, content["mean"], "k--", label="mean")
    axes.axvline(content["best"]["beta"], color="grey", linewidth=0.8)
    axes.set(xlabel="β (1: first checkpoint, 0: second)", ylabel="held-out loss (nats per token)")
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
