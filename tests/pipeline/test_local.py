"""What runs, what does not run again, and what is said: chains of small processes, started, broken and killed."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sphinx_pl.pipeline import status
from sphinx_pl.pipeline.state import State
from tests.conftest import REPOSITORY
from tests.pipeline.chain import NEEDS

Done = subprocess.CompletedProcess[str]


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.pipeline.chain", str(folder), *options],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Done]:
    def run(*options: str) -> Done:
        process = start(tmp_path, *options)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


def runs(folder: Path) -> dict[str, int]:
    """How often each step has run."""
    return {
        name: len((folder / f"{name}.runs").read_text()) if (folder / f"{name}.runs").exists() else 0 for name in NEEDS
    }


def states(folder: Path) -> dict[str, str]:
    return {line.step: line.state for line in status.look(State(folder / "pipeline"))}


def does(folder: Path, name: str, what: str) -> None:
    (folder / f"{name}.does").write_text(what)


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_chain_runs_once_and_says_so(tmp_path: Path, run: Callable[..., Done]) -> None:
    first = run()
    assert first.returncode == 0, first.stderr
    assert runs(tmp_path) == {"a": 1, "b": 1, "side": 1, "c": 1}
    assert "this is c" in first.stdout
    assert "this is c" in (tmp_path / "pipeline" / "c.log").read_text()
    again = run()
    assert again.returncode == 0
    assert runs(tmp_path) == {"a": 1, "b": 1, "side": 1, "c": 1}
    assert "everything is done already" in again.stdout
    assert again.stdout.rstrip().endswith("this is c")  # what the last step said
    assert set(states(tmp_path).values()) == {"done"}


def test_a_failed_step_stops_what_needs_it_and_is_continued(tmp_path: Path, run: Callable[..., Done]) -> None:
    does(tmp_path, "b", "fail")
    broken = run()
    assert broken.returncode == 1
    [line] = [line for line in broken.stderr.splitlines() if "failed" in line]
    assert all(word in line for word in ("step b", "exit code 3", str(tmp_path / "pipeline" / "b.log"), "THE COMMAND"))
    assert runs(tmp_path) == {"a": 1, "b": 1, "side": 1, "c": 0}
    assert states(tmp_path) == {"a": "done", "b": "failed", "side": "done"}
    does(tmp_path, "b", "")
    assert run().returncode == 0
    assert runs(tmp_path) == {"a": 1, "b": 2, "side": 1, "c": 1}


def test_a_step_that_writes_nothing_has_failed(tmp_path: Path, run: Callable[..., Done]) -> None:
    does(tmp_path, "c", "nothing")
    broken = run()
    assert broken.returncode == 1
    assert "did not write" in broken.stderr
    assert states(tmp_path)["c"] == "failed"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_step_and_the_next_start_goes_on(
    number: signal.Signals, tmp_path: Path, run: Callable[..., Done]
) -> None:
    does(tmp_path, "b", "wait")
    process = start(tmp_path)
    wait_for(tmp_path / "b.runs")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "step b was interrupted" in err
    assert "THE COMMAND" in err
    assert states(tmp_path) == {"a": "done", "b": "interrupted"}
    does(tmp_path, "b", "")
    assert run().returncode == 0
    assert runs(tmp_path) == {"a": 1, "b": 2, "side": 1, "c": 1}


def test_a_killed_pipeline_takes_its_step_along_and_goes_on(tmp_path: Path, run: Callable[..., Done]) -> None:
    does(tmp_path, "b", "wait")
    process = start(tmp_path)
    wait_for(tmp_path / "b.runs")
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while State(tmp_path / "pipeline").is_locked():  # as long as the step lives
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert states(tmp_path) == {"a": "done", "b": "interrupted"}
    does(tmp_path, "b", "")
    assert run().returncode == 0
    assert runs(tmp_path) == {"a": 1, "b": 2, "side": 1, "c": 1}


def test_two_pipelines_in_one_folder_are_refused(tmp_path: Path, run: Callable[..., Done]) -> None:
    does(tmp_path, "a", "wait")
    process = start(tmp_path)
    try:
        wait_for(tmp_path / "a.runs")
        assert states(tmp_path) == {"a": "running"}
        second = run()
        assert second.returncode == 2
        assert f"process {process.pid} on" in second.stderr
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert runs(tmp_path)["a"] == 1


def test_another_configuration_of_a_finished_step_is_refused(tmp_path: Path, run: Callable[..., Done]) -> None:
    assert run().returncode == 0
    refused = run("b=2")
    assert refused.returncode == 2
    assert "step b" in refused.stderr
    assert "value: 1 -> 2" in refused.stderr
    assert "redo=b" in refused.stderr
    assert "keep=b" in refused.stderr
    assert runs(tmp_path) == {"a": 1, "b": 1, "side": 1, "c": 1}
    kept = run("b=2", "keep=b")
    assert kept.returncode == 0, kept.stderr
    assert runs(tmp_path) == {"a": 1, "b": 1, "side": 1, "c": 1}
    assert run("b=2").returncode == 0  # it is remembered


def test_what_needs_a_step_that_was_made_anew_is_made_anew(tmp_path: Path, run: Callable[..., Done]) -> None:
    assert run().returncode == 0
    redone = run("b=2", "redo=b")
    assert redone.returncode == 0, redone.stderr
    assert runs(tmp_path) == {"a": 1, "b": 2, "side": 1, "c": 2}
    assert "stale" in redone.stdout
    assert (tmp_path / "c" / "product").read_text().startswith('1 b"2 ')
    # Made anew, but it came out the same: what was made from it stands.
    assert run("b=2", "redo=side").returncode == 0
    assert runs(tmp_path) == {"a": 1, "b": 2, "side": 2, "c": 2}


def test_a_redo_that_was_interrupted_is_not_forgotten(tmp_path: Path, run: Callable[..., Done]) -> None:
    assert run().returncode == 0
    does(tmp_path, "a", "fail")
    assert run("redo=all").returncode == 1
    assert states(tmp_path) == {"a": "failed", "b": "stale", "side": "stale", "c": "stale"}
    does(tmp_path, "a", "")
    assert run().returncode == 0
    assert runs(tmp_path) == {"a": 3, "b": 2, "side": 2, "c": 2}


def test_what_others_made_is_neither_used_nor_replaced_unasked(tmp_path: Path, run: Callable[..., Done]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "product").write_text("by hand")
    refused = run()
    assert refused.returncode == 2
    assert "keep=a" in refused.stderr
    assert run("keep=a").returncode == 0
    assert runs(tmp_path) == {"a": 0, "b": 1, "side": 1, "c": 1}
    (tmp_path / "a" / "product").write_text("by another hand")
    assert "keep=a" in run().stderr
    assert run("keep=a").returncode == 0  # what was made from it is stale
    assert runs(tmp_path) == {"a": 0, "b": 2, "side": 2, "c": 2}


def test_what_is_gone_is_made_again(tmp_path: Path, run: Callable[..., Done]) -> None:
    assert run().returncode == 0
    (tmp_path / "b" / "product").unlink()
    assert states(tmp_path)["b"] == "not started"
    assert run().returncode == 0
    assert runs(tmp_path) == {"a": 1, "b": 2, "side": 1, "c": 1}  # it came out the same


def test_on_a_terminal_the_step_has_one_and_its_log_has_none(tmp_path: Path) -> None:
    pid, ours = pty.fork()
    if pid == 0:
        os.chdir(REPOSITORY)
        code = "import sys; print(sys.stdout.isatty()); print('1 %\\r\\x1b[31m100 %\\x1b[0m')"
        program = (
            "import dataclasses, pathlib, sys; from sphinx_pl.pipeline import local; "
            "from tests.pipeline.chain import recipe; "
            f"all = recipe(pathlib.Path({str(tmp_path)!r}), {{}}); "
            f"step = dataclasses.replace(all.steps['a'], command=(sys.executable, '-c', {code!r})); "
            "sys.exit(local.run(dataclasses.replace(all, steps={'a': step}), ''))"
        )
        os.execv(sys.executable, [sys.executable, "-c", program])
    shown = b""
    while True:
        try:
            block = os.read(ours, 4096)
        except OSError:
            break
        if not block:
            break
        shown += block
    os.waitpid(pid, 0)
    os.close(ours)
    assert b"True" in shown
    assert b"\x1b[31m100 %" in shown
    log = (tmp_path / "pipeline" / "a.log").read_text()
    assert log.splitlines()[-2:] == ["True", "100 %"]


@pytest.mark.parametrize(("failed", "state"), [(True, "failed"), (False, "interrupted")])
def test_a_step_of_several_tasks_of_which_one_failed_has_failed(
    failed: bool, state: str, tmp_path: Path, run: Callable[..., Done]
) -> None:
    """srun ends the other tasks by SIGTERM and says that; what was told to go has noted no failure."""
    assert run().returncode == 0
    known = State(tmp_path / "pipeline")
    known.failure("a").touch()  # of an attempt before
    known.begin("a")
    if failed:
        known.failure("a").touch()
    assert known.end("a", 128 + signal.SIGTERM).state == state
