"""A run folder holds one run at a time, and loses no file whenever a run that replaces another one
ends.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from sphinx_pl.runtime import run_folder
from sphinx_pl.runtime.run_folder import AGAIN, BEFORE, RunFolder
from sphinx_pl.runtime.run_lock import LOCK, Holder, RunLock
from sphinx_pl.runtime.run_log import RunLog
from sphinx_pl.utils.errors import UserError
from tests.conftest import REPOSITORY
from tests.runtime.test_slurm import commands

FILES = {
    "config.yaml": "old",
    "metrics.csv": "step\n1\n",
    ".hydra/config.yaml": "old",
    "wandb_id": "old",
    "model/config.json": "old",
    "model-step-2/config.json": "old",
    "checkpoints/step-00000002/state.pt": "old",
    "checkpoints/step-00000004/state.pt": "old",
    "predictions/step-0.html": "old",
    "predictions/step-4.html": "old",
    "notes.txt": "the user's own",
}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    """Return the text of all files by name."""
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    write(tmp_path / "run", FILES)
    return RunFolder(tmp_path / "run")


def begin(run: RunFolder, after: int) -> None:
    """Prepare a run as train.py does before its first step."""
    run.replace(after)
    write(run.path, {"config.yaml": "new", "metrics.csv": "new", ".hydra/config.yaml": "new", "hparams.yaml": "new"})
    write(run.path, {f"predictions/step-{max(after, 0)}.html": "new"} if after < 0 else {})


# --- replaced files


@pytest.mark.parametrize("after", [-1, 2, 4])
def test_a_run_that_saves_nothing_leaves_what_was_there(run: RunFolder, after: int) -> None:
    begin(run, after)
    assert not (run.path / "model").exists()  # else the next stage would start from it
    assert run.settle()
    assert content(run.path) == FILES
    assert not run.settle()


def test_a_new_run_replaces_all_with_its_first_checkpoint_and_the_model_with_its_own(run: RunFolder) -> None:
    begin(run, -1)
    write(run.path, {"checkpoints/step-00000001/state.pt": "new"})
    run.saved()
    new = {"config.yaml", "metrics.csv", ".hydra/config.yaml", "hparams.yaml", "predictions/step-0.html"}
    new |= {"checkpoints/step-00000001/state.pt", "notes.txt"}
    assert set(content(run.path)) == {*new, f"{BEFORE}/config.json"}
    write(run.path, {"model/config.json": "new"})
    run.saved()
    assert set(content(run.path)) == {*new, "model/config.json"}
    assert content(run.path)["model/config.json"] == "new"


def test_a_resumed_run_replaces_what_is_newer(run: RunFolder) -> None:
    begin(run, 2)
    assert (run.path / "checkpoints/step-00000002").exists()
    write(run.path, {"checkpoints/step-00000003/state.pt": "new"})
    run.saved()
    names = {path.name for path in (run.path / "checkpoints").iterdir()}
    assert names == {"step-00000002", "step-00000003"}
    assert (run.path / "model-step-2").exists()
    assert (run.path / "predictions/step-0.html").exists()
    assert not (run.path / "predictions/step-4.html").exists()
    assert content(run.path)["wandb_id"] == "old"


@pytest.mark.parametrize("after", [-1, 2])
def test_a_kill_at_any_moment_loses_nothing(
    run: RunFolder, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rename, copy and deletion in turn is the last action of a run.

    Then another run settles the folder.
    """
    original = tmp_path / "original"
    shutil.copytree(run.path, original)
    calls = 0
    last = 0

    def mortal(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == last:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    def whole() -> None:
        """Begin a run, save a checkpoint, save a model."""
        begin(run, after)
        for name in ("checkpoints/step-00000003/state.pt", "model/config.json"):
            write(run.path, {name: "new"})
            run.saved()

    ended = False
    outcomes = set()
    while not ended:
        last += 1
        shutil.rmtree(run.path)
        shutil.copytree(original, run.path)
        with monkeypatch.context() as patch:
            calls = 0
            patch.setattr(Path, "rename", mortal(Path.rename))
            patch.setattr(Path, "replace", mortal(Path.replace))
            patch.setattr(run_folder, "_copy", mortal(run_folder._copy))
            patch.setattr("shutil.rmtree", mortal(shutil.rmtree))
            try:
                whole()
                ended = True
            except KeyboardInterrupt:
                pass
            # The settling run is killed as well, at each of its steps.
            for step in range(1, 40):
                calls, last_before, last = 0, last, step
                try:
                    run.settle()
                    break
                except KeyboardInterrupt:
                    continue
                finally:
                    last = last_before
        files = content(run.path)
        saved = files.get("checkpoints/step-00000003/state.pt") == "new"
        outcomes.add(saved)
        if saved:
            model = [name for name in ("model", BEFORE) if f"{name}/config.json" in files]
            assert len(model) == 1, files
            assert files["config.yaml"] == "new"
            assert "checkpoints/step-00000004/state.pt" not in files
            assert not any(run_folder.ASIDE in name for name in files)
        else:
            assert files == FILES
    assert outcomes == {True, False}


def test_a_full_disk_while_things_are_moved_puts_them_back(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "_copy", full)
    with pytest.raises(OSError, match="No space"):
        run.replace(2)
    assert content(run.path) == FILES


def test_the_log_of_a_refused_command_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    path.write_text("old\n")
    log = RunLog(str(path))
    write_message = lambda text: log.handle(logging.LogRecord("a", logging.INFO, "", 0, text, None, None))  # noqa: E731
    write_message("one")
    assert path.read_text() == "old\n"
    log.start()
    write_message("two")
    assert path.read_text() == "old\none\ntwo\n"
    log.undo()
    write_message("three")
    assert path.read_text() == "old\n"


def test_what_a_run_reads_is_found_in_what_it_replaces(run: RunFolder) -> None:
    model = run.path / "model"
    assert run_folder.inside(model / "tokenizer.model", run.replaced_by(-1)) == model
    assert run_folder.inside(run.path / "notes.txt", run.replaced_by(-1)) is None
    assert run_folder.inside(None, run.replaced_by(-1)) is None


# --- the lock


def hold(folder: Path, **changes: Any) -> None:
    """Write the lock of a process that differs from this one in `changes`."""
    (folder / LOCK).write_text(json.dumps(asdict(replace(Holder.this(), **changes))))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_second_run_is_told_of_the_first_one_s_process_and_host(folder: Path) -> None:
    first = RunLock(folder / "run")
    first.acquire()
    content = (folder / "run" / LOCK).read_text()
    with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on {os.uname().nodename}.*run=NAME"):
        RunLock(folder / "run").acquire()
    assert (folder / "run" / LOCK).read_text() == content
    first.release()
    assert not (folder / "run").exists()  # the run wrote nothing to it
    RunLock(folder / "run").acquire()


def test_a_folder_that_cannot_be_written_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to this folder .*choose another output_dir"):
        RunLock(folder / "file" / "run").acquire()

    # a read-only disk even refuses to delete nothing
    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match=r"cannot write to this folder \(Read-only file system\)"):
        RunLock(folder).acquire()


