"""A run that is asked to stop saves its step, requeues its job, and later resumes exactly."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import LambdaCallback

from sphinx_pl.callbacks.checkpoint import ResumeCheckpoint, checkpoints, step_of
from sphinx_pl.callbacks.preemption import Preempted, Preemption, _Vote
from sphinx_pl.runtime import signals
from tests.cli.test_train import command, losses, run
from tests.runtime.test_slurm import commands
from tests.scripts import Script

Fit = Callable[..., Any]


@pytest.fixture(autouse=True)
def _no_job(signals_as_before: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def tell(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def at_step(step: int, *numbers: int) -> L.Callback:
    """Return a callback that signals during the first micro-batch after `step` steps."""

    def send(trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == step and not signals.received():
            for number in numbers:
                tell(number)

    return LambdaCallback(on_train_batch_start=send)


def saved(folder: Path) -> list[int]:
    return [step_of(path) for path in checkpoints(folder)]


def leaves(fit: Fit, folder: Path, *callbacks: L.Callback, **options: Any) -> int:
    """Return the exit code of a fit of four steps, with validations after the second and the
    fourth.
    """
    with pytest.raises(Preempted) as exit_info:
        fit([*callbacks, Preemption(), ResumeCheckpoint(str(folder), **options)])
    return int(exit_info.value.code)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [*signals.SIGNALS, signals.INTERRUPT])
def test_the_step_that_runs_is_finished_and_saved(fit: Fit, tmp_path: Path, number: int) -> None:
    assert leaves(fit, tmp_path, at_step(2, number)) == 128 + number
    assert saved(tmp_path) == [3]


def test_a_validation_that_is_due_comes_before(fit: Fit, tmp_path: Path) -> None:
    """Otherwise a run that resumes from here would skip it."""
    validated: list[int] = []
    callback = LambdaCallback(on_validation_end=lambda trainer, _: validated.append(trainer.global_step))
    leaves(fit, tmp_path, at_step(1, signal.SIGTERM), callback)
    assert (saved(tmp_path), validated) == ([2], [2])


def test_a_signal_during_validation_is_acted_on_after_it(fit: Fit, tmp_path: Path) -> None:
    callback = LambdaCallback(on_validation_start=lambda *_: tell())
    leaves(fit, tmp_path, callback)
    assert saved(tmp_path) == [2]


def test_a_signal_while_a_checkpoint_is_written_lets_it_finish(fit: Fit, tmp_path: Path) -> None:
    # it also signals the second time, without effect
    callback = LambdaCallback(on_save_checkpoint=lambda *_: tell())
    leaves(fit, tmp_path, callback, every_n_steps=1, keep=9)
    assert saved(tmp_path) == [1, 2]
    assert not list(tmp_path.glob(".*"))


def test_before_the_first_step_nothing_is_saved(fit: Fit, tmp_path: Path) -> None:
    signals.watch()
    tell(signal.SIGUSR2)
    batches: list[Any] = []
    counter = LambdaCallback(on_train_batch_end=lambda *args: batches.append(args))
    assert leaves(fit, tmp_path, counter) == 128 + signal.SIGUSR2
    assert (saved(tmp_path), batches) == ([], [])


def test_ctrl_c_says_how_to_resume_and_never_requeues(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # a job that a person watches
    with pytest.raises(Preempted) as exit_info:
        fit([at_step(1, signal.SIGINT), Preemption(), ResumeCheckpoint(str(tmp_path))])
    assert (exit_info.value.code, exit_info.value.requeued) == (130, False)
    assert "SIGINT: step 2 is saved; ckpt_path=last resumes from there" in caplog.text
    assert saved(tmp_path) == [2]


def test_without_the_checkpoint_callback_the_log_says_so(fit: Fit, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Preempted):
        fit([at_step(0, signal.SIGTERM), Preemption()])
    assert "SIGTERM: nothing is saved without callbacks.checkpoint; ckpt_path=last" in caplog.text


def test_lightning_s_own_handlers_are_off(fit: Fit) -> None:
    observations: list[Any] = []

    def look(trainer: L.Trainer, *_: Any) -> None:
        observations.append([signal.getsignal(number) for number in signals.SIGNALS])
        assert not trainer.received_sigterm

    during = dict.fromkeys(("on_train_batch_start", "on_validation_start"), look)
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    fit([LambdaCallback(**during), Preemption()])
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
    assert observations
    assert all(handler is signals._note for handlers in observations for handler in handlers)


def test_a_job_is_requeued_once_everything_is_saved(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bin").mkdir()
    listing = f"ls {tmp_path}/checkpoints >> {tmp_path}/bin/asked"
    requests = commands(tmp_path / "bin", "RUNNING", listing)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    # SLURM's SIGTERM follows at once.
    assert leaves(fit, tmp_path / "checkpoints", at_step(0, signal.SIGUSR2, signal.SIGTERM)) == 128 + signal.SIGUSR2
    assert requests.read_text() == "requeue 40_3\nstep-00000001\n"
    assert "SIGUSR2: step 1 is saved; job 40_3 is requeued and will resume from there" in caplog.text


def test_a_job_that_can_not_be_requeued_says_how_to_resume(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bin").mkdir()
    commands(tmp_path / "bin", "COMPLETING", "exit 0")  # as after scancel
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    leaves(fit, tmp_path / "checkpoints", at_step(0, signal.SIGTERM))
    assert "job 41 is not requeued (its state is COMPLETING): ckpt_path=last resumes from there" in caplog.text


# --- real processes


@pytest.mark.parametrize(
    ("trainer", "ranks", "steps"),
    [
        ("cpu", 1, 12),
        pytest.param("cpu", 2, 30, marks=pytest.mark.long),
        pytest.param("zero3_cpu", 2, 16, marks=pytest.mark.long),
        pytest.param("fsdp2", 2, 16, marks=pytest.mark.long),
    ],
)
@pytest.mark.timeout(600)
def test_a_preempted_run_resumes_with_the_same_losses(
    trainer: str, ranks: int, steps: int, tmp_path: Path, sample_data: Path
) -> None:
    options = [f"stage.max_steps={steps}", f"stage.val_every={steps * 2 // 3}", "data.workers=1"]
    options += [f"trainer={trainer}", f"trainer.devices={ranks}"]
    straight = run(tmp_path / "straight", sample_data, *options)
    assert straight.returncode == 0, straight.stderr
    folder = tmp_path / "told"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    log = tmp_path / "log"
    with log.open("w") as file:
        process = Script(command(folder, sample_data, *options)[1:], file, file, environment=environment)
    metrics = folder / "pretrain_real" / "metrics.csv"
    deadline = time.monotonic() + 200
    while not (metrics.is_file() and metrics.read_text().count("\n") > 5):
        assert process.poll() is None, "the run ended before it could be told"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # A scheduler signals all processes, data workers included; then it signals once more.
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    code, output = process.wait(120), log.read_text()
    assert code == 128 + signal.SIGTERM, output
    [step] = saved(folder / "pretrain_real" / "checkpoints")
    assert 2 < step < steps
    assert f"SIGTERM: step {step} is saved; ckpt_path=last resumes from there" in output
    assert max(losses(folder)) == step
    resumed = run(folder, sample_data, *options, "ckpt_path=last")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(folder) == losses(tmp_path / "straight")
    assert len(losses(folder)) == steps


def vote(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    results = []
    for numbers in ([0, 0], [0, signal.SIGTERM], [signal.SIGUSR1, signal.SIGTERM]):
        ballot = _Vote(numbers[rank], torch.device("cpu"))
        ballot.copy()
        results.append(ballot.result())
    assert results == [0, signal.SIGTERM, signal.SIGTERM]
    (folder / f"{rank}").touch()
    dist.destroy_process_group()


def test_all_ranks_come_to_the_same_answer(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(vote, (tmp_path,), nprocs=2, start_method="fork")
    assert (tmp_path / "0").exists()
    assert (tmp_path / "1").exists()
