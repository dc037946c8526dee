"""A run that is told to go saves, puts its job back into the queue, and ends."""

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
    """Ends the process: 128 + the signal in the first one; 0 in the others, since who started them would take another
    code for a failure and kill the first one while it closes its logs.

    Args:
        requeued: whether the job will resume by itself.
    """

    def __init__(self, code: int, requeued: bool = False) -> None:
        super().__init__(code)
        self.requeued = requeued


class _Vote:
    """The largest of all ranks' numbers, asked for now and read later, so that neither ranks nor GPUs wait for it."""

    def __init__(self, number: int, device: torch.device) -> None:
        self.number = torch.tensor(number, dtype=torch.int32, device=device)
        self.work = dist.all_reduce(self.number, dist.ReduceOp.MAX, async_op=True)

    def copy(self) -> None:
        """After the collective, on its stream's order: to the host without waiting for what the GPU does next."""
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
    """On SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C on any rank: save at the next end of an optimizer step, requeue, exit.

    The signal is only noted (`sphinx_pl.runtime.signals`), so it can come at any time: while a checkpoint is being
    written (it is finished; the next step's is written too), during a validation of the training loop (which is
    finished before), before the first step (nothing is saved then, there is nothing yet), and more than once.

    All ranks must leave after the same step. They vote once per optimizer step: asked for before the last micro-batch,
    read after it. A signal that comes during the last micro-batch is acted on one step later.

    Put it before the checkpoint callback, whose `save` it calls: else a step could be saved twice.

    Args:
        requeue: put the SLURM job back into the queue, where it is one. A job that was cancelled is not requeued, nor
            one that a person has interrupted by Ctrl-C.
    """

    def __init__(self, requeue: bool = True) -> None:
        self.requeue = requeue
        self._vote: _Vote | None = None
        self._due = 0
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Lightning's handlers talk to other ranks, or save, in the midst of whatever there is, end the run with exit
        # code 0 after a SIGTERM, and make all ranks and GPUs wait for each other before every micro-batch. There is no
        # public switch.
        trainer._signal_connector.register_signal_handlers = lambda: None
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        if not self._handlers:
            self._handlers = {number: signal.getsignal(number) for number in (*signals.SIGNALS, signals.INTERRUPT)}
        signals.watch(interrupt=True)
        self._leave_before_training(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._hand_back()

    def on_exception(self, *_: Any) -> None:
        self._hand_back()

    def _hand_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    # -- before, between and after training: no step to save ----------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._vote, self._due = None, 0
        self._leave_before_training(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._leave_before_training(trainer)

    def _leave_before_training(self, trainer: L.Trainer) -> None:
        if number := self._ask(trainer):
            self._leave(trainer, number, "nothing new to save")

    # -- in training --------------------------------------------------------------------------------------------------

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
        # Where a validation or the end of the run is due it comes first: a run that goes on from here would skip it.
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

    def _leave(self, trainer: L.Trainer, number: int, done: str) -> None:
        """Does not return."""
        if not trainer.is_global_zero:
            raise Preempted(0)
        name, job = signal.Signals(number).name, slurm.job()
        if job is None or not self.requeue or number == signals.INTERRUPT:
            log.warning("%s: %s; ckpt_path=last goes on from there", name, done)
        elif problem := slurm.requeue():
            log.warning(
                "%s: %s; job %s is not requeued (%s): ckpt_path=last goes on from there", name, done, job, problem
            )
        else:
            log.warning("%s: %s; job %s is requeued and will go on from there", name, done, job)
            raise Preempted(128 + number, requeued=True)
        raise Preempted(128 + number)

    @staticmethod
    def _checkpoint(trainer: L.Trainer) -> ResumeCheckpoint | None:
        return next((c for c in trainer.callbacks if isinstance(c, ResumeCheckpoint)), None)

    @staticmethod
    def _ask(trainer: L.Trainer) -> int:
        """Whether any rank was told to go, and by which signal; waits for all of them."""
        if trainer.world_size == 1:
            return signals.received()
        vote = _Vote(signals.received(), trainer.strategy.root_device)
        vote.copy()
        return vote.result()
