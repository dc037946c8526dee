"""The run's result, and models on the way there: weights-only checkpoints that every other script loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import torch

from callbacks.checkpoint import ResumeCheckpoint, write_training_checkpoint
from sphinx_pl.checkpoint.format import check_free, open_checkpoint, write_checkpoint
from sphinx_pl.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def consolidate(
    checkpoint: Path, out: Path, dtype: torch.dtype, extra: dict[str, Any] | None = None, leave_out: Sequence[str] = ()
) -> None:
    """A training checkpoint -> a model folder, in place of what is there; one tensor is in memory at a time.

    Args:
        extra: added to the provenance.
        leave_out: see `write_checkpoint`.
    """
    source = open_checkpoint(checkpoint)
    write_checkpoint(
        out,
        source,
        model=source.config["model"],
        processor=source.processor,
        tokenizer_file=source.tokenizer_file,
        provenance=source.provenance | (extra or {}),
        dtype=dtype,
        overwrite=True,
        leave_out=leave_out,
    )


class ExportModel(L.Callback):
    """Writes `folder` when training ends, and while it goes on, every `every_n_steps`, `folder-step-N`.

    All ranks write a training checkpoint (that of callbacks.checkpoint if it is of this step), then one of them makes a
    model of it in a thread, while training goes on. Put it behind callbacks.checkpoint.

    Args:
        folder: of the model: safetensors, config, tokenizer, provenance.
        dtype: of the stored weights.
        every_n_steps: 0: only at the end.
        keep: so many of the newest `folder-step-N` stay; 0: all.
        keep_best: so many with the lowest `metric` stay too.
        leave_out_frozen: towers that don't train and whose `load` entry names their weights are not written, and come
            back from there.
        metric: a logged value, as it was last when the model was written.
        config: the file with the composed configuration that train.py keeps in the run folder, for the provenance.

    Raises:
        UserError: before training, if `folder` holds something else than a checkpoint.
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
        config: str | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise UserError(f"callbacks.export.dtype='{dtype}' must be one of {', '.join(DTYPES)}")
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
        self.config = Path(config) if config else None
        self._writer = ThreadPoolExecutor(1, "export")
        self._writing: Future[None] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        check_free(self.folder, overwrite=True)  # now, not when all the training is done

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if self.every_n_steps and args[1].window_end and trainer.global_step % self.every_n_steps == 0:
            self.export(trainer, self.folder.with_name(f"{self.folder.name}-step-{trainer.global_step}"))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.export(trainer, self.folder)
        self._wait()
        trainer.strategy.barrier()

    def on_exception(self, trainer: L.Trainer, *args: Any) -> None:
        self._writer.shutdown()  # finishes what it is writing

    def export(self, trainer: L.Trainer, out: Path) -> None:
        """Begin to write `out`; all ranks call it together."""
        self._wait()
        own = next((c for c in trainer.callbacks if isinstance(c, ResumeCheckpoint)), None)
        if own is not None:
            path = own.save(trainer)
            own.held.add(path)
        else:
            path = self.folder.with_name(f".{self.folder.name}-training")
            write_training_checkpoint(trainer, path, self.config)
        if not trainer.is_global_zero:
            return
        stage: Any = trainer.lightning_module
        vision = stage.config.vision
        frozen = [key for key in vision.towers if key not in stage.train_parts] if vision else []
        leave_out = [key for key in frozen if getattr(vision, key).load] if self.leave_out_frozen else []
        value = trainer.callback_metrics.get(self.metric)
        extra = {"metric": {"name": self.metric, "value": float(value)}} if value is not None else {}

        def write() -> None:
            consolidate(path, out, self.dtype, extra, leave_out)
            if own is not None:
                own.held.discard(path)
            else:
                shutil.rmtree(path)
            self._prune()

        self._writing = self._writer.submit(write)

    def _wait(self) -> None:
        """Until the one before is written; its error is this run's."""
        if self._writing is not None:
            self._writing.result()
        self._writing = None

    def _prune(self) -> None:
        if not self.keep:
            return
        found = sorted(self.folder.parent.glob(f"{self.folder.name}-step-*"), key=lambda p: int(p.name.split("-")[-1]))
        losses = {path: _metric(path) for path in found}
        best = sorted((path for path in found if losses[path] is not None), key=lambda path: losses[path] or 0.0)
        for path in set(found[: -self.keep]) - set(best[: self.keep_best]):
            shutil.rmtree(path)


def _metric(folder: Path) -> float | None:
    """What `extra` says of a model."""
    content = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    value: float | None = content.get("metric", {}).get("value")
    return value
