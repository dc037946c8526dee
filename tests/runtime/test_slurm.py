"""A job that comes back to its run folder, and requests to SLURM.

Scripts stand in for SLURM's commands.
"""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from sphinx_pl.runtime import slurm


@pytest.fixture(autouse=True)
def _job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")


def test_a_job_of_an_array_is_named_by_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm.job() == "7"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert slurm.job() == "5_2"
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name)
    assert slurm.job() is None


def test_only_a_restarted_job_that_worked_in_the_folder_came_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.mark(tmp_path)
    assert not slurm.came_back(tmp_path)  # a second command in the same allocation
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert slurm.came_back(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "8")  # requeued before it had replaced what job 7 left
    assert not slurm.came_back(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID")
    slurm.mark(tmp_path)
    assert list(tmp_path.iterdir()) == []


def commands(folder: Path, state: str, scontrol: str) -> Path:
    for name, body in (("squeue", f"echo {state}"), ("scontrol", f'echo "$@" >> {folder}/asked; {scontrol}')):
        path = folder / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder / "asked"


def test_a_running_job_is_requeued_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    requests = commands(tmp_path, "RUNNING", "exit 0")
    assert slurm.requeue() == ""
    assert requests.read_text() == "requeue 7\n"
    requests = commands(tmp_path, "COMPLETING", "exit 0")  # requeueing it would undo a scancel
    requests.unlink()
    assert slurm.requeue() == "its state is COMPLETING"
    assert not requests.exists()
    commands(tmp_path, "RUNNING", "echo 'Job can not be requeued' >&2; exit 1")
    assert slurm.requeue() == "Job can not be requeued"


def test_without_slurm_the_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "squeue" in slurm.requeue()
    monkeypatch.delenv("SLURM_JOB_ID")
    assert slurm.requeue() == "not in a SLURM job"
