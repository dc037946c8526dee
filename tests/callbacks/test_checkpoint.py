"""Checkpoints to resume from: whole or not there, the newest few, random states included."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import LambdaCallback

from callbacks.checkpoint import ResumeCheckpoint, checkpoints, resolve_resume, step_of
from sphinx_pl.errors import UserError

Fit = Callable[..., Any]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- which file is a checkpoint


def test_only_whole_checkpoints_count_and_they_are_ordered_by_step(tmp_path: Path) -> None:
    for name in ("step-9.ckpt", "step-00000010.ckpt", "step-2.ckpt"):
        (tmp_path / name).touch()
    (tmp_path / "step-11.ckpt").mkdir()  # a sharded strategy writes a folder
    for name in (".step-00000012.ckpt.tmp", "step-13.ckpt.tmp", "step-.ckpt", "step-14b.ckpt", "last.ckpt"):
        (tmp_path / name).touch()
    assert [step_of(path) for path in checkpoints(tmp_path)] == [2, 9, 10, 11]
    assert resolve_resume("last", tmp_path) == tmp_path / "step-11.ckpt"
    with pytest.raises(ValueError, match=r"last\.ckpt is not step-N\.ckpt"):
        step_of(tmp_path / "last.ckpt")


def test_what_ckpt_path_means(tmp_path: Path) -> None:
    other = tmp_path / "other.ckpt"
    other.touch()
    run = tmp_path / "run"
    assert resolve_resume(None, run) is None
    assert resolve_resume("last", run) is None  # nothing yet: a job that restarts itself begins anew
    assert resolve_resume(str(other), run) == other
    run.mkdir()
    (run / "best.ckpt").touch()
    for wrong in ("nowhere.ckpt", str(tmp_path), str(run / "best.ckpt")):
        with pytest.raises(UserError, match=f"ckpt_path={wrong} is not a file to resume from"):
            resolve_resume(wrong, run)


# --- writing


def test_the_newest_k_are_kept_and_load_without_unpickling(fit: Fit, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / "step-00000000.ckpt").mkdir(parents=True)  # an older one, of a sharded strategy
    _, stage = fit([ResumeCheckpoint(str(folder), every_n_steps=1, keep=2)], steps=4)
    assert names(folder) == ["step-00000003.ckpt", "step-00000004.ckpt"]

    state = torch.load(folder / "step-00000004.ckpt", weights_only=True)
    assert state["global_step"] == 4
    for name, value in stage.state_dict().items():
        assert torch.equal(state["state_dict"][name], value), name
    [optimizer] = state["optimizer_states"]
    assert {int(entry["step"]) for entry in optimizer["state"].values()} == {4}
    [schedule] = state["lr_schedulers"]
    assert schedule["last_epoch"] == 4
    assert state["DataModule"]["planner"]["number"] == 4
    [random_states] = [value for key, value in state["callbacks"].items() if "ResumeCheckpoint" in key]
    assert set(random_states) >= {"python", "numpy", "torch"}


def test_every_n_steps_and_at_the_end(fit: Fit, tmp_path: Path) -> None:
    fit([ResumeCheckpoint(str(tmp_path), every_n_steps=2, keep=9)], steps=3)
    assert names(tmp_path) == ["step-00000002.ckpt", "step-00000003.ckpt"]


def test_a_validation_of_the_same_step_comes_before_its_checkpoint(fit: Fit, tmp_path: Path) -> None:
    """Else a run that resumes from there would go on without it."""
    found: list[list[str]] = []
    seen = LambdaCallback(on_validation_end=lambda *_: found.append(names(tmp_path)))
    fit([seen, ResumeCheckpoint(str(tmp_path), every_n_steps=1, keep=9)], steps=4)  # validates after steps 2 and 4
    assert found == [["step-00000001.ckpt"], [f"step-0000000{step}.ckpt" for step in (1, 2, 3)]]
    assert len(names(tmp_path)) == 4


class FullDisk(TorchCheckpointIO):
    """Writes half of every checkpoint after the first, then fails."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        self.written += 1
        if self.written > 1:
            whole = Path(path).read_bytes()
            Path(path).write_bytes(whole[: len(whole) // 2])
            raise OSError(28, "No space left on device")


def test_a_file_that_was_being_written_is_never_taken_for_a_checkpoint(fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        fit([ResumeCheckpoint(str(tmp_path), every_n_steps=1, keep=1)], plugins=[FullDisk()])
    whole, half = tmp_path / "step-00000001.ckpt", tmp_path / ".step-00000002.ckpt.tmp"
    assert half.exists()
    assert resolve_resume("last", tmp_path) == whole  # the older one is pruned only when the newer one is whole
    assert torch.load(whole, weights_only=True)["global_step"] == 1


def test_a_step_that_is_reached_again_replaces_its_checkpoint(fit: Fit, tmp_path: Path) -> None:
    (tmp_path / "step-00000001.ckpt").write_bytes(b"of the run before")
    (tmp_path / ".step-00000001.ckpt.tmp").write_bytes(b"half of it")
    fit([ResumeCheckpoint(str(tmp_path))], steps=1)
    assert names(tmp_path) == ["step-00000001.ckpt"]
    assert torch.load(tmp_path / "step-00000001.ckpt", weights_only=True)["global_step"] == 1


# --- random states


def numbers() -> list[float]:
    return [random.random(), random.gauss(0, 1), *np.random.rand(2), np.random.randn(), *torch.rand(2).tolist()]


def test_random_numbers_go_on_where_they_were(fit: Fit, tmp_path: Path) -> None:
    trainer, stage = fit([], steps=1)
    numbers()  # so that gauss and randn have a number in store, which is part of the state too
    path = tmp_path / "state.pt"
    torch.save(ResumeCheckpoint("unused").state_dict(), path)
    expected = numbers()

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    resumed = ResumeCheckpoint("unused")
    resumed.load_state_dict(torch.load(path, weights_only=True))
    assert numbers() != expected  # not before training starts: what set-up draws does not count
    resumed.on_train_start(trainer, stage)
    assert numbers() == expected
    resumed.on_train_start(trainer, stage)
    assert numbers() != expected  # once
