"""A SLURM that answers, which may be one machine; where there is none its tests are skipped."""

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
    done = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.skip(f"sbatch is there but SLURM does not answer: {done.stderr.strip()}")


def command(*words: str) -> str:
    """What one of SLURM's commands prints."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.5)
