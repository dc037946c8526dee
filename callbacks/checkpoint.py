"""Checkpoints to resume from: written to a temporary name, renamed, the oldest pruned."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from callbacks.throughput import timed_checkpoint
from sphinx_pl.data.record import Batch
from sphinx_pl.errors import UserError

_NAME = re.compile(r"step-(\d+)\.ckpt")


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. A file that was being written has another name."""
    return sorted((path for path in folder.glob("step-*.ckpt") if _NAME.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """Optimizer steps that a `step-N.ckpt` has behind it."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not step-N.ckpt")
    return int(match[1])


def resolve_resume(ckpt_path: str | None, folder: Path) -> Path | None:
    """The file to resume from: None starts anew, `last` takes the newest of the run folder (or starts anew if none).

    Raises:
        UserError: no such file.
    """
    if ckpt_path is None:
        return None
    if ckpt_path == "last":
        found = checkpoints(folder)
        return found[-1] if found else None
    path = Path(ckpt_path)
    foreign = path.parent.resolve() == folder.resolve() and not _NAME.fullmatch(path.name)
    if not path.is_file() or foreign:
        raise UserError(
            f"ckpt_path={ckpt_path} is not a file to resume from; 'last' takes the newest in {folder}. To start from "
            "the weights of a model folder, use stage.init_from"
        )
    return path


class ResumeCheckpoint(L.Callback):
    """Every `every_n_steps` optimizer steps and at the end: weights, optimizer, schedule, random states, data position.

    `trainer.fit` on the newest one goes on with exactly the losses of a run that was not stopped. The last `keep` stay.
    Put it last among the callbacks: where a validation is due at the same step, and at the end of the run, it saves
    after everything else, so that nothing is left out by a run that continues from here.
    """

    def __init__(self, folder: str, every_n_steps: int = 1000, keep: int = 2) -> None:
        if every_n_steps < 1 or keep < 1:
            raise UserError(
                f"callbacks.checkpoint: every_n_steps={every_n_steps} and keep={keep} must be at least 1; "
                "~callbacks.checkpoint writes none"
            )
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.keep = keep
        self._saved = -1
        self._restore: dict[str, Any] | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        # Only between two windows: in the midst of one the accumulated gradients would be lost.
        if batch.window_end and not self._validation_follows(trainer):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._save_if_due(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step != self._saved:
            self.save(trainer)

    def _validation_follows(self, trainer: L.Trainer) -> bool:
        """Validation has its own place in Lightning's loop, after this hook; resuming would skip over it."""
        every = trainer.val_check_batch
        if not trainer.limit_val_batches or every is None or every == float("inf"):
            return False
        return bool((trainer.fit_loop.total_batch_idx + 1) % int(every) == 0)

    def _save_if_due(self, trainer: L.Trainer) -> None:
        step = trainer.global_step
        if step > 0 and step % self.every_n_steps == 0 and step != self._saved:
            self.save(trainer)

    @timed_checkpoint
    def save(self, trainer: L.Trainer) -> None:
        """Write `step-N.ckpt`; on every rank, since sharded strategies write together."""
        self._saved = trainer.global_step
        for logger in trainer.loggers:
            logger.save()  # what happened before this checkpoint will not happen again
        name = f"step-{trainer.global_step:08d}.ckpt"
        partial = self.folder / f".{name}.tmp"
        trainer.save_checkpoint(partial)
        self._publish(partial, self.folder / name)
        trainer.strategy.barrier()

    @rank_zero_only  # type: ignore[untyped-decorator]
    def _publish(self, partial: Path, final: Path) -> None:
        if final.is_dir():
            shutil.rmtree(final)
        partial.rename(final)
        for old in checkpoints(self.folder)[: -self.keep]:
            shutil.rmtree(old) if old.is_dir() else old.unlink()

    # Random states are part of the checkpoint. (Those of data workers are not used: order and wording are functions of
    # the seed and the position.)
    def state_dict(self) -> dict[str, Any]:
        name, keys, *rest = np.random.get_state(legacy=True)
        version, internal, gauss = random.getstate()
        state: dict[str, Any] = {
            "python": [version, list(internal), gauss],
            "numpy": [name, np.asarray(keys).tolist(), *rest],
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restore = state_dict

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restored as late as can be: whatever was drawn while the run was set up does not count."""
        self._saved = trainer.global_step
        if trainer.is_global_zero:
            for partial in self.folder.glob(".step-*.ckpt.tmp"):  # what a killed run was writing
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        if self._restore is None:
            return
        state, self._restore = self._restore, None
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"])
