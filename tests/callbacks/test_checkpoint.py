"""Checkpoints to resume from: complete or absent, the newest few, with random states."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback

from sphinx_pl.callbacks.checkpoint import ResumeCheckpoint, checkpoints, resolve_resume, step_of
from sphinx_pl.checkpoints.training import INDEX, TrainingShards
from sphinx_pl.distributed.checkpointing import TrainingCheckpointIO
from sphinx_pl.utils.errors import UserError

Fit = Callable[..., Any]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- which file is a checkpoint


def test_only_whole_checkpoints_count_and_they_are_ordered_by_step(tmp_path: Path) -> None:
    for name in ("step-9", "step-00000010", "step-2", ".step-00000012.tmp", "step-13.tmp", "step-", "step-14b", "last"):
        (tmp_path / name).mkdir()
    assert [step_of(path) for path in checkpoints(tmp_path)] == [2, 9, 10]
    assert resolve_resume("last", tmp_path) == tmp_path / "step-00000010"
    with pytest.raises(ValueError, match="last is not step-N"):
        step_of(tmp_path / "last")


def test_what_ckpt_path_means(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / INDEX).touch()
    run = tmp_path / "run"
    assert resolve_resume(None, run) is None
    # nothing yet: a job that restarts itself starts a new run
    assert resolve_resume("last", run) is None
    assert resolve_resume(str(other), run) == other
    (run / "best").mkdir(parents=True)
    (run / "best" / INDEX).touch()
    for wrong in ("nowhere", str(tmp_path), str(run / "best")):
        with pytest.raises(UserError, match=f"ckpt_path={wrong} is not a checkpoint to resume from"):
            resolve_resume(wrong, run)


# --- writing


def test_the_newest_k_are_kept_and_load_without_unpickling(fit: Fit, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / "step-00000000").mkdir(parents=True)
    _, stage = fit([ResumeCheckpoint(str(folder), every_n_steps=1, keep=2)], steps=4)
    assert names(folder) == ["step-00000003", "step-00000004"]

    pieces = TrainingShards(folder / "step-00000004")
    state = pieces.state()
    assert state["global_step"] == 4
    for name, value in stage.sphinx.state_dict().items():
        assert torch.equal(pieces.read(name).view(value.shape), value), name
        assert pieces.has(name, "exp_avg")
    assert set(state["optimizer_steps"].values()) == {4}
    [schedule] = state["lr_schedulers"]
    assert schedule["last_epoch"] == 4
    assert state["DataModule"]["planner"]["number"] == 4
    [random_states] = [value for key, value in state["callbacks"].items() if "ResumeCheckpoint" in key]
    assert [set(rank) >= {"python", "numpy", "torch"} for rank in random_states["ranks"]] == [True]


def test_some_stay_for_good_and_one_that_is_read_stays_for_now(fit: Fit, tmp_path: Path) -> None:
    callback = ResumeCheckpoint(str(tmp_path), every_n_steps=1, keep=1, keep_every=3)
    callback.held.add(tmp_path / "step-00000002")
    fit([callback], steps=5)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000005"]


def test_every_n_steps_and_at_the_end(fit: Fit, tmp_path: Path) -> None:
    fit([ResumeCheckpoint(str(tmp_path), every_n_steps=2, keep=9)], steps=3)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_validation_of_the_same_step_comes_before_its_checkpoint(fit: Fit, tmp_path: Path) -> None:
    """Otherwise a run that resumes from the checkpoint would skip the validation."""
    listings: list[list[str]] = []
    callback = LambdaCallback(on_validation_end=lambda *_: listings.append(names(tmp_path)))
    # validates after steps 2 and 4
    fit([callback, ResumeCheckpoint(str(tmp_path), every_n_steps=1, keep=9)], steps=4)
    assert listings == [["step-00000001"], [f"step-0000000{step}" for step in (1, 2, 3)]]
    assert len(names(tmp_path)) == 4


class FullDisk(TrainingCheckpointIO):
    """Writes half of every checkpoint after the first, then fails."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        self.written += 1
        if self.written > 1:
            (Path(path) / INDEX).unlink()
            raise OSError(28, "No space left on device")


def test_a_half_written_folder_is_never_taken_for_a_checkpoint(fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        fit([ResumeCheckpoint(str(tmp_path), every_n_steps=1, keep=1)], plugins=[FullDisk()])
    whole = tmp_path / "step-00000001"
    assert names(tmp_path) == [whole.name]  # the half is deleted: later files need the room
    # the older one stays until the newer one is complete
    assert resolve_resume("last", tmp_path) == whole
    assert TrainingShards(whole).state()["global_step"] == 1


def test_it_reports_a_complete_checkpoint_before_it_prunes(fit: Fit, tmp_path: Path) -> None:
    callback = ResumeCheckpoint(str(tmp_path), every_n_steps=1, keep=1)
    listings: list[list[str]] = []
    callback.written = lambda: listings.append(names(tmp_path))
    fit([callback], steps=2)
    assert listings == [["step-00000001"], ["step-00000001", "step-00000002"]]


def test_how_many_there_are_at_once() -> None:
    most = ResumeCheckpoint("unused", every_n_steps=10, keep=2, keep_every=50).most
    assert [most(steps) for steps in (5, 10, 20, 30, 100, -1)] == [1, 1, 2, 3, 5, 3]


def test_a_step_that_is_reached_again_replaces_its_checkpoint(fit: Fit, tmp_path: Path) -> None:
    for name in ("step-00000001", ".step-00000001.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "of the run before").touch()
    fit([ResumeCheckpoint(str(tmp_path))], steps=1)
    assert names(tmp_path) == ["step-00000001"]
    assert not (tmp_path / "step-00000001/of the run before").exists()
    assert TrainingShards(tmp_path / "step-00000001").state()["global_step"] == 1


# --- random states


def numbers() -> list[float]:
    return [random.random(), random.gauss(0, 1), *np.random.rand(2), np.random.randn(), *torch.rand(2).tolist()]


def test_random_numbers_go_on_where_they_were(fit: Fit, tmp_path: Path) -> None:
    trainer, stage = fit([], steps=1)
    numbers()  # gauss and randn then have a stored number, which is part of the state
    path = tmp_path / "state.pt"
    torch.save(ResumeCheckpoint("unused").state_dict(), path)
    expected = numbers()

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    resumed = ResumeCheckpoint("unused")
    resumed.load_state_dict(torch.load(path, weights_only=True))
    assert numbers() != expected  # only when training starts: set-up may draw numbers
    resumed.on_train_start(trainer, stage)
    assert numbers() == expected
    resumed.on_train_start(trainer, stage)
    assert numbers() != expected  # once
