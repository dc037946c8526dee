"""A run that is asked to stop saves, requeues its job, and ends."""

from __future__ import annotations

import logging
import signal
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn

from sphinx_pl.callbacks.checkpoint import ResumeCheckpoint, more_follows
from sphinx_pl.data.schema import Batch
from sphinx_pl.runtime import signals, slurm

log = logging.getLogger(__name__)


class Preempted(SystemExit):
    """Ends the process with exit code 128 + the signal in the first process, and 0 in the others.

    The program that started them would take another code for a failure, and kill the first process
    while it closes its logs.

    Args:
        requeued: whether the job will resume by itself.
    """

    def __init__(self, code: int, requeued: bool = False) -> None:
        super().__init__(code)
        self.requeued = requeued


class _Vote:
    """The largest of all ranks' numbers.

    It is requested now and read later, so neither ranks nor GPUs wait for it.
    """

    def __init__(self, number: int, device: torch.device) -> None:
        self.number = torch.tensor(number, dtype=torch.int32, device=device)
        self.work = dist.all_reduce(self.number, dist.ReduceOp.MAX, async_op=True)

    def copy(self) -> None:
        """Copy the number to the host after the collective, in the order of its stream, without
        waiting for the GPU.
        """
        self.work.wait()  # on a GPU this only orders streams
        self.event: torch.cuda.Event | None = None
        if self.number.is_cuda:
            self.host = torch.empty((), dtype=torch.int32, pin_memory=True)
            self.host.copy_(self.number, non_blocking=True)
            self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.event.record()
        else:
            self.host = self.number

    def result(self) -> int:
        if self.event is not None:
            self.event.synchronize()
        return int(self.host)


class Preemption(L.Callback):
    """On SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C on any rank: save at the next end of an optimizer
    step, requeue, exit.

    The signal is only noted (`sphinx_pl.runtime.signals`), so it may come at any time, and more
    than once. During the writing of a checkpoint: the checkpoint is finished, and the next step is
    saved too. During a validation of the training loop: the validation is finished first. Before
    the first step: nothing is saved, because there is nothing yet.

    All ranks must stop after the same step. They vote once per optimizer step: the vote is
    requested before the last micro-batch and read after it. A signal during the last micro-batch
    takes effect one step later.

    Put it before the checkpoint callback, whose `save` it calls. Otherwise a step could be saved
    twice.

    Args:
        requeue: requeue the SLURM job, if there is one. A cancelled job is not requeued, nor one
            that was stopped by Ctrl-C.
    """

    def __init__(self, requeue: bool = True) -> None:
        self.requeue = requeue
        self._vote: _Vote | None = None
        self._due = 0
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Lightning's handlers communicate or save at an arbitrary moment, and exit with code 0
        # after a SIGTERM. They also make all ranks and GPUs wait for each other before every
        # micro-batch. There is no public switch.
        trainer._signal_connector.register_signal_handlers = lambda: None
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        if not self._handlers:
            self._handlers = {number: signal.getsignal(number) for number in (*signals.SIGNALS, signals.INTERRUPT)}
        signals.watch(interrupt=True)
        self._leave_before_training(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore_handlers()

    def on_exception(self, *_: Any) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    # -- before, between and after training: no step to save ---------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._vote, self._due = None, 0
        self._leave_before_training(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._leave_before_training(trainer)

    def _leave_before_training(self, trainer: L.Trainer) -> None:
        if number := self._ask(trainer):
            self._leave(trainer, number, "nothing new to save")

    # -- in training -------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if batch.ends_step and trainer.world_size > 1:
            self._vote = _Vote(signals.received(), trainer.strategy.root_device)
            self._vote.copy()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not batch.ends_step:
            return
        self._due = signals.received() if self._vote is None else self._vote.result()
        # A validation or the end of the run comes first, since a run that resumes from here would
        # skip it.
        checkpoint = self._checkpoint(trainer)
        if self._due and not (checkpoint is not None and more_follows(trainer)):
            self._save_and_leave(trainer, self._due)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            number = self._due or self._ask(trainer)  # `_due` is the same on all ranks
            if number:
                self._save_and_leave(trainer, number)

    def _save_and_leave(self, trainer: L.Trainer, number: int) -> None:
        checkpoint = self._checkpoint(trainer)
        if checkpoint is None:
            self._leave(trainer, number, "nothing is saved without callbacks.checkpoint")
        if trainer.is_global_zero:
            log.warning("%s: saving step %d", signal.Signals(number).name, trainer.global_step)
        checkpoint.save(trainer)  # type: ignore[union-attr]  # _leave does not return
        self._leave(trainer, number, f"step {trainer.global_step} is saved")

    def _leave(self, trainer: L.Trainer, number: int, outcome: str) -> None:
        """Log the outcome, requeue the job and end the process."""
        if not trainer.is_global_zero:
            raise Preempted(0)
        name, job = signal.Signals(number).name, slurm.job()
        if job is None or not self.requeue or number == signals.INTERRUPT:
            log.warning("%s: %s; ckpt_path=last resumes from there", name, outcome)
        elif problem := slurm.requeue():
            log.warning(
                "%s: %s; job %s is not requeued (%s): ckpt_path=last resumes from there", name, outcome, job, problem
            )
        else:
            log.warning("%s: %s; job %s is requeued and will resume from there", name, outcome, job)
            raise Preempted(128 + number, requeued=True)
        raise Preempted(128 + number)

    @staticmethod
    def _checkpoint(trainer: L.Trainer) -> ResumeCheckpoint | None:
        return next((c for c in trainer.callbacks if isinstance(c, ResumeCheckpoint)), None)

    @staticmethod
    def _ask(trainer: L.Trainer) -> int:
        """Return the largest signal that any rank received, or 0. It waits for all ranks."""
        if trainer.world_size == 1:
            return signals.received()
        vote = _Vote(signals.received(), trainer.strategy.root_device)
        vote.copy()
        return vote.result()
