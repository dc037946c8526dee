"""One HTML file that shows a stranger what was trained and how well it does.

    python -m sphinx_pl.evaluation.report.page --out report.html --run real=DIR --mix DIR --evaluation DIR

Everything is inline: styles, SVG charts, PNG pictures. A missing input leaves a sentence in its
section.
"""

from __future__ import annotations

import argparse
import datetime
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.evaluation.mixtures.reweighting import held_text
from sphinx_pl.evaluation.report import tables
from sphinx_pl.evaluation.report.charts import Series, line_chart, smooth
from sphinx_pl.evaluation.report.gallery import MISTAKES, RIGHT, SCRIPT, SEED, STYLE, cards, outcome, sections
from sphinx_pl.evaluation.report.inputs import (
    WITHOUT_TEXT,
    TrainingRun,
    read_curve,
    read_evaluation,
    read_run,
)
from sphinx_pl.evaluation.report.reference_results import read_reference_results
from sphinx_pl.evaluation.report.render import asset, render
from sphinx_pl.evaluation.report.tables import EvaluationFiles
from sphinx_pl.evaluation.results import RESULTS
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import check_writable, write_whole
from sphinx_pl.utils.html import page

LAST = 20
"""The number of logged losses in the mean that stands beside the last one: each is of few steps."""


@dataclass(frozen=True)
class AnswerCounts:
    """The numbers of answers on the page.

    Attributes:
        drawn: answers of each task and benchmark of an evaluation that are drawn at random.
        wrong: the worst of its other answers.
        right: right answers among the others.
        answers: the most answers in all.
    """

    drawn: int = 4
    wrong: int = 8
    right: int = 3
    answers: int = 240

    def __post_init__(self) -> None:
        for name in ("drawn", "wrong", "right", "answers"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)} must not be negative")


