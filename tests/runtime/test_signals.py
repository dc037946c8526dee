"""Signals are noted, by real processes that get them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from sphinx_pl.runtime import signals
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.usefixtures("signals_as_before")


def test_the_first_signal_says_why() -> None:
    signals.watch()
    assert signals.received() == 0
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGTERM)  # SLURM's, after a requeue
    assert signals.received() == signal.SIGUSR2


def test_helpers_ignore_what_the_run_acts_on() -> None:
    code = "import time; from sphinx_pl.runtime import signals\n"
    code += "signals.ignore(); print('ready', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=REPOSITORY)
    assert process.stdout is not None
    process.stdout.readline()
    for number in signals.SIGNALS:
        subprocess.run(["kill", f"-{int(number)}", str(process.pid)], check=True)  # by another than its parent
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.terminate()
    assert process.wait(10) == 0


def test_the_second_ctrl_c_ends_it_at_once() -> None:
    code = "import time; from sphinx_pl.runtime import signals\n"
    code += "signals.watch(interrupt=True); print('ready', flush=True)\n"
    code += "while not signals.received(): time.sleep(0.01)\nprint('noted', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "noted\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said.strip() == "Ctrl-C: the run saves its step and ends; Ctrl-C again ends it at once, without saving"


def test_what_ignores_ctrl_c_goes_on_ignoring_it() -> None:
    """As under nohup, where a terminal that is closed must not end the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signals.watch(interrupt=True)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_it_is_there_before_anything_slow_is_imported() -> None:
    code = "import sys; from sphinx_pl.runtime import signals\n"
    code += "print(sorted({'torch', 'lightning', 'hydra'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.strip() == "[]"
