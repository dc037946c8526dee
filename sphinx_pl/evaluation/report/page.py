"""One HTML file that tells a stranger what was trained and how well it does.

    python -m sphinx_pl.evaluation.report.page --out report.html --run real=DIR --mix DIR --evaluation DIR

Everything is inline: styles, SVG charts, PNG pictures. An input that is missing leaves its section with one sentence.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import yaml
from rich.console import Console

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.evaluation.mixtures.reweighting import held_text
from sphinx_pl.evaluation.report import tables
from sphinx_pl.evaluation.report.charts import Series, line_chart, smooth
from sphinx_pl.evaluation.report.gallery import RIGHT, SCRIPT, SEED, STYLE, cards, sections, verdict
from sphinx_pl.evaluation.report.reference_results import read_published
from sphinx_pl.evaluation.report.tables import Evaluation
from sphinx_pl.evaluation.results import RESULTS, read_predictions, read_results
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import check_writable, write_whole
from sphinx_pl.utils.html import page, table, visible
from sphinx_pl.utils.metrics_csv import METRICS, read_metrics

log = logging.getLogger(__name__)
T = TypeVar("T")

LAST = 20
"""Logged losses that a mean is shown of, beside the last one: each is of few steps."""

WITHOUT_TEXT = "_notext"
"""Ending of the name of a run that trained without text-only data, beside the run of that name with it."""


@dataclass(frozen=True)
class Run:
    """A training run: `columns` maps a logged name to its (step, value) points in order of steps."""

    name: str
    folder: Path
    columns: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Optimizer steps made."""
        return int(max((points[-1][0] for points in self.columns.values()), default=0))

    @property
    def seconds(self) -> float:
        """Spent in optimizer steps, from the logged time per step; validation and checkpoints are not in it."""
        return sum(seconds * steps for _, seconds, steps in self._logged())

    def total(self, what: str) -> float:
        """Tokens or images that the steps saw, from the logged rates."""
        rates = dict(self.columns.get(f"perf/{what}_per_s", []))
        return sum(rates.get(step, 0.0) * seconds * steps for step, seconds, steps in self._logged())

    def _logged(self) -> list[tuple[float, float, float]]:
        """(step, seconds per step, steps since the log before) of each log of the throughput."""
        logs = self.columns.get("perf/time_step", [])
        before = [0.0, *(step for step, _ in logs)]
        return [(step, seconds, step - last) for (step, seconds), last in zip(logs, before, strict=False)]

    @property
    def sources(self) -> list[str]:
        """Names of the training sources that are switched on."""
        data = self.config.get("data")
        sources = data.get("sources") if isinstance(data, dict) else None
        return (
            [str(name) for name, values in sources.items() if values is not None] if isinstance(sources, dict) else []
        )

    @property
    def reads_text(self) -> bool:
        """Whether text-only data was among the training sources; where the configuration is lost, the name tells."""
        if not self.sources:
            return not self.name.endswith(WITHOUT_TEXT)
        sources = (self.config["data"]["sources"][name] for name in self.sources)
        return any("text" in (source.get("kind"), source.get("modality")) for source in sources)

    @property
    def stage(self) -> str:
        """The stage's name in the configuration, else the run's."""
        stage = self.config.get("stage")
        return str(stage.get("name", self.name)) if isinstance(stage, dict) else self.name.removesuffix(WITHOUT_TEXT)

    def under(self, prefix: str) -> dict[str, list[tuple[float, float]]]:
        """Columns that begin with `prefix`, by what follows it."""
        return {name.removeprefix(prefix): points for name, points in self.columns.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class Shown:
    """How many answers the page shows: of each task and benchmark of an evaluation so many that are drawn at random, of
    the others so many of the worst ones and of the right ones, and in all at most `answers`."""

    drawn: int = 4
    wrong: int = 8
    right: int = 3
    answers: int = 240

    def __post_init__(self) -> None:
        for name in ("drawn", "wrong", "right", "answers"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)} must not be negative")


