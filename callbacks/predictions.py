"""Answers to the same held-out questions during training, for a person to read."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.seed import isolate_rng
from markupsafe import Markup

from sphinx_pl.data.processor import Processor
from sphinx_pl.data.sampling.config import SourceConfig
from sphinx_pl.data.schema import Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.evaluation.question import asked_task
from sphinx_pl.evaluation.report.gallery import SCRIPT, STYLE, cards, picture
from sphinx_pl.evaluation.runner import Prediction, evaluate
from sphinx_pl.stages import Stage
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import write_whole
from sphinx_pl.utils.html import page

log = logging.getLogger(__name__)

TABLE = "predictions"
HEADER = Markup("<h1>{}</h1><p class=lead>{} test questions, the same after every validation. Mean score {:.2f}.</p>")


def first_of_each_task(sources: Mapping[str, Mapping[str, Any] | None], per_task: int) -> list[Record]:
    """The first `per_task` records of every task (`asked_task`) that has a score, in the order of
    the sources.

    Raises:
        UserError: there is none.
    """
    records: list[Record] = []
    counts: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    for name, values in sources.items():
        if values is None:  # switched off, as in data.sources
            continue
        source = SourceConfig.from_dict(name, dict(values), "test").open(name)
        for index in range(len(source)):
            try:
                record = source.record(index)
            except SkipSample as error:
                lost[error.reason] += 1
                continue
            if TASKS[record.task].scorer != "none" and counts[task := asked_task(record)] < per_task:
                counts[task] += 1
                records.append(dataclasses.replace(record, key=f"{name}/{record.key}"))
    warn_of_lost("callbacks.predictions: records that cannot be used", lost)
    if not records:
        raise UserError("callbacks.predictions.sources has no record of a task with a score: give it test sources")
    return records


def warn_of_lost(what: str, lost: Mapping[str, int]) -> None:
    """Log a warning with the number of skipped items by reason; nothing if there are none."""
    if lost:
        log.warning("%s: %s", what, ", ".join(f"{reason} {count}" for reason, count in sorted(lost.items())))


def ask(trainer: L.Trainer, stage: Stage, records: Sequence[Record], **how: Any) -> list[Prediction]:
    """Greedy answers of a model in training. All ranks call it, since a sharded model needs them
    all.

    Random states and the modules' modes are restored.

    Args:
        how: arguments of `sphinx_pl.evaluation.runner.evaluate`.
    """
    model, processor = stage.sphinx, trainer.datamodule.processor
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with isolate_rng(), trainer.precision_plugin.forward_context():
            return evaluate(model, processor, records, progress=False, **how)
    finally:
        for module, training in modes:
            module.training = training


class Predictions(L.Callback):
    """Writes greedy answers to fixed questions after every `every`-th validation.

    `folder`/step-N.html shows them with their boxes and points drawn on the pictures, step-N.jsonl
    is for programs, and W&B gets a table. All ranks generate (see `ask`), and the first one writes.

    Args:
        sources: name -> source configuration, such as `data.test`.
        folder: the folder of the files.
        per_task: the number of questions of each task.
        every: 1 writes after each validation.
        batch_size: prompts generated at once.
        only_for_tables: write only if a logger shows tables (Weights & Biases) and there are
            sources.
    """

    def __init__(
        self,
        sources: Mapping[str, Mapping[str, Any] | None] | None,
        folder: str,
        per_task: int = 4,
        every: int = 1,
        batch_size: int = 16,
        only_for_tables: bool = False,
    ) -> None:
        if per_task < 1 or every < 1 or batch_size < 1:
            raise UserError(
                f"callbacks.predictions: per_task={per_task}, every={every} and batch_size={batch_size} must be above 0"
            )
        self.sources = sources or {}
        self.only_for_tables = only_for_tables
        self.folder = Path(folder)
        self.per_task = per_task
        self.every = every
        self.batch_size = batch_size
        self._records: list[Record] | None = None
        self._validations = 0

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        wanted = self.sources and any(isinstance(logger, WandbLogger) for logger in trainer.loggers)
        if trainer.sanity_checking or (self.only_for_tables and not wanted):
            return
        self._validations += 1
        if self._validations % self.every:
            return
        if self._records is None:
            self._records = first_of_each_task(self.sources, self.per_task)
        assert isinstance(pl_module, Stage)
        lost: dict[str, int] = {}
        predictions = ask(trainer, pl_module, self._records, batch_size=self.batch_size, skipped=lost)
        warn_of_lost("callbacks.predictions: questions that could not be asked", lost)
        self._publish(trainer, pl_module.name, predictions, trainer.datamodule.processor)

    @rank_zero_only  # type: ignore[untyped-decorator]
    def _publish(self, trainer: L.Trainer, stage: str, predictions: Sequence[Prediction], processor: Processor) -> None:
        step = trainer.global_step
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [p.to_dict() for p in predictions]
        lines = (json.dumps({"step": step} | row, ensure_ascii=False) for row in rows)
        write_whole(self.folder / f"step-{step}.jsonl", "\n".join(lines) + "\n")
        title = f"{stage}, step {step:,}"
        mean = sum(p.score for p in predictions) / max(len(predictions), 1)
        header = HEADER.format(title, len(predictions), mean)
        body = cards(rows, processor.image_size, processor.coordinates)
        write_whole(self.folder / f"step-{step}.html", page(title, header, body, STYLE, SCRIPT))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                log_table(logger, predictions, processor, step)


def log_table(logger: WandbLogger, predictions: Sequence[Prediction], processor: Processor, step: int) -> None:
    """Log a row for each question to the W&B table `predictions`."""
    import wandb

    columns = ["task", "key", "image", "question", "answer", "prediction", "score"]
    rows: list[list[Any]] = []
    for p in predictions:
        drawing = picture(p.images[0], p.to_dict(), processor.image_size, processor.coordinates) if p.images else None
        image = wandb.Image(drawing) if drawing is not None else None
        rows.append([p.task, p.key, image, p.question, p.answer, p.prediction, p.score])
    logger.log_table(TABLE, columns=columns, data=rows, step=step)
