"""Scores on a fixed part of the test questions and benchmarks during training."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L

from sphinx_pl.callbacks.checkpoint import ResumeCheckpoint
from sphinx_pl.callbacks.predictions import ask, warn_of_lost
from sphinx_pl.data.schema import Batch, Record
from sphinx_pl.evaluation.benchmarks import Questions, choose
from sphinx_pl.evaluation.metrics import estimate
from sphinx_pl.evaluation.runner import ScoreAnswer, select
from sphinx_pl.stages import Stage
from sphinx_pl.utils.errors import UserError

log = logging.getLogger(__name__)


class Evaluation(L.Callback):
    """Logs `eval/TASK`, `eval/NAME/METRIC` and `eval/mean` during training, and at its end.

    Scores are from 0 to 1, sums of points keep their unit. The mean is over tasks and each
    benchmark's first metric. The questions are the same each time. Put this callback before those
    that write checkpoints, so that they can choose by one of these values as their `metric`.

    Args:
        sources: name -> source configuration, such as `data.test`.
        benchmarks: names or patterns among those of `benchmark`.
        benchmark: the configured benchmarks (conf/benchmark).
        limit: questions of each task, domain and topic, and of each category of a benchmark.
        every_n_steps: optimizer steps between evaluations; 0 for none.
        on_checkpoints: also evaluate before callbacks.checkpoint writes a checkpoint, and at the
            end. If both are off, no question is read.
        batch_size: prompts generated at once.
        seed: draws the questions.
    """

    def __init__(
        self,
        sources: Mapping[str, Mapping[str, Any] | None] | None = None,
        benchmarks: Sequence[str] = (),
        benchmark: Mapping[str, Any] | None = None,
        limit: int = 8,
        every_n_steps: int = 0,
        on_checkpoints: bool = False,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        if limit < 1 or batch_size < 1 or every_n_steps < 0:
            raise UserError(
                f"callbacks.evaluation: limit={limit} and batch_size={batch_size} must be at least 1 and "
                f"every_n_steps={every_n_steps} not negative"
            )
        self.every_n_steps = every_n_steps
        self.on_checkpoints = on_checkpoints
        self.batch_size = batch_size
        self.questions: list[Questions] = []
        self.records: list[Record] = []
        if every_n_steps or on_checkpoints:
            if not sources and not benchmarks:
                raise UserError("callbacks.evaluation has nothing to ask: give it test sources, or benchmarks")
            if benchmarks:
                self.questions, left_out = choose(benchmarks, benchmark or {}, limit, seed)
                for name, why in left_out.items():
                    log.warning("callbacks.evaluation skips %s: %s", name, why)
                for asked in self.questions:
                    warn_of_lost(f"callbacks.evaluation: entries of {asked.name} that cannot be used", asked.lost)
            self.records = self._test(sources, limit, seed) if sources else []
        self._evaluated = -1

    @staticmethod
    def _test(sources: Mapping[str, Any], limit: int, seed: int) -> list[Record]:
        from sphinx_pl.data.records import read_records

        available, lost = read_records(sources, "test")
        warn_of_lost("callbacks.evaluation: records that cannot be used", lost)
        records = select(available, limit, seed)
        if not records:
            raise UserError("callbacks.evaluation.sources has no record of a task with a score: give it test sources")
        return records

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        every = [self.every_n_steps]
        if self.on_checkpoints:  # before they are written, at their own interval
            every += [c.every_n_steps for c in trainer.callbacks if isinstance(c, ResumeCheckpoint)]
        if batch.ends_step and any(n and trainer.global_step % n == 0 for n in every):
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.on_checkpoints:
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        step = trainer.global_step
        if step == self._evaluated:
            return
        self._evaluated = step
        assert isinstance(stage, Stage)
        by_task: dict[str, list[float]] = {}
        for prediction in self._ask(trainer, stage, self.records):
            by_task.setdefault(prediction.task, []).append(prediction.score)
        values = {f"eval/{task}": sum(scores) / len(scores) for task, scores in by_task.items()}
        main = list(values.values())
        for asked in self.questions:
            benchmark = asked.benchmark
            answers = self._ask(trainer, stage, asked.records, benchmark.score_answer, benchmark.max_new_tokens)
            for place, metric in enumerate(benchmark.metrics if answers else ()):
                value = estimate(metric.prepare(answers), resamples=1).value
                if not math.isnan(value):  # no answer was yes, so of such answers no share is right
                    values[f"eval/{asked.name}/{metric.name}"] = value
                    main += [value] if metric.percent and place == 0 else []
        if main:
            values["eval/mean"] = sum(main) / len(main)
        if values:
            stage.log_now(values, step)

    def _ask(
        self,
        trainer: L.Trainer,
        stage: Stage,
        records: Sequence[Record],
        score_answer: ScoreAnswer | None = None,
        max_new_tokens: int | None = None,
    ) -> list[Any]:
        if not records:
            return []
        lost: dict[str, int] = {}
        predictions = ask(
            trainer,
            stage,
            records,
            batch_size=self.batch_size,
            score_answer=score_answer,
            max_new_tokens=max_new_tokens,
            skipped=lost,
        )
        warn_of_lost("callbacks.evaluation: questions that could not be asked", lost)
        return predictions
