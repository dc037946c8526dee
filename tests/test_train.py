"""train.py as a user runs it: a killed run that continues exactly, and wrong input answered in one line."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from callbacks.checkpoint import checkpoints
from tests.conftest import REPOSITORY

# The sample model with every tower, one layer each: the same code in less time.
SMALL = [
    "model.decoder.layers=1",
    "model.vision.clip.layers=1",
    "model.vision.dinov2.layers=1",
    "model.vision.qformer.vision_layers=1",
    "data.packing.rows=2",
    "data.val_samples=8",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "logger.csv.flush_every_n_steps=1",
]


def command(folder: Path, data: Path, *overrides: str) -> list[str]:
    return [
        sys.executable,
        "train.py",
        "stage=pretrain_real",
        f"output_dir={folder}",
        f"data.root={data}",
        *SMALL,
        *overrides,
    ]


def run(*args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(
        command(*args),  # type: ignore[arg-type]
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def losses(folder: Path) -> dict[int, str]:
    """Step -> training loss as it was written: equal strings are equal bits."""
    with (folder / "pretrain_real" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    found = {int(row["step"]): row["train/loss"] for row in rows}
    assert len(found) == len(rows), "a step was logged twice"
    return found


def kill_when(process: subprocess.Popen[str], ready: Path, extra_seconds: float) -> None:
    """SIGKILL from outside, `extra_seconds` after the file `ready` has appeared."""
    deadline = time.monotonic() + 120
    while not ready.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(extra_seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()


def check_kill_and_resume(tmp_path: Path, data: Path, extra_seconds: list[float], steps: int) -> None:
    options = [f"stage.max_steps={steps}", "callbacks.checkpoint.every_n_steps=3", "data.workers=1"]
    # Windows of two micro-batches, and validations at every second checkpoint: both have gone wrong on the way.
    options += ["stage.accumulate=2", "data.packing.rows=1", "data.packing.row_length=256", "stage.val_every=6"]
    straight = run(tmp_path / "straight", data, *options)
    assert straight.returncode == 0, straight.stderr
    folder = tmp_path / "killed"
    ready = folder / "pretrain_real" / "checkpoints" / f"step-{3:08d}"
    for number, seconds in enumerate(extra_seconds):
        process = subprocess.Popen(
            command(folder, data, *options, "ckpt_path=last"),
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if number:  # an older checkpoint is there already
            ready = folder / "pretrain_real" / "environment.json"
        kill_when(process, ready, seconds)
        assert checkpoints(folder / "pretrain_real" / "checkpoints"), "no complete checkpoint survived the kill"
    assert not (folder / "pretrain_real" / "model").exists(), "killed too late to test anything"
    resumed = run(folder, data, *options, "ckpt_path=last")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(folder) == losses(tmp_path / "straight")
    assert len(losses(folder)) == steps


def test_a_killed_run_continues_with_the_same_losses(tmp_path: Path, sample_data: Path) -> None:
    check_kill_and_resume(tmp_path, sample_data, [0.3], steps=40)


@pytest.mark.long
def test_a_run_that_is_killed_again_and_again_continues_with_the_same_losses(tmp_path: Path, sample_data: Path) -> None:
    check_kill_and_resume(tmp_path, sample_data, [0.1, 9.0, 12.5, 9.7, 11.0], steps=300)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, sample_data: Path) -> None:
    assert run(tmp_path, sample_data, "stage.max_steps=2").returncode == 0
    again = run(tmp_path, sample_data, "stage.max_steps=2")
    assert again.returncode == 2
    assert again.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "ckpt_path=last" in again.stderr
    assert run(tmp_path, sample_data, "stage.max_steps=3", "overwrite=true").returncode == 0


@pytest.mark.parametrize("preset", ["one_batch", "overfit", "profiler"])
def test_debug_presets_run(preset: str, tmp_path: Path, sample_data: Path) -> None:
    steps = ["stage.max_steps=3"] if preset == "overfit" else []
    done = run(tmp_path, sample_data, f"debug={preset}", *steps)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / f"pretrain_real-{preset}"
    assert (folder / "model" / "config.json").is_file()
    assert list(folder.glob("*profile*")) or preset != "profiler"


def test_a_sweep_runs_each_point_in_a_folder_of_its_own(tmp_path: Path, sample_data: Path) -> None:
    # As a user would: without output_dir, which other tests give.
    script = [sys.executable, str(REPOSITORY / "train.py"), "-m", "stage=pretrain_real", f"data.root={sample_data}"]
    done = subprocess.run(
        [*script, *SMALL, "stage.max_steps=1", "stage.optim.lr=1e-4,3e-4"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    folders = sorted((tmp_path / "outputs" / "demo" / "sweeps" / "pretrain_real").glob("[01]"))
    assert len(folders) == 2
    assert all((folder / "model" / "config.json").is_file() for folder in folders)


WRONG = {
    "an unknown key": (["stage.optim.learning_rate=1"], "learning_rate"),
    "an unknown option": (["stage=pretrian"], "pretrian"),
    "heads that do not divide": (["model.decoder.heads=7"], "model.decoder.heads=7"),
    "a missing file": (["data.sources.real.path=nowhere.tar"], "nowhere.tar"),
    "a missing checkpoint": (["stage.init_from=nowhere"], "nowhere"),
    "a part that does not exist": (["stage.train_parts=[decodr]"], "decoder"),
    "a rate of a part that does not exist": (["+stage.optim.lr_scale.clpi=0.5"], "clip"),
    "no text in pretraining": (["data.sources.text=null"], "text"),
    "a missing resume file": (["ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
    "a folder to resume from": (["ckpt_path=conf", "overwrite=true"], "stage.init_from"),
    "nothing to train": (["stage.train_parts=[]"], "train_parts is empty"),
    "a kind of source that does not exist": (["data.sources.real.kind=image_txt"], "image_text"),
    "no heads": (["model.vision.clip.heads=0"], "model.vision.clip.heads must be positive"),
    "no decimals": (["data.processor.decimals=0"], "data.processor.decimals=0"),
    "a wrong type": (["model.decoder.layers=two"], "model.decoder.layers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_answered_in_one_line(
    case: str, tmp_path: Path, sample_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hydra.core.global_hydra import GlobalHydra

    import train

    overrides, needle = WRONG[case]
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", [*command(tmp_path, sample_data, "stage.max_steps=1")[1:], *overrides])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ")
    assert needle in error[-1]
    assert not any("Traceback" in line for line in error)


@pytest.mark.long
@pytest.mark.timeout(500)
def test_a_sweep_whose_points_need_two_processes_is_swept_once(tmp_path: Path, sample_data: Path) -> None:
    """Lightning starts the second process with the command line of the first: with `-m` it would sweep as well."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    options = ["stage.max_steps=2", "stage.optim.lr=1e-4,3e-4", "trainer.devices=2"]
    done = subprocess.run(
        [*command(tmp_path, sample_data, *options), "-m"],
        cwd=REPOSITORY,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["sweeps"]
    folders = sorted((tmp_path / "sweeps" / "pretrain_real").glob("[0-9]*"))
    assert [folder.name for folder in folders] == ["0", "1"]
    for folder, rate in zip(folders, ("0.0001", "0.0003"), strict=True):
        assert (folder / "model" / "config.json").is_file()
        assert [path.name for path in folder.glob("*.log")] == ["train.log"]
        begun = [line for line in (folder / "train.log").read_text().splitlines() if f"in {folder}" in line]
        assert len(begun) == 1
        assert f"pretrain_real, point stage.optim.lr={rate} in" in begun[0]
        (folder / "pretrain_real").symlink_to(folder)  # where `losses` looks
        assert len(losses(folder)) == 2
