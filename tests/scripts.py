"""This repository's scripts as a user runs them, in forks of this process, which has already
imported their libraries.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from hydra.core.global_hydra import GlobalHydra

from tests.conftest import REPOSITORY
from tests.ranks import environment_of, free_port, import_for_forks


class Script:
    """A process in a session of its own: of `subprocess.Popen` what tests of a script ask.

    Args:
        command: the script's file and its arguments.
    """

    def __init__(
        self,
        command: Sequence[str],
        stdout: IO[Any],
        stderr: IO[Any],
        cwd: Path = REPOSITORY,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        def run() -> None:
            os.setsid()
            os.chdir(cwd)
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            sys.argv = [*command]
            if environment is not None:
                os.environ.clear()
                os.environ.update(environment)
            GlobalHydra.instance().clear()
            torch.set_num_threads(1)  # as in tests/ranks.py
            runpy.run_path(command[0], run_name="__main__")

        import_for_forks()
        self._process = multiprocessing.get_context("fork").Process(target=run)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return code

    def kill(self) -> None:
        """Kill the process and all processes that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()


def run_script(
    command: Sequence[str],
    cwd: Path = REPOSITORY,
    environment: Mapping[str, str] | None = None,
    timeout: float = 240,
    ranks: int = 1,
) -> subprocess.CompletedProcess[str]:
    """Return the largest exit code and the common output of all ranks."""
    environments = [environment]
    if ranks > 1:
        own, port = os.environ if environment is None else environment, free_port()
        environments = [{**own, **environment_of(rank, ranks, port)} for rank in range(ranks)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        scripts = [Script(command, out, err, cwd, one) for one in environments]
        try:
            code = max(script.wait(timeout) for script in scripts)
        finally:
            for script in scripts:
                script.kill()
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(list(command), code, out.read(), err.read())