def read_run(name: str, folder: Path) -> Run:
    """The run folder's metrics.csv and composed config; of a sweep, which lies elsewhere, nothing."""
    columns: dict[str, list[tuple[float, float]]] = {}
    for step, row in read_metrics(folder / METRICS)[1].items():
        for column, text in row.items():
            if (value := _number(text)) is not None and column != "epoch":
                columns.setdefault(column, []).append((step, value))
    config: dict[str, Any] = {}
    for candidate in (folder / "config.yaml", folder / ".hydra" / "config.yaml"):
        if candidate.is_file():
            config = _parsed(candidate, yaml.safe_load) or {}
            break
    return Run(name, folder, columns, config)


def read_curve(folder: Path | None) -> dict[str, Any] | None:
    """curve.json of mix_weights.py's `curve` option, or None."""
    file = folder / "curve.json" if folder else None
    return _parsed(file, json.loads) if file and file.is_file() else None


def read_evaluation(folder: Path, name: str = "") -> Evaluation | None:
    """results.json and predictions.jsonl of evaluate.py, or None where there are no results.

    Args:
        name: by default the folder's.
    """
    if not (folder / RESULTS).is_file():
        return None
    results, predictions = _kept(read_results, folder), _kept(read_predictions, folder)
    if results is None:
        return None
    return Evaluation(name or folder.name, results, [prediction.to_dict() for prediction in predictions or ()])


def _kept(read: Callable[[Path], T], folder: Path) -> T | None:
    """What is read; None, with a warning, where it is damaged: one bad file does not cost the others' page."""
    try:
        return read(folder)
    except UserError as error:
        log.warning("left out of the report: %s", error)
        return None


def _parsed(file: Path, parse: Callable[[str], Any]) -> Any:
    """The mapping that the file holds; None, with a warning, where it is damaged."""
    try:
        found = parse(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict | None):
            raise ValueError("no mapping")
        return found
    except (OSError, ValueError, yaml.YAMLError) as error:
        log.warning("%s is left out of the report: %s", file, str(error).splitlines()[0])
        return None


def find_inputs(folder: Path) -> tuple[list[Run], Path | None]:
    """The training runs right under `folder`, in the order in which they were made, and the folder with a curve."""
    logs = sorted(folder.glob(f"*/{METRICS}"), key=lambda file: file.stat().st_mtime)
    curves = sorted(folder.glob("*/curve.json"), key=lambda file: file.stat().st_mtime)
    return [read_run(log.parent.name, log.parent) for log in logs], curves[-1].parent if curves else None


