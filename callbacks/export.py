"""The run's result, and models during training: weights-only checkpoints that every other script
can load.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from sphinx_pl.callbacks.checkpoint import ResumeCheckpoint, count, last_step, more_follows, write_training_checkpoint
from sphinx_pl.checkpoints.native import check_free
from sphinx_pl.checkpoints.training import consolidate
from sphinx_pl.stages import Stage
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import discard

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ExportModel(L.Callback):
    """Writes `folder` when training ends, and `folder-step-N` every `every_n_steps` during
    training.

    A validation at the same step comes first, so that the model has its value of `metric`.

    All ranks write a training checkpoint, unless callbacks.checkpoint has written it. Then a thread
    of one rank makes a model of it while training continues. Put this callback after
    callbacks.checkpoint.

    Args:
        folder: the folder of the model: safetensors, config, tokenizer, provenance.
        dtype: the dtype of the stored weights.
        every_n_steps: 0 writes a model only at the end.
        keep: the number of newest `folder-step-N` that are kept; 0 keeps all.
        keep_best: the number of models with the best `metric` that are kept too.
        leave_out_frozen: do not write frozen encoders whose `load` entry names their weights.
            Readers load them from there.
        metric: a logged value; its last value counts when the model is written. A value that is not
            finite is never the best.
        mode: min if a lower `metric` is better, as for losses; max for scores.
        config: the file with the composed configuration that train.py keeps in the run folder, for
            the provenance.

    Raises:
        UserError: `folder` holds something other than a checkpoint. This is checked before
            training.
    """

    def __init__(
        self,
        folder: str,
        dtype: str = "float32",
        every_n_steps: int = 0,
        keep: int = 0,
        keep_best: int = 0,
        leave_out_frozen: bool = False,
        metric: str = "val/loss",
        mode: str = "min",
        config: str | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise UserError(f"callbacks.export.dtype='{dtype}' must be one of {', '.join(DTYPES)}")
        if mode not in ("min", "max"):
            raise UserError(f"callbacks.export.mode='{mode}' must be min or max")
        for key, value in (("every_n_steps", every_n_steps), ("keep", keep), ("keep_best", keep_best)):
            if value < 0:
                raise UserError(f"callbacks.export.{key}={value} must not be negative")
        self.folder = Path(folder)
        self.dtype = DTYPES[dtype]
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.keep_best = keep_best
        self.leave_out_frozen = leave_out_frozen
        self.metric = metric
        self.mode = mode
        self.config = Path(config) if config else None
        self.written: Callable[[], None] = lambda: None
        """The first process calls it when a model is complete."""
        self._writer = ThreadPoolExecutor(1, "export")
        self._writing: Future[None] | None = None

    def check(self) -> None:
        """Check that `folder` is free or holds a checkpoint.

        Raises:
            UserError: it holds something else.
        """
        check_free(self.folder, overwrite=True)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.check()  # before training, not after it

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Clean up after a kill: delete half a model, and write an unfinished one from its
        checkpoint.
        """
        if trainer.is_global_zero:
            name = self.folder.name
            for pattern in (f".{name}-step-*.tmp", f".{name}.tmp", f".{name}-training", f"..{name}-training.tmp"):
                for partial in self.folder.parent.glob(pattern):
                    shutil.rmtree(partial)
        own, out = self._own(trainer), self._path_at(trainer.global_step)
        if own is not None and self._due(trainer) and trainer.strategy.broadcast(not out.exists()):
            self.export(trainer, out)

    def most(self, max_steps: int) -> int:
        """Return the largest number of models at a time, in a run of this many steps (-1:
        unknown).
        """
        intermediate = max(0, max_steps - 1) // self.every_n_steps if self.every_n_steps else 0
        return 1 + (min(intermediate, self.keep + self.keep_best + 1) if self.keep else intermediate)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if args[1].ends_step and self._due(trainer) and not more_follows(trainer):
            self.export(trainer, self._path_at(trainer.global_step))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self._due(trainer):
            self.export(trainer, self._path_at(trainer.global_step))

    def _due(self, trainer: L.Trainer) -> bool:
        """Return whether a model is due. The model of the last step is the run's result."""
        step, every = trainer.global_step, self.every_n_steps
        return bool(every and step and step % every == 0) and not last_step(trainer)

    def _path_at(self, step: int) -> Path:
        return self.folder.with_name(f"{self.folder.name}-step-{step}")

    @staticmethod
    def _own(trainer: L.Trainer) -> ResumeCheckpoint | None:
        return next((c for c in trainer.callbacks if isinstance(c, ResumeCheckpoint)), None)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.export(trainer, self.folder)
        self._wait(trainer)

    def on_exception(self, trainer: L.Trainer, *args: Any) -> None:
        self._writer.shutdown()  # it finishes the model that it is writing

    def export(self, trainer: L.Trainer, out: Path) -> None:
        """Begin to write `out`. All ranks call it together.

        Raises:
            UserError: the previous model could not be written.
        """
        self._wait(trainer)
        own = self._own(trainer)
        if own is not None:
            path = own.save(trainer)
            own.held.add(path)
        else:
            path = self.folder.with_name(f".{self.folder.name}-training")
            write_training_checkpoint(trainer, path, self.config)
        if not trainer.is_global_zero:
            return
        stage = trainer.lightning_module
        assert isinstance(stage, Stage)
        leave_out = self._omitted(stage)
        value = stage.last_value(self.metric)
        extra = {"metric": {"name": self.metric, "value": value}} if value is not None else {}

        def write() -> None:
            consolidate(path, out, self.dtype, extra, leave_out)
            self.written()
            if own is not None:
                own.held.discard(path)
            else:
                shutil.rmtree(path)
            self._prune()

        self._writing = self._writer.submit(write)

    def _omitted(self, stage: Stage) -> list[str]:
        vision = stage.config.vision
        frozen = [key for key in vision.towers if key not in stage.train_parts] if vision else []
        return [key for key in frozen if getattr(vision, key).load] if self.leave_out_frozen else []

    def model_bytes(self, stage: Stage) -> int:
        """Return the bytes of the weights in a model."""
        trainable, frozen = count(stage)
        return (trainable + (0 if self._omitted(stage) else frozen)) * self.dtype.itemsize

    def _wait(self, trainer: L.Trainer) -> None:
        """Wait until the previous model is written. Its error ends the run on all ranks."""
        error = None
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                writing.result()
            except (UserError, OSError) as failure:
                error = f"a model could not be written: {failure}"
                if self._own(trainer) is not None:
                    error += "; its checkpoint is complete, so ckpt_path=last writes the model without training again"
        if (error := trainer.strategy.broadcast(error)) is not None:
            raise UserError(error)

    def _prune(self) -> None:
        if not self.keep:
            return
        name = re.compile(re.escape(self.folder.name) + r"-step-(\d+)")
        steps = {path: int(match[1]) for path in self.folder.parent.iterdir() if (match := name.fullmatch(path.name))}
        models = sorted(steps, key=lambda path: steps[path])
        best = sorted(models, key=self._cost)[: self.keep_best]
        for path in models[: -self.keep]:
            if path not in best or self._cost(path) == math.inf:
                discard(path)

    def _cost(self, folder: Path) -> float:
        """Return the metric of a model, so that lower is better, or infinity for a model without
        it.
        """
        content = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        value = float(content.get("metric", {}).get("value", math.inf))
        return math.inf if not math.isfinite(value) else value if self.mode == "min" else -value
