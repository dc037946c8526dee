"""Ask a checkpoint the questions of test sources and benchmarks, and score the answers.

The file conf/evaluate.yaml explains the keys.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console

from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.data.records import read_records
from sphinx_pl.generation.decoding import GenerationConfig
from sphinx_pl.runtime.device import autocast, choose_device
from sphinx_pl.runtime.hydra_app import entry_point
from sphinx_pl.runtime.ranks import join_plainly, this_process
from sphinx_pl.settings.evaluate import EvaluateConfig, check_evaluate
from sphinx_pl.utils.config import pick
from sphinx_pl.utils.console import Table
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import make_folder

TASKS_NAME = "tasks"
"""The name of the test sources beside the names of the benchmarks."""

if TYPE_CHECKING:
    from sphinx_pl.data.schema import Record
    from sphinx_pl.evaluation.answer_log import AnswerLog
    from sphinx_pl.evaluation.mixtures.reweighting import Reweighting, TrainingMixture
    from sphinx_pl.evaluation.report.summary import ScoreRow
    from sphinx_pl.evaluation.runner import Prediction
    from sphinx_pl.models.sphinx import Sphinx


def results_table(rows: Iterable[ScoreRow]) -> Table:
    """Return the results as a terminal shows them.

    A green triangle marks an interval that is wholly above the baseline.
    """
    table = Table(
        title="Results",
        caption="▲: the whole 95 % interval is above the baseline",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("task")
    for name in ("score", "95 %", "baseline", "", "", "n", "unparsed"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in rows:
        part = " · ".join(name for name in (row.topic, row.domain) if name)
        table.add_row(
            f"  {part}" if part else f"[bold]{row.task}[/]",
            f"{row.score:.3f}",
            f"{row.low:.2f}–{row.high:.2f}",
            "–" if row.baseline is None else f"{row.baseline:.3f}",
            row.baseline_kind,
            "[green]▲[/]" if row.above else "",
            str(row.n),
            str(row.unparsed or ""),
        )
    return table


def benchmarks_table(results: Iterable[Mapping[str, Any]]) -> Table:
    """Return the benchmarks' numbers as a terminal shows them."""
    from sphinx_pl.evaluation.metrics import number_text

    table = Table(title="Benchmarks", caption="with 95 % intervals", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("benchmark", "metric"):
        table.add_column(name)
    for name in ("value", "95 %", "n", "unparsed"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        counts = str(result["n"]), str(result["unparsed"] or "")
        for place, value in enumerate(v for v in result["values"] if not v["category"]):
            texts = [number_text(value[key], value["percent"]) for key in ("value", "low", "high")]
            first = (f"[bold]{result['name']}[/]", *counts) if not place else ("", "", "")
            interval = "" if value["low"] is None else f"{texts[1]}–{texts[2]}"
            table.add_row(first[0], value["measure"], texts[0], interval, *first[1:])
        if not result["values"]:
            table.add_row(f"[bold]{result['name']}[/]", "(scored elsewhere)", "", "", *counts)
    return table


def flat(results: Mapping[str, Any]) -> dict[str, float]:
    """Return every task's score and every benchmark's metrics by name, such as
    `pope_random/f1`."""
    numbers = {row["task"]: row["score"] for row in results["rows"] if not row["topic"] and not row["domain"]}
    for result in results["benchmarks"]:
        for value in result["values"]:
            if value["value"] is not None:
                parts = result["name"], value["measure"], value["category"]
                numbers["/".join(part for part in parts if part)] = value["value"]
    return numbers


def log_to_wandb(arguments: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Log a W&B run with the results as its summary and as a table.

    Args:
        arguments: the arguments of wandb.init.
    """
    import wandb

    with wandb.init(**{"job_type": "evaluate", "config": results["options"], **arguments}) as run:
        numbers = flat(results)
        run.summary.update(numbers)
        run.log({"results": wandb.Table(columns=["name", "value"], data=[list(item) for item in numbers.items()])})


class Asking:
    """A loaded model that answers lists of questions. Each list has its own answer log."""

    def __init__(self, options: EvaluateConfig, folder: Path) -> None:
        from sphinx_pl.data.processor import Processor

        assert options.checkpoint is not None
        self.options, self.folder = options, folder
        self.processes = this_process()
        self.device = choose_device(options.device, self.processes.local_rank)
        self.checkpoint = open_checkpoint(options.checkpoint)
        self.processor = Processor.from_dict(
            self.checkpoint.processor, self.checkpoint.tokenizer_file, self.checkpoint.model_config
        )
        self.generation = GenerationConfig(**vars(options.generation))
        self._model: Sphinx | None = None

    @property
    def model(self) -> Sphinx:
        """The model, which is loaded on first use, after all checks of the questions."""
        if self._model is None:
            from sphinx_pl.generation.assistant import Assistant

            assert self.options.checkpoint is not None
            self._model = Assistant.load(self.options.checkpoint, str(self.device), self.options.precision).model
        return self._model

    def __call__(
        self, name: str, records: Sequence[Record], lost: dict[str, int] | None = None, **how: Any
    ) -> list[Prediction]:
        """Return answers to the records. `how` is passed to `sphinx_pl.evaluation.runner.evaluate`.

        Args:
            name: the name of this list of questions.
            lost: filled with the reasons why questions could not be asked.
        """
        from sphinx_pl.evaluation.runner import evaluate

        with autocast(self.device, self.options.precision):
            return evaluate(
                self.model,
                self.processor,
                records,
                generation=self.generation,
                batch_size=self.options.batch_size,
                ranking=self.options.ranking,
                answer_log=self._answer_log(name),
                rank=self.processes.rank,
                world_size=self.processes.world_size,
                title=name,
                skipped=lost,
                **how,
            )

    def check_out(self, names: Collection[str]) -> None:
        """Check that the folder can hold answers to these lists of questions.

        Nothing in it is replaced by default.

        Raises:
            UserError: it holds results of other questions, or answers with other settings.
        """
        from sphinx_pl.evaluation.results import RESULTS, read_results

        if self.options.overwrite:
            return
        if (self.folder / RESULTS).is_file():
            results = read_results(self.folder)
            lists = [TASKS_NAME] * bool(results["rows"]) + [result["name"] for result in results["benchmarks"]]
            if others := [name for name in lists if name not in names]:
                raise UserError(
                    f"out={self.folder} holds results of {', '.join(others)}, which are not asked now: choose another "
                    "out=, or overwrite=true to replace them"
                )
        for name in names:
            self._answer_log(name).check()

    def _answer_log(self, name: str) -> AnswerLog:
        from sphinx_pl.evaluation.answer_log import AnswerLog

        return AnswerLog(self.folder / "answers", name, self.options.settings(), self.options.overwrite)


def _ask_tasks(
    options: EvaluateConfig, data: Mapping[str, Any], asking: Asking, mixture: TrainingMixture | None = None
) -> tuple[list[Prediction], dict[str, list[Prediction]], dict[str, int]]:
    """Return the predictions for the test sources, those of baselines, and the reasons why
    questions could not be asked."""
    from sphinx_pl.evaluation.baselines import constant_predictions, fit_constants
    from sphinx_pl.evaluation.runner import select, shuffle_images

    candidates, lost = read_records(data["test"], "test", options.test)
    records = select(candidates, options.limit, options.seed)
    if not records:
        raise UserError("data.test has no record of a task with a score: check its sources")
    if mixture:
        mixture.check({record.task for record in records})
    baselines = {}
    predictions = asking(TASKS_NAME, records, lost)
    if not predictions:
        raise UserError(f"none of {len(records)} questions could be asked ({lost}): check data.test and its images")
    if options.shuffled:
        images = shuffle_images(records, options.seed)
        others = [record for record in records if record.key in images]
        baselines["shuffled"] = asking("shuffled", others, images=images)
    if options.constant and data.get("sources"):
        training, _ = read_records(data["sources"], "sources", at_most=options.constant)
        coordinates = asking.processor.coordinates
        constants = fit_constants(training, coordinates, seed=options.seed)
        by_key = {record.key: record for record in records}
        baselines["constant"] = constant_predictions(predictions, by_key, constants, coordinates)
    return predictions, baselines, lost


def _training(options: EvaluateConfig, data: Mapping[str, Any], mixture: Path) -> TrainingMixture | None:
    """Return the training sources that `then` reweights.

    They are read before any question is asked.
    """
    if not options.then:
        return None
    from sphinx_pl.evaluation.mixtures.reweighting import TrainingMixture, check_out

    check_out(mixture, _mixture_name())
    temperature = (data.get("mixing") or {}).get("temperature")
    return TrainingMixture(data.get("sources") or {}, temperature, options.reweighting.at_most)


def _mixture_name() -> str | None:
    """The name of the configured mixture, or None if the command line changes its sources."""
    hydra = HydraConfig.get()
    keys = (override.split("=")[0].lstrip("+~") for override in hydra.overrides.task)
    if any(key.startswith(("data.sources", "data.val_sources")) for key in keys):
        return None
    name = hydra.runtime.choices.get("data/mixture")
    return str(name) if name else None


def _write_mixture(options: EvaluateConfig, cfg: DictConfig, reweighting: Reweighting, path: Path) -> None:
    from sphinx_pl.evaluation.mixtures.reweighting import write_mixture

    base = _mixture_name()
    entries: Any = None
    if base is None:  # the file does not depend on another mixture
        entries = {key: OmegaConf.to_container(cfg.data[key]) for key in ("sources", "val_sources") if key in cfg.data}
    settings = [f"{key}: {value}" for key, value in dataclasses.asdict(options.reweighting).items()]
    comments = [f"checkpoint: {options.checkpoint}", f"test: {options.test or 'all of data.test'}", *settings]
    write_mixture(path, reweighting.yaml(comments, base, entries), base)


@entry_point(config_name="evaluate", check=check_evaluate)
def main(cfg: DictConfig) -> float:
    """Write answers, predictions, results.json and, if requested, a report.

    Returns:
        The mean score over tasks, or over the benchmarks' main shares if only benchmarks were
            asked.
    """
    options = pick(EvaluateConfig, cfg, ["data", "benchmark"])
    console = Console()
    # Users copy paths and commands, so only the terminal may break their lines.
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    data: Any = OmegaConf.to_container(cfg.data, resolve=True)
    if options.asks_tasks and not data.get("test"):
        raise UserError("data.test is missing: choose a data= that has test sources, such as data=sample")

    from sphinx_pl.evaluation.benchmarks import choose
    from sphinx_pl.evaluation.report.inputs import find_inputs
    from sphinx_pl.evaluation.report.page import check_page, write_report
    from sphinx_pl.evaluation.report.summary import summarise
    from sphinx_pl.evaluation.results import BASELINES, PREDICTIONS, write_predictions, write_results
    from sphinx_pl.evaluation.scorers.tasks import SCORERS
    from sphinx_pl.runtime.collectives import of_all_ranks

    join_plainly()
    # The run folder's name contains the time, which differs between processes.
    folder = of_all_ranks(Path(options.out or HydraConfig.get().runtime.output_dir), this_process().world_size)[0]
    mixture = Path(options.mixture_out or folder / "mixture.yaml")
    training = _training(options, data, mixture)
    asking = Asking(options, folder)

    configured: Any = OmegaConf.to_container(cfg.benchmark, resolve=True)
    questions, skipped = choose(options.benchmarks or (), configured, options.limit, options.seed)
    if asking.processes.rank == 0:
        for name, why in skipped.items():
            say(f"Skipped: {name}: {why}")

    asking.check_out([TASKS_NAME] * options.asks_tasks + [question.name for question in questions])
    make_folder(folder, "out")
    if options.report and asking.processes.rank == 0:
        check_page(Path(options.report), "report")
    predictions: list[Prediction] = []
    baselines: dict[str, list[Prediction]] = {}
    rows: list[ScoreRow] = []
    lost: dict[str, int] = {}
    if options.asks_tasks:
        predictions, baselines, lost = _ask_tasks(options, data, asking, training)
        rows = summarise(predictions, baselines, options.seed)
    reweighting = None
    if training:
        how = options.reweighting
        reweighting = training.reweight(predictions, how.strength, how.prior, how.bound)
    measured, notes = [], []
    for asked in questions:
        missing: dict[str, int] = {}
        benchmark = asked.benchmark
        answers = asking(
            asked.name,
            asked.records,
            missing,
            score_answer=benchmark.score_answer,
            max_new_tokens=benchmark.max_new_tokens,
            closed=benchmark.closed,
        )
        if not answers:
            raise UserError(
                f"{asked.name}: none of {len(asked.records)} questions could be asked ({missing}): check "
                f"benchmark.{asked.name}.images, now '{benchmark.images}'"
            )
        measured.append(asked.result(answers, missing, options.seed))
        predictions += answers
        if asking.processes.rank == 0:
            notes += benchmark.submit(answers, folder)
    shares = [
        v["value"] for result in measured for v in result["values"][:1] if v["percent"] and v["value"] is not None
    ]
    scores = [row.score for row in rows if not row.domain and not row.topic] or shares
    mean = float(sum(scores) / len(scores)) if scores else math.nan
    if asking.processes.rank > 0:
        return mean
    results = {
        "checkpoint": options.checkpoint,
        "model": asking.checkpoint.model_config.name,
        "decimals": asking.processor.coordinates.decimals,
        "image_size": asking.processor.image_size,
        "options": dataclasses.asdict(options),
        "skipped": lost,
        "metrics": {row.metric: SCORERS[row.metric].description for row in rows},
        "rows": [row.to_dict() for row in rows],
        "benchmarks": measured,
        "left_out": skipped,
    }
    if reweighting:
        _write_mixture(options, cfg, reweighting, mixture)
        results["mixture"] = {"file": str(mixture)} | reweighting.to_dict()
    for name in BASELINES:  # an evaluation that this one replaces may have written them
        (folder / f"{name}.jsonl").unlink(missing_ok=True)
    for name, those in {PREDICTIONS: predictions, **baselines}.items():
        write_predictions(folder, name, those)
    write_results(folder, results)
    if options.wandb is not None:
        log_to_wandb(options.wandb, results)
    if rows:
        console.print(results_table(rows))
    if measured:
        console.print(benchmarks_table(measured))
    for name, reasons in {"tasks": lost, **{result["name"]: result["lost"] for result in measured}}.items():
        if reasons:
            counts = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
            say(f"Skipped questions of {name}: {counts}")
    if reweighting:
        from sphinx_pl.evaluation.mixtures.reweighting import how_to_train

        for table in reweighting.tables():
            console.print(table)
        notes.append(f"Reweighted mixture: {mixture}; to train on it: {how_to_train(mixture)}")
    if skipped:
        say(f"Skipped, for the reasons above: {', '.join(skipped)}")
    for sentence in notes:
        say(sentence)
    say(f"Results: {folder / 'results.json'}")
    if options.report:
        report = Path(options.report)
        runs, mix = find_inputs(report.parent)
        write_report(report, runs, mix, [folder])
        say(f"Report: {report}")
    return mean


if __name__ == "__main__":
    main()
