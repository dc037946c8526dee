"""Tests on a running SLURM, which may be a single machine.

One is a sweep of two jobs with two tasks each under ZeRO-3, one of them pre-empted. The other
compares the three ways to start a run, under every engine.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sphinx_pl.callbacks.checkpoint import checkpoints, step_of
from tests.cli.test_train import SMALL, losses
from tests.conftest import REPOSITORY
from tests.slurm.conftest import command, until

pytestmark = [pytest.mark.long, pytest.mark.timeout(900), pytest.mark.usefixtures("running_slurm")]
STEPS = 60


@pytest.fixture
def environment() -> dict[str, str]:
    variables = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return variables | {"OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}


@pytest.fixture
def start(
    environment: dict[str, str], tmp_path: Path, sample_data: Path
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that begins a sweep with the given overrides.

    Its jobs end with the test.
    """
    started: list[subprocess.Popen[str]] = []
    name = f"test-{os.getpid()}-{time.monotonic_ns()}"

    def start(*overrides: str) -> subprocess.Popen[str]:
        options = ["hydra/launcher=slurm", f"hydra.launcher.name={name}", "hydra.launcher.cpus_per_task=1"]
        options += ["stage=pretrain_real", f"output_dir={tmp_path}", f"data.root={sample_data}", *SMALL, *overrides]
        with (tmp_path / "sweep.log").open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "train.py", "-m", *options],
                cwd=REPOSITORY,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )
        started.append(process)
        return process

    yield start
    command("scancel", "--name", name)
    for process in started:
        process.kill()
        process.wait()


def point(folder: Path, number: int) -> Path:
    return folder / "sweeps" / "pretrain_real" / str(number)


def logs(folder: Path) -> str:
    files = [folder / "sweep.log", *(folder / "sweeps" / "pretrain_real" / ".submitit").rglob("*.out")]
    return "\n".join(f"== {path.name}\n{path.read_text()}" for path in files if path.is_file())


def test_a_sweep_whose_job_is_preempted_continues_it_exactly(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    # Both points train the same, so the undisturbed one shows what the other must reach.
    sweep = start(
        "trainer=zero3_cpu",
        "hydra.launcher.tasks_per_node=2",
        "hydra.launcher.timeout_min=20",
        f"stage.max_steps={STEPS}",
        "callbacks.checkpoint.keep=1,2",
        "callbacks.predictions=null",
        "logger=wandb",
        "logger.wandb.mode=offline",
    )
    first, second = point(tmp_path, 0), point(tmp_path, 1)
    metrics = first / "metrics.csv"
    until(lambda: sweep.poll() is not None or (metrics.is_file() and metrics.read_text().count("\n") > 7), 300, "steps")
    assert sweep.poll() is None, logs(tmp_path)
    job = (first / "slurm_job").read_text().strip()
    assert re.fullmatch(r"\d+_0", job)
    identity = (first / "wandb_id").read_text()
    command("scancel", "--signal=USR2", job)
    until(lambda: "PENDING" in command("squeue", "--noheader", "--jobs", job, "--format", "%T"), 120, "the requeue")
    [saved] = checkpoints(first / "checkpoints")
    assert not (first / "model").exists(), "signalled too late to test anything"
    command("scontrol", "update", f"JobId={job}", "StartTime=now")  # else SLURM waits two minutes
    until(lambda: sweep.poll() is not None, 400, "the sweep")
    assert sweep.returncode == 0, logs(tmp_path)

    output = (tmp_path / "sweep.log").read_text()
    assert (
        f"job {job}: point 0 (callbacks.checkpoint.keep=1); log: {first.parent}/.submitit/{job}/{job}_0_log.out"
        in output
    )
    assert "point 1 (callbacks.checkpoint.keep=2) is done" in output
    log = (first / "train.log").read_text()
    assert f"SIGUSR2: step {step_of(saved)} is saved; job {job} is requeued and will resume from there" in log
    assert f"job {job} was requeued: resuming the run in {first}" in log
    assert f"resuming from {saved}" in log
    assert "point callbacks.checkpoint.keep=1" in log
    assert "point callbacks.checkpoint.keep=2" in (second / "train.log").read_text()
    assert sorted(path.name for path in first.parent.iterdir()) == [".submitit", "0", "1", "multirun.yaml"]
    for folder in (first, second):
        (folder / "pretrain_real").symlink_to(folder)  # where `losses` looks
    assert losses(first) == losses(second)
    assert len(losses(second)) == STEPS
    assert (first / "wandb_id").read_text() == identity != (second / "wandb_id").read_text()
    runs = [path.name for path in (first / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert all(name.endswith(identity.strip()) for name in runs)
    # Of two ranks only the first writes a log.
    assert sorted(path.name for path in first.glob("*.log")) == ["train.log"]


def test_a_cancelled_job_saves_and_does_not_come_back(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    start("hydra.launcher.timeout_min=20", "stage.max_steps=100000", "seed=3", "data.workers=1")
    metrics = point(tmp_path, 0) / "metrics.csv"
    until(lambda: metrics.is_file() and metrics.read_text().count("\n") > 7, 300, "steps")
    job = (point(tmp_path, 0) / "slurm_job").read_text().strip()
    command("scancel", job)
    until(lambda: not command("squeue", "--noheader", "--jobs", job), 120, "the end of the job")
    assert len(checkpoints(point(tmp_path, 0) / "checkpoints")) == 1, logs(tmp_path)
    assert f"job {job} is not requeued (its state is " in (point(tmp_path, 0) / "train.log").read_text()


def test_points_that_fail_are_named_and_the_others_are_waited_for(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    sweep = start("stage.max_steps=1", "stage.optim.lr=1e-3,abc")
    until(lambda: sweep.poll() is not None, 300, "the sweep")
    assert sweep.returncode == 2
    output = (tmp_path / "sweep.log").read_text()
    assert "point 0 (stage.optim.lr=0.001) is done" in output
    [job, log] = re.findall(r"point 1 \(stage.optim.lr=abc\) failed: see the log of job (\d+_1): (.*)\n", output)[0]
    assert output.splitlines()[-1].startswith("error: point 1 (stage.optim.lr=abc) failed")
    assert "error: stage.optim.lr=abc must be a number" in Path(log).read_text()
    state = command("sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job}", "--format=State")
    assert state in ("FAILED", "")  # empty: this SLURM keeps no accounts


@pytest.mark.parametrize("trainer", ["cpu", "zero3_cpu", "fsdp2"])
def test_srun_and_torchrun_and_lightning_give_the_same_losses(
    trainer: str, environment: dict[str, str], tmp_path: Path, sample_data: Path
) -> None:
    script = [str(REPOSITORY / "train.py"), "stage=pretrain_real", f"data.root={sample_data}", *SMALL]
    script += [f"trainer={trainer}"]
    script += ["stage.max_steps=5", "~callbacks.export"]
    starters = {
        "srun": ["srun", "--ntasks=2", "--overlap", sys.executable, *script],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *script],
        "lightning": [sys.executable, *script, "trainer.devices=2"],
    }
    results = {}
    for name, words in starters.items():
        process = subprocess.run(
            [*words, f"output_dir={tmp_path / name}"],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        results[name] = losses(tmp_path / name)
        run_folder = tmp_path / name / "pretrain_real"
        assert "devices: 2" in (run_folder / "config.yaml").read_text()
        assert [path.name for path in run_folder.glob("*.log")] == ["train.log"]
        assert (run_folder / "train.log").read_text().count(f"pretrain_real in {run_folder}") == 1
    assert results["srun"] == results["torchrun"] == results["lightning"]
    assert len(results["srun"]) == 5
