"""Runs and models that were written before keys and classes were renamed: they resume and load as they did then.

tests/golden/house has them; tests/golden/make_house.py says how they were made.
"""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.utils.renamed import with_new_keys
from tests.conftest import REPOSITORY
from tests.golden.make_house import DATA, MODEL, RUN
from tests.scripts import run_script

RENAMED = {
    "stage.rows_per_step": "stage.global_batch_rows",
    "data.packing.rows": "data.packing.micro_batch_rows",
    "data.mixing.lanes": "data.mixing.partitions",
    "branches:": "questions_per_sample:",
    **{f"model.vision.{kind}": f"model.vision.encoders.{kind}" for kind in ("clip", "convnext", "dinov2", "qformer")},
}
"""Keys that tests/golden/make_house.py writes -> the keys of today."""
GOLDEN = REPOSITORY / "tests" / "golden" / "house"


@pytest.fixture
def house(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN, tmp_path / "house")
    return tmp_path / "house"


def losses(file: Path) -> dict[int, float]:
    with file.open(newline="") as rows:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(rows) if row.get("train/loss")}


def test_a_run_of_then_resumes_as_if_it_had_never_stopped(house: Path) -> None:
    overrides = [*RUN, *MODEL, *DATA]
    for old, new in RENAMED.items():
        overrides = [override.replace(old, new) for override in overrides]
    command = [str(REPOSITORY / "train.py"), *overrides, "run=run", "ckpt_path=last"]
    result = run_script(command, cwd=house)
    assert result.returncode == 0, result.stderr
    assert "in the checkpoint and in this run" not in result.stdout + result.stderr
    straight, resumed = losses(house / "losses.csv"), losses(house / "run" / "metrics.csv")
    assert set(straight) == set(range(1, 9))
    assert resumed == pytest.approx(straight, rel=1e-5)


def test_a_model_of_then_loads(house: Path) -> None:
    checkpoint = open_checkpoint(house / "model")
    assert checkpoint.model_config.decoder.width == 8
    stage = checkpoint.provenance["config"]["stage"]
    assert with_new_keys({"stage": stage})["stage"]["global_batch_rows"] == 4
