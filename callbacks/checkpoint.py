"""Checkpoints that a run can resume from.

All ranks write a folder under a temporary name, which is then renamed; the oldest folders are
deleted.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from omegaconf import OmegaConf

from sphinx_pl.callbacks.throughput import timed_checkpoint
from sphinx_pl.checkpoints.folder import move_into_place, sync
from sphinx_pl.checkpoints.provenance import provenance
from sphinx_pl.checkpoints.training import INDEX, describe
from sphinx_pl.data.schema import Batch
from sphinx_pl.distributed.sharded import Sharded
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.runtime.collectives import of_all_ranks
from sphinx_pl.stages import Stage
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import discard

_NAME = re.compile(r"step-(\d+)")


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first.

    An unfinished one has another name.
    """
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """Return the number of optimizer steps before a `step-N`."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not step-N")
    return int(match[1])


def resolve_resume(ckpt_path: str | None, folder: Path) -> Path | None:
    """Return the checkpoint to resume from, or None for a new run.

    `last` takes the newest of the run folder, if any.

    Raises:
        UserError: there is no such checkpoint.
    """
    if ckpt_path is None:
        return None
    if ckpt_path == "last":
        saved = checkpoints(folder)
        return saved[-1] if saved else None
    path = Path(ckpt_path)
    foreign = path.parent.resolve() == folder.resolve() and not _NAME.fullmatch(path.name)
    if not (path / INDEX).is_file() or foreign:
        raise UserError(
            f"ckpt_path={ckpt_path} is not a checkpoint to resume from (a folder with {INDEX}); 'last' takes the "
            f"newest in {folder}. To start from the weights of a model folder, set stage.init_from"
        )
    return path


def last_step(trainer: L.Trainer) -> bool:
    """Return whether no step follows, if that is known before the data ends."""
    return bool(0 < trainer.max_steps <= trainer.global_step)


def more_follows(trainer: L.Trainer) -> bool:
    """Return whether a validation, or the end of the run, comes after `on_train_batch_end` of this
    step.

    Both have their own places in Lightning's loop. A run that resumed from a checkpoint written
    before them would skip them.
    """
    if last_step(trainer):
        return True
    every = trainer.val_check_batch
    if not trainer.limit_val_batches or every is None or every == float("inf"):
        return False
    return bool((trainer.fit_loop.total_batch_idx + 1) % int(every) == 0)


@timed_checkpoint
def write_training_checkpoint(trainer: L.Trainer, path: Path, config: Path | None) -> None:
    """Write everything that `trainer.fit` needs to resume, and what makes it a checkpoint of a
    model.

    All ranks call it.

    Args:
        path: the folder, which appears when it is complete.
        config: the file with the composed configuration that train.py keeps in the run folder, for
            the provenance.

    Raises:
        OSError, UserError: it could not be written. None of it remains.
    """
    partial = path.with_name(f".{path.name}.tmp")
    if trainer.is_global_zero:
        shutil.rmtree(partial, ignore_errors=True)
    trainer.strategy.barrier()
    try:
        _write(trainer, partial, path, config)
    except (OSError, UserError):
        if trainer.is_global_zero:
            # The next file, such as a log, needs the space.
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _write(trainer: L.Trainer, partial: Path, path: Path, config: Path | None) -> None:
    trainer.save_checkpoint(partial)
    failure: OSError | None = getattr(trainer.strategy.checkpoint_io, "failure", None)
    if trainer.is_global_zero and failure is None:
        try:
            _describe(trainer, partial, config)
            move_into_place(partial, path)
        except OSError as error:
            failure = error
    # All ranks raise the error. Alone, the first rank would leave the others waiting.
    reason = (failure.errno, failure.strerror, failure.filename) if failure is not None else None
    if reasons := [one for one in of_all_ranks(reason, trainer.world_size) if one is not None]:
        raise OSError(*reasons[0]) from failure


def _describe(trainer: L.Trainer, partial: Path, config: Path | None) -> None:
    stage: Any = trainer.lightning_module
    assert isinstance(stage, Stage)
    processor = trainer.datamodule.processor
    composed: Any = OmegaConf.to_container(OmegaConf.load(config)) if config else None
    origin = provenance(stage=stage.name, config=composed, parents=stage.parents) | {"steps": trainer.global_step}
    describe(partial, stage.config.to_dict(), processor.to_dict(), processor.tokenizer, origin)
    sync(*partial.iterdir(), partial)


def training_bytes(stage: Stage, strategy: Any) -> int:
    """Return the bytes of a training checkpoint: the weights, and the moments of the parts that
    train.
    """
    trainable, frozen = count(stage)
    sharded = isinstance(strategy, Sharded)
    weight = 2 if sharded and strategy.bf16_masters else 4
    moments = 0 if stage.optim.kind == "sgd" else 2 * (2 if stage.optim.moments == "bf16" else 4)
    # sharded weights may be in bf16
    return trainable * (weight + moments) + frozen * (2 if sharded else 4)


def count(stage: Stage) -> tuple[int, int]:
    """Return the numbers of parameters of a stage's model that train and that do not.

    Nothing is built.
    """
    with torch.device("meta"):
        model = Sphinx(stage.config)
    sizes = {part: sum(p.numel() for p in parameters) for part, parameters in model.part_parameters().items()}
    trainable = sum(size for part, size in sizes.items() if part in stage.train_parts)
    return trainable, sum(sizes.values()) - trainable


class ResumeCheckpoint(L.Callback):
    """Saves a run every `every_n_steps` optimizer steps and at its end.

    A checkpoint holds weights, optimizer, schedule, random states and the position in the data.
    `trainer.fit` resumes from the newest one with exactly the losses of an uninterrupted run.

    Put it after the other callbacks, but before the export, which reads its last checkpoint. If a
    validation is due at the same step, and at the end of the run, it saves after everything else.
    So a run that resumes from it skips nothing.

    Args:
        folder: the folder of the checkpoints `step-00001000` and so on.
        keep: the number of newest checkpoints that are kept.
        keep_every: checkpoints at multiples of this step are kept too; 0 keeps none of them.
        config: see `write_training_checkpoint`.
    """

    def __init__(
        self, folder: str, every_n_steps: int = 1000, keep: int = 2, keep_every: int = 0, config: str | None = None
    ) -> None:
        if every_n_steps < 1 or keep < 1 or keep_every < 0:
            raise UserError(
                f"callbacks.checkpoint: every_n_steps={every_n_steps} and keep={keep} must be at least 1 and "
                f"keep_every={keep_every} not negative; ~callbacks.checkpoint writes no checkpoints"
            )
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.keep_every = keep_every
        self.config = Path(config) if config else None
        self.held: set[Path] = set()
        """Checkpoints that are being read and must stay."""
        self.written: Callable[[], None] = lambda: None
        """The first process calls it when a checkpoint is complete."""
        self._saved = -1
        self._restore: dict[str, Any] | None = None

    def most(self, max_steps: int) -> int:
        """Return the largest number of checkpoints at a time, in a run of this many steps (-1:
        unknown).
        """
        if max_steps < 0:
            return self.keep + 1
        for_good = max_steps // self.keep_every if self.keep_every else 0
        return min(self.keep + 1 + for_good, -(-max_steps // self.every_n_steps))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        # A checkpoint is saved only between two steps, since accumulated gradients are not part of
        # it.
        if batch.ends_step and not more_follows(trainer):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._save_if_due(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)

    def _save_if_due(self, trainer: L.Trainer) -> None:
        if trainer.global_step > 0 and trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> Path:
        """Return the checkpoint of this step, which is written unless it exists.

        All ranks call it together.
        """
        path = self.folder / f"step-{trainer.global_step:08d}"
        self._note_resumed(trainer, path)
        if self._saved == trainer.global_step:
            return path
        self._saved = trainer.global_step
        for logger in trainer.loggers:
            logger.save()  # a resumed run does not repeat what they logged before
        write_training_checkpoint(trainer, path, self.config)
        if trainer.is_global_zero:
            self.written()
            self._prune()
        return path

    def _note_resumed(self, trainer: L.Trainer, path: Path) -> None:
        """Note that this step is already saved, if the run was just resumed from this folder."""
        if self._restore is not None and trainer.strategy.broadcast(path.exists()):
            self._saved = trainer.global_step

    def _prune(self) -> None:
        for old in checkpoints(self.folder)[: -self.keep]:
            if old not in self.held and not (self.keep_every and step_of(old) % self.keep_every == 0):
                discard(old)

    # Random states are part of the checkpoint. Those of data workers are not used, since order and
    # wording are functions of the seed and the position.
    def state_dict(self) -> dict[str, Any]:
        if self._restore is not None:
            return self._restore
        name, keys, *rest = np.random.get_state(legacy=True)
        version, internal, gauss = random.getstate()
        state: dict[str, Any] = {
            "python": [version, list(internal), gauss],
            "numpy": [name, np.asarray(keys).tolist(), *rest],
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return {"ranks": of_all_ranks(state, dist.get_world_size() if dist.is_initialized() else 1)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restore = state_dict

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the random states as late as possible, so that set-up cannot change them."""
        self._note_resumed(trainer, self.folder / f"step-{trainer.global_step:08d}")
        if trainer.is_global_zero:
            # a killed run was writing or deleting them
            for partial in self.folder.glob(".step-*.tmp"):
                shutil.rmtree(partial)
        states = self._restore["ranks"] if self._restore else []
        self._restore = None
        if trainer.global_rank >= len(states):  # a new run, or more ranks than before
            return
        state = states[trainer.global_rank]
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