def write_report(
    out: Path,
    runs: Sequence[Run],
    mix: Path | None,
    evaluations: Sequence[Path],
    title: str = "SPHINX-PL",
    shown: Shown | None = None,
) -> None:
    """Read what the folders hold and write the page; see `build`."""
    named = zip(evaluations, _names(evaluations), strict=True)
    found = [evaluation for folder, name in named if (evaluation := read_evaluation(folder, name))]
    page = build(runs, read_curve(mix), found, title, shown)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, page)


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of what is before them as tells them apart."""
    parts = [folder.absolute().parts for folder in folders]
    longest = max(map(len, parts), default=1)
    names = (["/".join(part[-depth:]) for part in parts] for depth in range(1, longest + 1))
    return next((found for found in names if len(set(found)) == len(found)), [str(folder) for folder in folders])


def build(
    runs: Sequence[Run],
    curve: dict[str, Any] | None,
    evaluations: Sequence[Evaluation],
    title: str = "SPHINX-PL",
    shown: Shown | None = None,
) -> str:
    """The whole page as a string."""
    shown = shown or Shown()
    sections = [
        ("results", "What it can do", _results(evaluations)),
        ("next", "What to train on next", "".join(_mixture(evaluation) for evaluation in evaluations)),
        ("answers", "Answers", _answers(evaluations, shown)),
        ("training", "How the loss fell", _training(runs)),
        ("mixing", "Mixing the two models", _mixing(curve)),
        ("language", "Language survives", _language(runs)),
    ]
    sections = [section for section in sections if section[0] != "next" or section[2]]  # it is a choice
    links = " ".join(f'<a href="#{anchor}">{heading}</a>' for anchor, heading, _ in sections)
    body = "".join(
        f'<section id="{anchor}"><h2>{heading}</h2>{content}</section>' for anchor, heading, content in sections
    )
    header = f"<h1>{escape(title)}</h1>{_summary(runs, evaluations)}<nav>{links}</nav>"
    return page(title, header, body, STYLE + tables.STYLE + _STYLE, SCRIPT)


def _summary(runs: Sequence[Run], evaluations: Sequence[Evaluation]) -> str:
    model: dict[str, Any] = next((run.config["model"] for run in runs if isinstance(run.config.get("model"), dict)), {})
    named = f" <b>{escape(str(model['name']))}</b>" if model.get("name") else ""
    trained = f", trained in {len(runs)} {'run' if len(runs) == 1 else 'runs'}" if runs else ""
    text = (
        f"<p class=lead>A multimodal language model{named}{trained}: a language model reads what several vision "
        "encoders see, and answers in text, with boxes and points where a question asks for them. This page shows "
        f"{'how its training went and ' if runs else ''}what it gets right and wrong on data that it was not trained "
        "on.</p>"
    )
    rows = []
    for run in runs:
        loss = run.columns.get("train/loss")
        rows.append(
            [
                escape(run.name),
                f"{run.steps:,}",
                f"{run.seconds / 60:.1f}" if run.seconds else "–",
                f"{run.total('tokens'):,.0f}" if run.total("tokens") else "–",
                f"{run.total('images'):,.0f}" if run.total("images") else "–",
                f"{loss[-1][1]:.3f}" if loss else "–",
                f"{_mean(loss[-LAST:]):.3f}" if loss else "–",
                escape(", ".join(run.sources)) or "–",
            ]
        )
    last = f"mean of the last {LAST}"
    head = ["run", "steps", "minutes", "tokens", "images", "last loss", last, "trained on"]
    overview = table(head, rows, numbers={1, 2, 3, 4, 5, 6}) if rows else ""
    if rows:
        overview += (
            "<p class=note>Minutes, tokens and images are of optimizer steps, without validation and checkpoints. "
            f"Losses are of training, per token: the last one that was logged, and the {last} that were.</p>"
        )
    tested = sum(len(evaluation.predictions) for evaluation in evaluations)
    when = datetime.datetime.now(datetime.UTC).strftime("%d %B %Y")
    return text + overview + f"<p class=note>{tested:,} held-out questions answered. Written on {when}.</p>"


def _training(runs: Sequence[Run]) -> str:
    blocks = []
    for run in runs:
        if "train/loss" not in run.columns:
            blocks.append(
                f"<h3>{escape(run.name)}</h3>" + _missing(f"No metrics.csv with train/loss in {run.folder.name}.")
            )
            continue
        train = run.columns["train/loss"]
        series = [Series("", train, 0, faint=True), Series("training, smoothed", smooth(train), 0)]
        held_out = sorted(run.under("val/loss/").items())
        series += [
            Series(f"held out: {source}", points, i + 1, dots=True) for i, (source, points) in enumerate(held_out)
        ]
        tasks = "".join(_small_loss(task, points) for task, points in sorted(run.under("train/loss_task/").items()))
        chart = line_chart(series, "optimizer step", "loss per token (nats)")
        blocks.append(f"<h3>{escape(run.name)}</h3><figure>{chart}</figure>")
        if tasks:
            summary = f"Training loss of each task, with the mean of the last {LAST} that were logged"
            blocks.append(f"<details><summary>{summary}</summary><div class=grid>{tasks}</div></details>")
    return "".join(blocks) or _missing("There are no training runs: give them with --run.")


def _small_loss(task: str, points: list[tuple[float, float]]) -> str:
    chart = line_chart([Series("", points, faint=True), Series("", smooth(points))], small=True)
    caption = f"<figcaption>{escape(task)} <span>{_mean(points[-LAST:]):.2f}</span></figcaption>"
    return f"<figure class=small>{chart}{caption}</figure>"


def _mixing(curve: dict[str, Any] | None) -> str:
    if not curve:
        return _missing("There is no curve: run mix_weights.py with the curve option.")
    betas: list[float] = curve["betas"]
    losses: dict[str, list[float]] = curve["losses"]
    mean: list[float] = curve["mean"]
    best = min(range(len(betas)), key=lambda i: mean[i])
    series = [
        Series(f"held out: {source}", list(zip(betas, values, strict=True)), i + 1, dots=True)
        for i, (source, values) in enumerate(sorted(losses.items()))
    ]
    series.append(Series("mean", list(zip(betas, mean, strict=True)), 0, dots=True))
    chart = line_chart(series, "β, the weight of the real model", "held-out loss (nats)", mark=betas[best])
    low, high = min(range(len(betas)), key=betas.__getitem__), max(range(len(betas)), key=betas.__getitem__)
    inside = "Mixing helps" if best not in (low, high) else "On this mean an unmixed model is best"
    return (
        "<p>Two models, one after the real and one after the synthetic stage, are mixed weight by weight: "
        "θ = β·θ<sub>real</sub> + (1−β)·θ<sub>synthetic</sub>. Lower is better.</p>"
        f"<figure>{chart}</figure>"
        f"<p>{inside}: the mean loss is lowest at <b>β = {betas[best]:.2f}</b>, {mean[best]:.4f}. "
        f"That is {mean[low] - mean[best]:.4f} below the synthetic end (β = {betas[low]:g}) and "
        f"{mean[high] - mean[best]:.4f} below the real end (β = {betas[high]:g}).</p>"
    )


def _language(runs: Sequence[Run]) -> str:
    rows = []
    text = {run.name: dict(run.columns.get("val/loss/text", [])) for run in runs}
    for run in runs:
        if not (points := run.columns.get("val/loss/text")):
            continue
        (first, before), (last, after) = points[0], points[-1]
        # A run without text may stop early: what counts is the run with text after as many steps.
        beside = text.get(run.name.removesuffix(WITHOUT_TEXT), {}).get(last) if not run.reads_text else None
        rows.append(
            [
                escape(run.stage),
                escape(run.name),
                "with" if run.reads_text else "without",
                f"{before:.3f} <small>step {first:.0f}</small>",
                f"{after:.3f} <small>step {last:.0f}</small>",
                f"{after - before:+.3f}",
                "" if beside is None else f"{beside:.3f}",
            ]
        )
    if not rows:
        return _missing("No run logged val/loss/text.")
    head = ["stage", "run", "text in the steps", "before", "after", "change", "with text, same step"]
    return (
        "<p>Loss (nats per token) on held-out text without images, before and after each stage. "
        "“With” had text-only data in every optimizer step, “without” had none; both are the same run otherwise, and "
        "one without may have been stopped early.</p>" + table(head, rows, numbers={3, 4, 5, 6})
    )


def _results(evaluations: Sequence[Evaluation]) -> str:
    content = tables.results(evaluations, read_published())
    if not content:
        return _missing("There are no results: run evaluate.py and give its folder with --evaluation.")
    return (
        "<p>Benchmarks are counted by their authors’ rules, but for guesses and language models as judges, which are "
        "left out; shares are per cent. Small numbers are 95 % bootstrap "
        "intervals. “Unparsed” answers lacked the form that was asked for; they count as wrong. Published numbers are "
        "for orientation: prompts, image sizes, training data and what counts as an answer may have been others.</p>"
        + content
    )


def _answers(evaluations: Sequence[Evaluation], shown: Shown) -> str:
    answered = [evaluation for evaluation in evaluations if evaluation.predictions]
    if not answered:
        return _missing("There are no predictions: run evaluate.py.")
    blocks = []
    for evaluation in answered:
        at_most = shown.answers // len(answered)
        chosen = sections(evaluation.predictions, shown.drawn, shown.wrong, shown.right, at_most)
        counted = Counter(map(verdict, evaluation.predictions))
        seen = Counter(verdict(prediction) for _, prediction in chosen)
        total = {name: counted[name] for name in ("right", "elsewhere")}
        wrong, wrong_seen = (found["wrong"] + found["unparsed"] for found in (counted, seen))
        unknown = (
            f"; {seen['elsewhere']:,} of {total['elsewhere']:,} that are scored elsewhere" if total["elsewhere"] else ""
        )
        heading = f"<h3>{visible(evaluation.name)}</h3>" if len(answered) > 1 else ""
        coordinates = Coordinates(decimals=int(evaluation.results.get("decimals", 3)))
        size = int(evaluation.results.get("image_size", 0))
        shown_cards = cards([p for _, p in chosen], size, coordinates, [how for how, _ in chosen])
        blocks.append(
            f"{heading}<p class=note>{wrong_seen:,} of {wrong:,} wrong answers are here, and {seen['right']:,} of "
            f"{total['right']:,} right ones{unknown}.</p>{shown_cards}"
        )
    return (
        f"<p>First of each task and benchmark {shown.drawn} answers that were drawn at random whatever they score "
        f"(seed {SEED}); then at most {shown.wrong} mistakes, those with the lowest scores, and at most {shown.right} "
        f"more right answers. A score below {RIGHT} is shown as wrong.</p>" + "".join(blocks)
    )


def _mixture(evaluation: Evaluation) -> str:
    """What evaluate.py's `then=mixture` found; "" where it was not asked for."""
    lean = evaluation.results.get("mixture")
    if not lean:
        return ""
    rates = [
        [
            f"<span class=sub>{visible(rate['topic'])}</span>" if rate["topic"] else f"<b>{visible(rate['task'])}</b>",
            f"{rate['n']:,}",
            f"{rate['failure']:.3f}",
            f"{rate['shrunk']:.3f}",
        ]
        for rate in lean["rates"]
    ]
    sources = [
        [
            f"<b>{visible(source['name'])}</b>",
            f"<small>{visible(source['kept'])}</small>" if source["failure"] is None else f"{source['failure']:.3f}",
            f"{source['weight']:.4g}",
            f"{source['new_weight']:.4g}",
            f"{source['share']:.1%}",
            f"{source['new_share']:.1%}",
            f'<span class="{"up" if source["new_share"] > source["share"] else "flat"}">{_change(source)}</span>',
            f"<small>{visible(held_text({(h['task'], h['topic']): h['share'] for h in source['holds']}))}</small>",
        ]
        for source in lean["sources"]
    ]
    head = ["source", "failure", "weight", "new weight", "share", "new share", "change", "holds"]
    return (
        "<p>A training mixture that leans towards what this model fails at, as MLLM-DataEngine (arXiv 2308.13566) "
        "looks for data: a source’s weight grows with the mean failure of the tasks and topics that it holds. A "
        "failure is 1 − score. Tasks have different measures, and one may fail more because its measure is stricter. "
        "Whether the new mixture trains a better model is not known before it has been tried. Written to "
        f"<b>{visible(Path(str(lean['file'])).name)}</b>.</p>"
        + table(head, sources, set(range(1, 7)))
        + "<details><summary>Failures of tasks and topics</summary><p>“Used” is drawn towards the task’s mean, and a "
        "task’s towards that of all questions, the more the fewer questions there are.</p>"
        + table(["task", "questions", "failure", "used"], rates, {1, 2, 3})
        + "</details>"
    )


