"""The recipe with real steps: trained, killed in the middle, gone on with, mixed, evaluated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sphinx_pl.checkpoint.format import open_checkpoint
from tests.conftest import REPOSITORY
from tests.pipeline.small import small_demo
from tests.pipeline.test_local import wait_for

pytestmark = pytest.mark.long


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sphinx_pl.pipeline", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*arguments: str) -> tuple[int, str]:
    process = start(*arguments)
    out, _ = process.communicate(timeout=900)
    return process.returncode, out


def test_the_recipe_killed_in_its_finetune_goes_on_from_the_checkpoint(tmp_path: Path, sample_data: Path) -> None:
    folder = tmp_path / "out"
    arguments = [*small_demo(folder, sample_data), "finetune:stage.max_steps=300"]
    arguments += ["finetune:callbacks.checkpoint.every_n_steps=3", "finetune:stage.val_every=0"]
    process = start(*arguments)
    try:
        for path in ("pretrain_real/model", "mixed/curve.json", "finetune/environment.json"):
            wait_for(folder / path, seconds=600)
        checkpoints = folder / "finetune" / "checkpoints"
        wait_for(checkpoints, seconds=300)
        while not any(path.name.startswith("step-") for path in checkpoints.iterdir()):
            assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert not (folder / "finetune" / "model").exists(), "killed too late to test anything"
    before = open_checkpoint(folder / "pretrain_real" / "model").identity()
    code, out = run(*arguments)
    assert code == 0, out
    assert "finetune (running before: goes on from what is there)" in out
    assert "resuming from" in out
    assert (folder / "report.html").is_file()
    assert "Results:" in out
    assert open_checkpoint(folder / "pretrain_real" / "model").identity() == before
    finetuned = open_checkpoint(folder / "finetune" / "model").provenance
    mixed = open_checkpoint(folder / "mixed")
    assert finetuned["parents"][0]["stage"] == mixed.identity()["stage"]
    assert finetuned["steps"] == 300
    assert run("status", f"output_dir={folder}", "name=demo")[0] == 0
