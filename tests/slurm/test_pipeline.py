"""The recipe as a chain of jobs on a running SLURM, with a step that fails once, and one that is
pre-empted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.pipeline import slurm, status
from sphinx_pl.pipeline.state import State
from tests.conftest import REPOSITORY
from tests.pipeline.small import small_demo
from tests.slurm.conftest import command, until

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200), pytest.mark.usefixtures("running_slurm")]


def start(*arguments: str) -> tuple[int, str]:
    """Return the pipeline's exit code and its output."""
    process = subprocess.run(
        [sys.executable, "-m", "sphinx_pl.cli.pipeline", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return process.returncode, process.stdout + process.stderr


def run(*arguments: str) -> str:
    code, output = start(*arguments)
    assert code == 0, output
    return output


def states(folder: Path) -> dict[str, str]:
    return {line.step: line.state for line in status.look(State(folder / "pipeline"))}


def wait(folder: Path, seconds: float = 900) -> dict[str, str]:
    """Wait until no job waits or runs."""
    until(lambda: not {"waiting", "running"} & set(states(folder).values()), seconds, "the chain")
    return states(folder)


def jobs(folder: Path) -> dict[str, str]:
    return {line.step: line.job for line in status.look(State(folder / "pipeline"))}


def test_a_chain_of_jobs_resumes_after_a_failed_step(tmp_path: Path, sample_data: Path) -> None:
    folder, data = tmp_path / "out", tmp_path / "data"
    shutil.copytree(sample_data, data)
    hidden = data / "instructions" / "train-ocr.json"
    hidden.rename(tmp_path / "hidden")  # only the finetune reads it
    arguments = [*small_demo(folder, data), "train:trainer=zero3_cpu", "launcher=slurm"]
    try:
        run(*arguments)
        assert wait(folder) == {
            "pretrain_real": "done",
            "pretrain_synthetic": "done",
            "mix": "done",
            "finetune": "failed",
            "evaluate": "not started",
        }
        assert "train-ocr.json" in (folder / "pipeline" / "finetune.log").read_text()
        first = jobs(folder)
        (tmp_path / "hidden").rename(hidden)
        output = run(*arguments)
        assert "pretrain_real: done" in output
        assert "finetune: job" in output
        repetition = run(*arguments)  # a queued job is not submitted twice
        assert "finetune: job" in repetition
        assert "failed before" not in repetition
        assert set(wait(folder).values()) == {"done"}
        second = jobs(folder)
        assert {name for name in first if first[name] != second[name]} == {"finetune", "evaluate"}
        assert (folder / "report.html").is_file()
    finally:
        slurm.cancel(State(folder / "pipeline"))


def test_jobs_still_depend_on_a_requeued_step(tmp_path: Path, sample_data: Path) -> None:
    folder = tmp_path / "out"
    arguments = [a for a in small_demo(folder, sample_data) if not a.startswith(("mix:", "evaluate:"))]
    arguments += [f"steps.{name}=null" for name in ("mix", "finetune", "evaluate")]
    arguments += ["train:trainer=zero3_cpu", "pretrain_real:stage.max_steps=16", "pretrain_real:stage.val_every=0"]
    metrics = folder / "pretrain_real" / "metrics.csv"
    try:
        run(*arguments, "launcher=slurm")
        before = jobs(folder)
        job = before["pretrain_real"]
        until(lambda: metrics.is_file() and metrics.read_text().count("\n") > 4, 300, "steps")
        command("scancel", "--signal=USR2", job)
        until(lambda: slurm.queue()[job].state == "PENDING", 120, "the requeue")
        assert states(folder) == {"pretrain_real": "waiting", "pretrain_synthetic": "waiting"}
        assert not (folder / "pretrain_real" / "model").exists(), "signalled too late to test anything"
        # else SLURM waits two minutes
        command("scontrol", "update", f"JobId={job}", "StartTime=now")
        until(lambda: states(folder)["pretrain_real"] == "running", 120, "the job's return")
        assert states(folder)["pretrain_synthetic"] == "waiting"
        assert wait(folder) == {"pretrain_real": "done", "pretrain_synthetic": "done"}
        assert jobs(folder) == before
    finally:
        slurm.cancel(State(folder / "pipeline"))
    log = (folder / "pretrain_real" / "train.log").read_text()
    assert f"job {job} was requeued: resuming the run in" in log
    assert "resuming from" in log
    first, second = (State(folder / "pipeline").read(name) for name in before)
    assert first is not None
    assert second is not None
    assert first.ended is not None
    assert second.started is not None
    assert first.ended <= second.started
    model = open_checkpoint(folder / "pretrain_real" / "model")
    assert model.provenance["steps"] == 16
    [parent] = open_checkpoint(folder / "pretrain_synthetic" / "model").provenance["parents"]
    assert parent["sha256"] == model.identity()["sha256"]


def test_a_chain_of_which_slurm_refuses_a_job_is_not_submitted(tmp_path: Path, sample_data: Path) -> None:
    before = slurm.queue()
    arguments = [*small_demo(tmp_path / "out", sample_data), "launcher=slurm", "evaluate:launcher.partition=nowhere"]
    code, output = start(*arguments)
    assert code == 2
    line = output.splitlines()[-1]
    assert line.startswith("error: step evaluate: sbatch ")
    assert "nowhere" in line
    assert "nothing is submitted" in line
    assert slurm.queue().keys() <= before.keys()
    assert not list((tmp_path / "out").glob("pipeline/*.json"))


def test_a_job_that_waits_for_the_wrong_one_is_replaced(tmp_path: Path, sample_data: Path) -> None:
    folder = tmp_path / "out"
    arguments = [*small_demo(folder, sample_data), "launcher=slurm", 'launcher.sbatch=["--begin=now+1hour"]']
    try:
        run(*arguments)
        first = jobs(folder)
        code, output = start(*[a for a in arguments if not a.startswith("launcher")])
        assert code == 2  # the same steps here, at the same time
        assert f"has jobs in SLURM's queue ({', '.join(first.values())})" in output
        run(*arguments, "finetune:stage.optim.lr=1e-4")
        second = jobs(folder)
        assert {name for name in first if first[name] != second[name]} == {"finetune", "evaluate"}
        queued = slurm.queue()
        assert set(second.values()) <= set(queued)
        assert not {first["finetune"], first["evaluate"]} & set(queued)
        assert set(states(folder).values()) == {"waiting"}
    finally:
        assert slurm.cancel(State(folder / "pipeline")) == 5
    assert set(wait(folder, 60).values()) == {"not started"}