def _change(source: dict[str, Any]) -> str:
    return f"× {source['new_share'] / source['share']:.2f}" if source["share"] else "–"


def _missing(sentence: str) -> str:
    return f"<p class=missing>{escape(sentence)}</p>"


def _mean(points: Sequence[tuple[float, float]]) -> float:
    return sum(value for _, value in points) / len(points)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None


_STYLE = """
header td:last-child{min-width:14rem}
figure{margin:1rem 0}figure svg{width:100%;height:auto;display:block}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:.6rem 1.4rem}
.small{margin:.4rem 0}figcaption{font-size:.8rem;display:flex;justify-content:space-between}
dl{font-size:.92rem}dt{font-weight:600}dd{margin:0 0 .6rem;max-width:44rem}
"""


def check_page(path: Path, key: str) -> None:
    """Whether a page can be written there; called before what takes long.

    Raises:
        UserError: it cannot, or another kind of file is there; `key` is what the user gave it as.
    """
    check_writable(path, key)
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            if not file.read(64).lstrip().lower().startswith(b"<!doctype html"):
                raise UserError(f"{key}: '{path}' is there and is no page: choose another name")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: read the folders, write the file, print its path. 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(prog="python -m sphinx_pl.evaluation.report.page", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the HTML file to write")
    parser.add_argument("--run", action="append", default=[], metavar="NAME=DIR", help="a training run's folder")
    parser.add_argument("--mix", type=Path, metavar="DIR", help="the folder with curve.json")
    parser.add_argument("--evaluation", type=Path, action="append", default=[], metavar="DIR", nargs="+")
    parser.add_argument("--title", default="SPHINX-PL")
    default = Shown()
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
        shown = Shown(options.drawn, options.wrong, options.right, options.answers)
        write_report(options.out, runs, options.mix, folders, options.title, shown)
    except UserError as error:
        console.print(str(error), style="red", markup=False)
        return 2
    console.print(f"report: {options.out}", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
