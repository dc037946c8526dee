"""Real processes get signals and note them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from sphinx_pl.runtime import signals
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.usefixtures("signals_as_before")


def test_the_first_signal_is_the_reason() -> None:
    signals.watch()
    assert signals.received() == 0
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGTERM)  # SLURM's, after a requeue
    assert signals.received() == signal.SIGUSR2


def test_helpers_ignore_what_the_run_acts_on() -> None:
    code = "import time; from sphinx_pl.runtime import signals; signals.ignore()\n"
    code += "print('ready', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=REPOSITORY)
    assert process.stdout is not None
    process.stdout.readline()
    for number in signals.SIGNALS:
        # the sender is not the parent
        subprocess.run(["kill", f"-{int(number)}", str(process.pid)], check=True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.terminate()
    assert process.wait(10) == 0


def test_the_second_ctrl_c_ends_it_at_once() -> None:
    code = "import time; from sphinx_pl.runtime import signals; signals.watch(interrupt=True)\n"
    code += "print('ready', flush=True)\n"
    code += "while not signals.received(): time.sleep(0.01)\nprint('noted', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "noted\n"
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=20)
    assert process.returncode == 130
    assert message.strip() == "Ctrl-C: the run saves its step and ends; a second Ctrl-C ends it at once, without saving"


def test_a_process_that_ignores_ctrl_c_still_ignores_it() -> None:
    """nohup sets this, and closing the terminal must then not end the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signals.watch(interrupt=True)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_importing_it_imports_nothing_slow() -> None:
    code = "import sys; from sphinx_pl.runtime import signals\n"
    code += "print(sorted({'torch', 'lightning', 'hydra'} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert process.stdout.strip() == "[]"


@pytest.mark.parametrize("start", [["train.py"], ["-c", "from sphinx_pl.cli.train import main; main()"]])
def test_ctrl_c_while_libraries_are_imported_is_one_word(start: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *start], stderr=subprocess.PIPE, cwd=REPOSITORY, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:  # a module has its line once it is imported
        if line.split("|")[-1].strip() == "sphinx_pl.cli":
            break
    process.send_signal(signal.SIGINT)
    messages = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.wait(20) in (-signal.SIGINT, 128 + signal.SIGINT)  # a shell says 130 for both
    assert messages == ["interrupted\n"]
