"""A running SLURM, which may be a single machine. Without it these tests are skipped."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable

import pytest


@pytest.fixture
def running_slurm() -> None:
    if shutil.which("sbatch") is None:
        pytest.skip("no sbatch on PATH: these tests need a SLURM")
    process = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, timeout=60)
    if process.returncode:
        pytest.skip(f"sbatch is there but SLURM does not answer: {process.stderr.strip()}")


def command(*words: str) -> str:
    """Return the output of one of SLURM's commands."""
    process = subprocess.run(words, capture_output=True, text=True, timeout=60)
    return process.stdout.strip()


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.5)
