"""The SLURM job of this process: its name, its restarts, and how to requeue it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from sphinx_pl.utils.files import write_whole

_MARK = "slurm_job"


def job() -> str | None:
    """Return the job's name, or None outside of SLURM.

    It is `ID`, or `ARRAY_INDEX` in an array, where each job also has its own ID.
    """
    env = os.environ
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")


def restarts() -> int:
    """Return how often SLURM has restarted this job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def mark(folder: Path) -> None:
    """Note in a run folder that this job works in it."""
    if name := job():
        write_whole(folder / _MARK, name + "\n")
    else:
        (folder / _MARK).unlink(missing_ok=True)


def came_back(folder: Path) -> bool:
    """Return whether this job was requeued after it had begun to work in this run folder.

    The number of restarts alone does not tell: a job requeued before that point finds the folder of
    another run.
    """
    mark = folder / _MARK
    return restarts() > 0 and mark.is_file() and mark.read_text().strip() == job()


_NOT_RUNNING = {
    *("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "COMPLETED", "CANCELLED", "FAILED"),
    *("TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "REVOKED"),
}


def ended(name: str) -> bool | None:
    """Whether no process of this job is running; None if the scheduler does not answer."""
    try:
        states = _output("squeue", "--noheader", "--jobs", name, "--format", "%T").split()
    except subprocess.CalledProcessError as error:
        return True if "Invalid job id" in str(error.stderr) else None  # SLURM forgets ended jobs
    except (OSError, subprocess.SubprocessError):
        return None
    return all(state in _NOT_RUNNING for state in states)


def requeue() -> str:
    """Requeue this job, after which SLURM ends it. Return the reason if that is impossible, or "".

    Only a running job is requeued. A cancelled job would come back to life, and a job that SLURM
    requeues itself needs no help.
    """
    name = job()
    if name is None:
        return "not in a SLURM job"
    try:
        state = _output("squeue", "--noheader", "--jobs", name, "--format", "%T")
        if state != "RUNNING":
            return f"its state is {state or 'unknown'}"
        _output("scontrol", "requeue", name)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        return " ".join(str(reason).split())
    return ""


def _output(*command: str) -> str:
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return process.stdout.strip()
