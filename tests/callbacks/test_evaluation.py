"""Scores during training are logged at the right steps, and the run does not change."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sphinx_pl.callbacks.checkpoint import ResumeCheckpoint
from sphinx_pl.callbacks.csv_logger import MetricsCSV
from sphinx_pl.callbacks.evaluation import Evaluation
from sphinx_pl.utils.errors import UserError
from tests.callbacks.test_predictions import Watch

Fit = Callable[..., Any]
Sources = dict[str, dict[str, Any]]


def rows(folder: Path) -> dict[int, dict[str, float]]:
    """Return step -> what was evaluated."""
    steps: dict[int, dict[str, float]] = {}
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            values = {key: float(value) for key, value in row.items() if key.startswith("eval/") and value}
            if values:
                steps.setdefault(int(row["step"]), {}).update(values)
    return steps


@pytest.fixture
def pope(tmp_path: Path) -> dict[str, Any]:
    folder = tmp_path / "pope"
    folder.mkdir()
    Image.new("RGB", (40, 30), (200, 0, 0)).save(folder / "a.png")
    entries = [
        {"question_id": i, "image": "a.png", "text": "Is there a dog in the image?", "label": label}
        for i, label in enumerate(["yes", "no"])
    ]
    (folder / "coco_pope_random.json").write_text("\n".join(map(json.dumps, entries)))
    return {"root": str(tmp_path), "pope_random": {"kind": "pope", "split": "random", "src": str(folder)}}


def test_scores_are_logged_and_the_run_does_not_change(
    fit: Fit, test_sources: Sources, pope: dict[str, Any], tmp_path: Path
) -> None:
    watched, plain = Watch(), Watch()
    callback = Evaluation(test_sources, ["pope*"], pope, limit=1, every_n_steps=2)
    fit([callback, watched], [MetricsCSV(str(tmp_path))])
    fit([plain])
    assert watched.losses == plain.losses
    assert watched.states == plain.states
    assert watched.modes == plain.modes
    scores = rows(tmp_path)
    assert set(scores) == {2, 4}
    tasks = {record.task for record in callback.records}
    assert {f"eval/{task}" for task in tasks} < scores[4].keys()
    assert all(0 <= value <= 1 for value in scores[4].values())
    main = [scores[4][f"eval/{task}"] for task in tasks] + [scores[4]["eval/pope_random/accuracy"]]
    assert scores[4]["eval/mean"] == pytest.approx(sum(main) / len(main))


def test_checkpoints_bring_an_evaluation_before_them(fit: Fit, test_sources: Sources, tmp_path: Path) -> None:
    evaluation = Evaluation(test_sources, limit=1, on_checkpoints=True)
    fit([evaluation, ResumeCheckpoint(str(tmp_path / "c"), every_n_steps=3)], [MetricsCSV(str(tmp_path))], steps=5)
    assert set(rows(tmp_path)) == {3, 5}  # with the checkpoint of step 3, and at the end
    quiet = Evaluation({"gone": {"kind": "instructions", "path": "gone.json"}})  # not even read
    (tmp_path / "metrics.csv").unlink()
    fit([quiet, ResumeCheckpoint(str(tmp_path / "d"), every_n_steps=3)], [MetricsCSV(str(tmp_path))], steps=4)
    assert not rows(tmp_path)


def test_mistakes_are_answered_before_training(test_sources: Sources) -> None:
    with pytest.raises(UserError, match="nothing to ask"):
        Evaluation(every_n_steps=1)
    with pytest.raises(UserError, match="limit=0"):
        Evaluation(test_sources, limit=0)
    with pytest.raises(UserError, match="no 'mne'"):
        Evaluation(on_checkpoints=True, benchmarks=["mne"], benchmark={"mme": {"kind": "mme", "src": "x"}})