def test_the_lock_of_a_copied_folder_may_be_deleted(folder: Path) -> None:
    hold(folder)
    with pytest.raises(UserError, match=rf"if this is a copy of its folder, delete {folder / LOCK}"):
        RunLock(folder).acquire()
    (folder / LOCK).write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="a process that the lock does not name"):
        RunLock(folder).acquire()


def test_the_lock_of_a_killed_process_is_taken_over(folder: Path) -> None:
    code = f"import os; from sphinx_pl.runtime.run_lock import *; RunLock(Path({str(folder)!r})).acquire(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 9
    assert (folder / LOCK).exists()
    RunLock(folder).acquire()
    assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
    assert [path.name for path in folder.iterdir()] == [LOCK]


def test_a_process_that_has_another_s_number_is_not_taken_for_it(folder: Path) -> None:
    hold(folder, start="1")
    RunLock(folder).acquire()


def test_a_boot_of_the_same_machine_ends_its_processes(folder: Path) -> None:
    hold(folder, boot="another", machine=Holder.this().machine or "m")
    if Holder.this().machine:
        RunLock(folder).acquire()
    else:  # two machines may have one name
        with pytest.raises(UserError, match="cannot tell"):
            RunLock(folder).acquire()


@pytest.mark.parametrize("changes", [{"host": "another"}, {"space": "another"}, {"machine": "another", "boot": "b"}])
def test_what_this_host_cannot_know_is_refused_with_a_way_out(folder: Path, changes: dict[str, str]) -> None:
    hold(folder, **changes)
    with pytest.raises(UserError, match=rf"cannot tell.*delete {folder / LOCK}"):
        RunLock(folder).acquire()
    (folder / LOCK).write_text("{")  # cut short, or of another version
    with pytest.raises(UserError, match=r"does not name.*delete"):
        RunLock(folder).acquire()


@pytest.mark.parametrize(
    ("squeue", "answer"),
    [
        ("echo RUNNING", "in use by process"),
        ("echo COMPLETING", "in use by process"),
        ("echo PENDING", ""),
        ("exit 0", ""),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", ""),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "cannot tell"),
    ],
)
def test_the_scheduler_says_whether_a_job_on_another_host_has_ended(
    folder: Path, monkeypatch: pytest.MonkeyPatch, squeue: str, answer: str
) -> None:
    (folder / "bin").mkdir()
    commands(folder / "bin", "", "exit 0")
    (folder / "bin" / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=":")
    hold(folder, host="another", job="7")
    if answer:
        with pytest.raises(UserError, match=answer):
            RunLock(folder).acquire()
    else:
        RunLock(folder).acquire()


def test_a_job_that_slurm_starts_again_takes_its_own_lock_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(folder, host="another", job="7")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(folder))  # there is no squeue
    with pytest.raises(UserError, match="cannot tell"):
        RunLock(folder).acquire()  # a second command in the same allocation
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    RunLock(folder).acquire()


def test_a_lock_is_given_back_by_its_process_alone(folder: Path) -> None:
    lock = RunLock(folder)
    lock.acquire()
    hold(folder, host="another")  # somebody deleted the lock, and another run took the folder
    lock.release()
    assert (folder / LOCK).exists()


def test_a_pipeline_that_repeats_a_step_asks_for_a_new_run(run: RunFolder) -> None:
    (run.path / AGAIN).touch()
    begin(run, -1)
    assert run.settle()
    assert (run.path / AGAIN).exists()  # nothing was saved, so the request stays
    begin(run, -1)
    write(run.path, {"checkpoints/step-00000001/state.pt": "new"})
    run.saved()
    assert not (run.path / AGAIN).exists()
