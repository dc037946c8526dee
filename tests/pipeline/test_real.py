"""The recipe on real pictures, text and weights, with very few steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sphinx_pl.data.real_pictures.packages import fetch
from sphinx_pl.utils.errors import UserError
from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def _packages() -> None:
    try:
        fetch({})
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("_packages")
def test_the_quick_recipe_of_real_pictures_ends_with_its_pages(tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = {"output_dir": out, "data_root": tmp_path / "data", "language_model": tmp_path / "lm"}
    arguments = [f"{key}={value}" for key, value in sizes.items()]
    command = [sys.executable, "-m", "sphinx_pl.cli.pipeline", "experiment=real_quick", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((out / "evaluation/results.json").read_text())
    asked = {(row["task"], row["domain"]) for row in results["rows"]}
    assert {("multiple_choice", "photographs"), ("multiple_choice", "clip art")} <= asked
    assert all(row["baselines"] for row in results["rows"] if row["task"] in ("caption", "yes_no"))
    assert "perplexity" in (out / "report.html").read_text()
    answers = [json.loads(line) for line in (out / "questions/5_finetune/predictions.jsonl").read_text().splitlines()]
    assert len(answers) == 10
    assert (out / "language.html").stat().st_size > 10_000
    assert (out / "mixed/curve.png").is_file()
