"""Chains of small processes are started, broken and killed: which steps run, which are skipped, and
what is printed.
"""

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
    """Return how often each step ran."""
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


def test_a_chain_runs_once_and_says_that_it_is_done(tmp_path: Path, run: Callable[..., Done]) -> None:
    first = run()
    assert first.returncode == 0, first.stderr
    assert runs(tmp_path) == {"a": 1, "b": 1, "side": 1, "c": 1}
    assert "this is c" in first.stdout
    assert "this is c" in (tmp_path / "pipeline" / "c.log").read_text()
    second = run()
    assert second.returncode == 0
    assert runs(tmp_path) == {"a": 1, "b": 1, "side": 1, "c": 1}
    assert "everything is done already" in second.stdout
    assert second.stdout.rstrip().endswith("this is c")  # the output of the last step
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
def test_a_signal_stops_the_step_and_the_next_start_resumes(
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


def test_a_killed_pipeline_ends_its_step_and_resumes(tmp_path: Path, run: Callable[..., Done]) -> None:
    does(tmp_path, "b", "wait")
    process = start(tmp_path)
    wait_for(tmp_path / "b.runs")
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while State(tmp_path / "pipeline").is_locked():  # while the step lives
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
    refusal = run("b=2")
    assert refusal.returncode == 2
    assert "step b" in refusal.stderr
    assert "value: 1 -> 2" in refusal.stderr
    assert "redo=b" in refusal.stderr
    assert "keep=b" in refusal.stderr
    assert runs(tmp_path) == {"a": 1, "b": 1, "side": 1, "c": 1}
    result = run("b=2", "keep=b")
    assert result.returncode == 0, result.stderr
    assert runs(tmp_path) == {"a": 1, "b": 1, "side": 1, "c": 1}
    assert run("b=2").returncode == 0  # the decision is remembered


def test_steps_that_need_a_repeated_step_are_repeated(tmp_path: Path, run: Callable[..., Done]) -> None:
    assert run().returncode == 0
    repeat = run("b=2", "redo=b")
    assert repeat.returncode == 0, repeat.stderr
    assert runs(tmp_path) == {"a": 1, "b": 2, "side": 1, "c": 2}
    assert "stale" in repeat.stdout
    assert (tmp_path / "c" / "product").read_text().startswith('1 b"2 ')
    # The step was repeated with the same result, so steps made from it stay.
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


def test_products_of_others_are_neither_used_nor_replaced_by_default(tmp_path: Path, run: Callable[..., Done]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "product").write_text("by hand")
    refusal = run()
    assert refusal.returncode == 2
    assert "keep=a" in refusal.stderr
    assert run("keep=a").returncode == 0
    assert runs(tmp_path) == {"a": 0, "b": 1, "side": 1, "c": 1}
    (tmp_path / "a" / "product").write_text("by another hand")
    assert "keep=a" in run().stderr
    assert run("keep=a").returncode == 0  # steps made from it are stale
    assert runs(tmp_path) == {"a": 0, "b": 2, "side": 2, "c": 2}


def test_a_missing_product_is_made_again(tmp_path: Path, run: Callable[..., Done]) -> None:
    assert run().returncode == 0
    (tmp_path / "b" / "product").unlink()
    assert states(tmp_path)["b"] == "not started"
    assert run().returncode == 0
    assert runs(tmp_path) == {"a": 1, "b": 2, "side": 1, "c": 1}  # the result is the same


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
    output = b""
    while True:
        try:
            block = os.read(ours, 4096)
        except OSError:
            break
        if not block:
            break
        output += block
    os.waitpid(pid, 0)
    os.close(ours)
    assert b"True" in output
    assert b"\x1b[31m100 %" in output
    log = (tmp_path / "pipeline" / "a.log").read_text()
    assert log.splitlines()[-2:] == ["True", "100 %"]


@pytest.mark.parametrize(("failed", "state"), [(True, "failed"), (False, "interrupted")])
def test_a_step_of_several_tasks_of_which_one_failed_has_failed(
    failed: bool, state: str, tmp_path: Path, run: Callable[..., Done]
) -> None:
    """srun ends the other tasks by SIGTERM and reports that.

    A task that was asked to stop notes no failure.
    """
    assert run().returncode == 0
    pipeline = State(tmp_path / "pipeline")
    pipeline.failure("a").touch()  # an earlier attempt failed
    pipeline.begin("a")
    if failed:
        pipeline.failure("a").touch()
    assert pipeline.end("a", 128 + signal.SIGTERM).state == state
