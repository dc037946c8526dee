"""The SLURM job that this process runs in: which one, whether it was here before, putting it back into the queue."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from sphinx_pl.utils.files import write_whole

_MARK = "slurm_job"


def job() -> str | None:
    """`ID`, or `ARRAY_INDEX` in an array, where every job has an ID of its own too; None outside of SLURM."""
    env = os.environ
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")


def restarts() -> int:
    """How often SLURM has started this job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def mark(folder: Path) -> None:
    """Note in a run folder that this job works in it."""
    if name := job():
        write_whole(folder / _MARK, name + "\n")
    else:
        (folder / _MARK).unlink(missing_ok=True)


def came_back(folder: Path) -> bool:
    """Whether this job was requeued after it had begun to work in this run folder.

    The number of restarts alone would not do: a job that was requeued before it came so far finds someone else's run.
    """
    mark = folder / _MARK
    return restarts() > 0 and mark.is_file() and mark.read_text().strip() == job()


_NOT_RUNNING = {
    *("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "COMPLETED", "CANCELLED", "FAILED"),
    *("TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "REVOKED"),
}


def ended(name: str) -> bool | None:
    """Whether no process of this job runs any more, or None if the scheduler does not answer."""
    try:
        states = _output("squeue", "--noheader", "--jobs", name, "--format", "%T").split()
    except subprocess.CalledProcessError as error:
        return True if "Invalid job id" in str(error.stderr) else None  # it ended minutes ago
    except (OSError, subprocess.SubprocessError):
        return None
    return all(state in _NOT_RUNNING for state in states)


def requeue() -> str:
    """Put this job back into the queue, after which SLURM ends it. Returns why that was not possible, or "".

    Only of a running job: one that was cancelled would come back to life, and one that SLURM requeues itself needs no
    help.
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
        said = getattr(error, "stderr", None) or str(error)
        return " ".join(str(said).split())
    return ""


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()
