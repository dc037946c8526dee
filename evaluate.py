"""Ask a checkpoint every question of the test sources, score the answers beside guessing. Keys: conf/evaluate.yaml."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table

from sphinx_pl.checkpoint.format import open_checkpoint
from sphinx_pl.cli import entry_point
from sphinx_pl.errors import UserError, suggest
from sphinx_pl.evaluation.device import autocast, check_precision, choose_device
from sphinx_pl.files import write_whole
from sphinx_pl.models.decoding import GenerationConfig, OperaConfig
from sphinx_pl.typed import pick

if TYPE_CHECKING:
    from sphinx_pl.data.record import Record
    from sphinx_pl.evaluation.benchmarks import Row


@dataclass
class Generation:
    """How answers are drawn; see `sphinx_pl.models.generation`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    opera: Optional[OperaConfig] = None

    def __post_init__(self) -> None:
        GenerationConfig(**vars(self))  # refuses what does not fit together


@dataclass
class EvaluateConfig:
    """The keys of conf/evaluate.yaml, which explains them, with their types."""

    checkpoint: Optional[str] = None
    test: Optional[list[str]] = None
    limit: Optional[int] = None
    seed: int = 0
    batch_size: int = 32
    generation: Generation = field(default_factory=Generation)
    ranking: bool = False
    shuffled: bool = True
    constant: int = 5000
    device: str = "auto"
    precision: str = "fp32"
    out: Optional[str] = None
    report: Optional[str] = None

    def __post_init__(self) -> None:
        if self.checkpoint is None:
            raise UserError("which checkpoint? Give checkpoint=FOLDER, such as one that train.py wrote")
        check_precision(self.precision)
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")


def read_records(
    sources: Mapping[str, Any], section: str, names: Sequence[str] | None = None, at_most: int | None = None
) -> tuple[list[Record], dict[str, int]]:
    """The records of `data.<section>`'s sources with the source's name in front of their keys, and what was unreadable.

    Args:
        at_most: of each source, spread evenly over it.

    Raises:
        UserError: an unknown name, or what the sources themselves refuse.
    """
    from sphinx_pl.data.bad import BadSample
    from sphinx_pl.data.mixture import SourceConfig
    from sphinx_pl.data.sources import spread

    for name in names or ():
        if name not in sources:
            raise UserError(f"data.{section} has no source '{name}': {suggest(name, sources)}")
    records: list[Record] = []
    lost: dict[str, int] = {}
    for name in names or sources:
        if sources[name] is None:  # switched off, as train.py has it
            continue
        source = SourceConfig.from_dict(name, sources[name], section).open(name)
        for index in spread(len(source), at_most):
            try:
                record = source.record(index)
            except BadSample as error:
                lost[error.reason] = lost.get(error.reason, 0) + 1
                continue
            records.append(dataclasses.replace(record, key=f"{name}/{record.key}"))
    return records, lost


def results_table(rows: Iterable[Row]) -> Table:
    """The results as a terminal shows them; a green triangle where the whole interval is above the baseline."""
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


@entry_point(config_name="evaluate")
def main(cfg: DictConfig) -> float:
    """Writes predictions.jsonl, results.json and, if asked for, the report; returns the mean score over tasks."""
    options = pick(EvaluateConfig, cfg)
    assert options.checkpoint is not None
    console = Console()
    device = choose_device(options.device)
    checkpoint = open_checkpoint(options.checkpoint)
    data = OmegaConf.to_container(cfg.data, resolve=True)
    assert isinstance(data, dict)
    if not data.get("test"):
        raise UserError("data.test is missing: choose a data= that has test sources, such as data=sample")

    from sphinx_pl.data.processor import Processor
    from sphinx_pl.evaluation.baselines import constant_predictions, fit_constants
    from sphinx_pl.evaluation.benchmarks import evaluate, select, shuffle_images, summarise
    from sphinx_pl.evaluation.metrics import METRICS
    from sphinx_pl.evaluation.report import find_inputs, write_report
    from sphinx_pl.models.sphinx import Sphinx

    processor = Processor.from_dict(checkpoint.processor, checkpoint.tokenizer_file, checkpoint.model_config)
    found, lost = read_records(data["test"], "test", options.test)
    records = select(found, options.limit, options.seed)
    if not records:
        raise UserError("data.test has no record of a task with a score: check its sources")

    model = Sphinx(checkpoint.model_config)
    checkpoint.load_into(model)
    model.to(device).eval()

    asking = {"batch_size": options.batch_size, "ranking": options.ranking, "skipped": lost, **vars(options.generation)}
    baselines = {}
    with autocast(device, options.precision):
        predictions = evaluate(model, processor, records, **asking)
        if options.shuffled:
            images = shuffle_images(records, options.seed)
            asking["skipped"] = None  # the same records are lost again
            others = [record for record in records if record.key in images]
            baselines["shuffled"] = evaluate(model, processor, others, images=images, title="shuffled images", **asking)
    if not predictions:
        raise UserError(f"none of {len(records)} questions could be asked ({lost}): check data.test and its images")
    if options.constant and data.get("sources"):
        training, _ = read_records(data["sources"], "sources", at_most=options.constant)
        constants = fit_constants(training, processor.geometry, seed=options.seed)
        by_key = {record.key: record for record in records}
        baselines["constant"] = constant_predictions(predictions, by_key, constants, processor.geometry)

    rows = summarise(predictions, baselines, options.seed)
    folder = Path(options.out or HydraConfig.get().runtime.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(prediction.to_dict(), ensure_ascii=False) for prediction in predictions)
    write_whole(folder / "predictions.jsonl", "\n".join(lines) + "\n")
    results = {
        "checkpoint": options.checkpoint,
        "model": checkpoint.model_config.name,
        "decimals": processor.geometry.decimals,
        "image_size": processor.image_size,
        "options": dataclasses.asdict(options),
        "skipped": lost,
        "metrics": {row.metric: METRICS[row.metric].description for row in rows},
        "rows": [row.to_dict() for row in rows],
    }
    write_whole(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    console.print(results_table(rows))
    if lost:
        console.print(f"Not asked: {', '.join(f'{reason} {count}' for reason, count in sorted(lost.items()))}")
    console.print(f"Results: {folder / 'results.json'}")
    if options.report:
        report = Path(options.report)
        runs, mix = find_inputs(report.parent)
        write_report(report, runs, mix, [folder])
        console.print(f"Report: {report}")
    tasks = [row.score for row in rows if not row.domain and not row.topic]
    return sum(tasks) / len(tasks)


if __name__ == "__main__":
    main()
