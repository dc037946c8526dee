"""What train.py does with a run folder when its job restarts, and when the job is new."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from sphinx_pl.callbacks.checkpoint import checkpoints
from sphinx_pl.callbacks.wandb_logger import FILE, run_id
from sphinx_pl.cli import train
from sphinx_pl.cli.run_setup import steps_passed
from sphinx_pl.runtime import slurm
from sphinx_pl.runtime.run_folder import RunFolder
from sphinx_pl.utils.errors import UserError
from tests.test_conf import _fresh_hydra, composed  # noqa: F401  (a fixture)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a run of job 7 that has saved step 5 and has a W&B run."""
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000005").mkdir()
    slurm.mark(folder)
    run_id(folder)
    return folder


def start(folder: Path, monkeypatch: pytest.MonkeyPatch, job: str, restarts: int, *overrides: str) -> Path | None:
    """Return the checkpoint to resume from, as train.py finds it, and then prepare the folder."""
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    cfg: DictConfig = composed("train", *overrides, folder=str(folder))
    run = RunFolder(folder)
    train.enter(run)
    try:
        resume = train.checkpoint_to_resume(cfg, folder)
        OmegaConf.set_struct(cfg, False)
        del cfg["hydra"]
        train.prepare_run_folder(cfg, run, resume, steps_passed(cfg, run, resume, data_ended=False) > 0)
    finally:
        run.lock.release()
    return resume


def save(folder: Path, step: int) -> None:
    """Write a checkpoint, as a run does."""
    (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    RunFolder(folder).saved()


def test_a_requeued_job_continues_its_run_though_it_was_to_replace_another(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = run_id(folder)
    for overrides in ([], ["overwrite=true"], ["ckpt_path=/elsewhere/step-00000001"]):
        resume = start(folder, monkeypatch, "7", 1, *overrides)
        assert resume is not None
        assert resume.name == "step-00000005"
        assert resume.exists()
        assert run_id(folder) == identity


def test_a_job_requeued_before_it_began_runs_as_requested(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder holds another job's run, which must not be resumed by surprise."""
    with pytest.raises(UserError, match="already holds a run"):
        start(folder, monkeypatch, "8", 1)
    identity = run_id(folder)
    assert start(folder, monkeypatch, "8", 1, "overwrite=true") is None
    assert not checkpoints(folder / "checkpoints")
    assert run_id(folder) != identity
    assert (folder / "slurm_job").read_text() == "8\n"
    # The job stopped before its first checkpoint. It starts again, in the same W&B run.
    identity = run_id(folder)
    assert start(folder, monkeypatch, "8", 2, "overwrite=true") is None
    assert run_id(folder) == identity


def test_a_second_command_in_the_same_job_is_not_taken_for_the_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="already holds a run"):
        start(folder, monkeypatch, "7", 0)


def test_a_run_that_is_continued_by_hand_keeps_its_w_and_b_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = run_id(folder)
    assert start(folder, monkeypatch, "9", 0, "ckpt_path=last") is not None
    assert run_id(folder) == identity
    save(folder, 6)
    assert start(folder, monkeypatch, "9", 0, "overwrite=true") is None
    assert not (folder / FILE).exists()


@pytest.mark.parametrize(("steps", "kept"), [(9, [4, 5]), (5, [4, 5, 6])])
def test_rows_that_will_be_repeated_are_removed_and_those_of_a_finished_run_stay(
    steps: int, kept: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "metrics.csv").write_text("step,val/loss\n4,\n5,1.5\n6,\n")
    for name in ("model", "model-step-4", "model-step-8"):
        (folder / name).mkdir()
    start(folder, monkeypatch, "7", 1, f"stage.max_steps={steps}")
    rows = (folder / "metrics.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == kept
    assert (folder / "model").exists() == (steps == 5)
    assert (folder / "model-step-4").exists()
    # Files after the resumed checkpoint are replaced. A run that trains nothing replaces nothing.
    assert (folder / "model-step-8").exists() == (steps == 5)