def write_report(
    out: Path,
    runs: Sequence[TrainingRun],
    mix: Path | None,
    evaluations: Sequence[Path],
    title: str = "SPHINX-PL",
    counts: AnswerCounts | None = None,
) -> None:
    """Write the page of the folders' contents; see `build`."""
    named = zip(evaluations, _names(evaluations), strict=True)
    read = [evaluation for folder, name in named if (evaluation := read_evaluation(folder, name))]
    html = build(runs, read_curve(mix), read, title, counts)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, html)


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of their parents as make them different."""
    parts = [folder.absolute().parts for folder in folders]
    longest = max(map(len, parts), default=1)
    names = (["/".join(part[-depth:]) for part in parts] for depth in range(1, longest + 1))
    return next((each for each in names if len(set(each)) == len(each)), [str(folder) for folder in folders])


def build(
    runs: Sequence[TrainingRun],
    curve: dict[str, Any] | None,
    evaluations: Sequence[EvaluationFiles],
    title: str = "SPHINX-PL",
    counts: AnswerCounts | None = None,
) -> str:
    """The whole page as a string."""
    counts = counts or AnswerCounts()
    answered = [evaluation for evaluation in evaluations if evaluation.predictions]
    mixtures = [mixture for evaluation in evaluations if (mixture := _mixture(evaluation))]
    header = render("header.html", title=title, last=LAST, mixtures=mixtures, **_summary(runs, evaluations))
    body = render(
        "report.html",
        results=tables.results(evaluations, read_reference_results()),
        mixtures=mixtures,
        answers=[_answers(evaluation, counts, counts.answers // len(answered)) for evaluation in answered],
        counts=counts,
        right=RIGHT,
        seed=SEED,
        training=[_training(run) for run in runs],
        last=LAST,
        mixing=_mixing(curve) if curve else None,
        language=_language(runs),
    )
    return page(title, header, body, STYLE + asset("report.css"), SCRIPT)


def _summary(runs: Sequence[TrainingRun], evaluations: Sequence[EvaluationFiles]) -> dict[str, Any]:
    """The values of the header."""
    model: dict[str, Any] = next((run.config["model"] for run in runs if isinstance(run.config.get("model"), dict)), {})
    rows = []
    for run in runs:
        losses = [loss for _, loss in run.columns.get("train/loss", [])]
        totals = [f"{run.total(what):,.0f}" if run.total(what) else "–" for what in ("tokens", "images")]
        rows.append(
            [
                run.name,
                f"{run.steps:,}",
                f"{run.seconds / 60:.1f}" if run.seconds else "–",
                *totals,
                f"{losses[-1]:.3f}" if losses else "–",
                f"{_mean(losses[-LAST:]):.3f}" if losses else "–",
                ", ".join(run.sources) or "–",
            ]
        )
    return {
        "model": str(model["name"]) if model.get("name") else "",
        "rows": rows,
        "tested": sum(len(evaluation.predictions) for evaluation in evaluations),
        "date": datetime.datetime.now(datetime.UTC).strftime("%d %B %Y"),
    }


def _training(run: TrainingRun) -> dict[str, Any]:
    """The losses of a run as charts; `chart` is None where there are none."""
    if "train/loss" not in run.columns:
        return {"name": run.name, "folder": run.folder.name, "chart": None, "tasks": []}
    train = run.columns["train/loss"]
    held_out = sorted(run.under("val/loss/").items())
    series = [
        Series("", train, 0, faint=True),
        Series("training, smoothed", smooth(train), 0),
        *(Series(f"held out: {source}", points, i + 1, dots=True) for i, (source, points) in enumerate(held_out)),
    ]
    tasks = []
    for task, points in sorted(run.under("train/loss_task/").items()):
        small = line_chart([Series("", points, faint=True), Series("", smooth(points))], small=True)
        tasks.append({"name": task, "chart": small, "mean": _mean([loss for _, loss in points[-LAST:]])})
    chart = line_chart(series, "optimizer step", "loss per token (nats)")
    return {"name": run.name, "folder": run.folder.name, "chart": chart, "tasks": tasks}


def _mixing(curve: Mapping[str, Any]) -> dict[str, Any]:
    """The chart of the mixing curve, and its best point beside the ends."""
    betas: list[float] = curve["betas"]
    losses: dict[str, list[float]] = curve["losses"]
    mean: list[float] = curve["mean"]
    best = min(range(len(betas)), key=lambda i: mean[i])
    series = [
        Series(f"held out: {source}", list(zip(betas, values, strict=True)), i + 1, dots=True)
        for i, (source, values) in enumerate(sorted(losses.items()))
    ]
    series.append(Series("mean", list(zip(betas, mean, strict=True)), 0, dots=True))
    low, high = min(range(len(betas)), key=betas.__getitem__), max(range(len(betas)), key=betas.__getitem__)
    return {
        "chart": line_chart(series, "β, the weight of the real model", "held-out loss (nats)", mark=betas[best]),
        "helps": best not in (low, high),
        "beta": betas[best],
        "loss": mean[best],
        "ends": [(name, betas[end], mean[end] - mean[best]) for name, end in (("synthetic", low), ("real", high))],
    }


def _language(runs: Sequence[TrainingRun]) -> list[dict[str, Any]]:
    """A row for each run that logged its loss on held-out text."""
    rows = []
    text = {run.name: dict(run.columns.get("val/loss/text", [])) for run in runs}
    for run in runs:
        if not (points := run.columns.get("val/loss/text")):
            continue
        # A run without text may stop early, so it stands beside the run with text after as many
        # steps.
        last = points[-1][0]
        beside = text.get(run.name.removesuffix(WITHOUT_TEXT), {}).get(last) if not run.reads_text else None
        ends = points[0][1], points[-1][1]
        perplexities = [math.exp(min(loss, 700)) for loss in ends]
        rows.append(
            {"run": run, "first": points[0], "last": points[-1], "beside": beside, "perplexities": perplexities}
        )
    return rows


def _answers(evaluation: EvaluationFiles, counts: AnswerCounts, at_most: int) -> dict[str, Any]:
    """The cards of an evaluation, with the number of right and wrong answers."""
    chosen = sections(evaluation.predictions, counts.drawn, counts.wrong, counts.right, at_most)
    totals = []
    for outcomes in (
        Counter(map(outcome, evaluation.predictions)),
        Counter(outcome(prediction) for _, prediction in chosen),
    ):
        wrong = sum(outcomes[name] for name in MISTAKES)
        totals.append({"wrong": wrong, "right": outcomes["right"], "elsewhere": outcomes["elsewhere"]})
    coordinates = Coordinates(decimals=int(evaluation.results.get("decimals", 3)))
    size = int(evaluation.results.get("image_size", 0))
    html = cards([prediction for _, prediction in chosen], size, coordinates, [heading for heading, _ in chosen])
    return {"name": evaluation.name, "total": totals[0], "here": totals[1], "cards": html}


def _mixture(evaluation: EvaluationFiles) -> dict[str, Any] | None:
    """The mixture that evaluate.py's `then=mixture` wrote; None where there is none."""
    mixture = evaluation.results.get("mixture")
    if not mixture:
        return None
    sources = []
    for source in mixture["sources"]:
        shares = {(held["task"], held["topic"]): held["share"] for held in source["holds"]}
        change = f"× {source['new_share'] / source['share']:.2f}" if source["share"] else "–"
        sources.append({**source, "holds": held_text(shares), "change": change})
    return {"file": Path(str(mixture["file"])).name, "rates": mixture["rates"], "sources": sources}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def check_page(path: Path, key: str) -> None:
    """Check that a page can be written to a file, before anything that takes long.

    Raises:
        UserError: it cannot, or the file is not a page. The message names the option `key`.
    """
    check_writable(path, key)
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            if not file.read(64).lstrip().lower().startswith(b"<!doctype html"):
                raise UserError(f"{key}: '{path}' exists and is not a page: choose another name")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of the command line: 0, or 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(prog="python -m sphinx_pl.evaluation.report.page", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the HTML file to write")
    parser.add_argument("--run", action="append", default=[], metavar="NAME=DIR", help="a training run's folder")
    parser.add_argument("--mix", type=Path, metavar="DIR", help="the folder with curve.json")
    parser.add_argument("--evaluation", type=Path, action="append", default=[], metavar="DIR", nargs="+")
    parser.add_argument("--title", default="SPHINX-PL")
    default = AnswerCounts()
    parser.add_argument("--drawn", type=int, default=default.drawn, help="answers drawn at random of each, shown first")
    parser.add_argument("--wrong", type=int, default=default.wrong, help="mistakes shown of each task or benchmark")
    parser.add_argument("--right", type=int, default=default.right, help="right answers shown of each")
    parser.add_argument("--answers", type=int, default=default.answers, help="answers shown in all, at most")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        runs = []
        for text in options.run:
            name, separator, folder = text.partition("=")
            if not (name and separator and folder):
                raise UserError(f"--run {text}: write it as name=folder, such as --run real=outputs/demo/real")
            if not Path(folder).is_dir():
                raise UserError(f"--run {text}: there is no folder '{folder}'")
            runs.append(read_run(name, Path(folder)))
        folders = [folder for group in options.evaluation for folder in group]
        for folder in folders:
            if not (folder / RESULTS).is_file():
                raise UserError(f"--evaluation {folder}: it has no {RESULTS}: give a folder that evaluate.py wrote to")
        check_page(options.out, "--out")
        counts = AnswerCounts(options.drawn, options.wrong, options.right, options.answers)
        write_report(options.out, runs, options.mix, folders, options.title, counts)
    except UserError as error:
        console.print(str(error), style="red", markup=False)
        return 2
    console.print(f"report: {options.out}", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
