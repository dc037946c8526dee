from __future__ import annotations

import base64
import io
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from markupsafe import escape
from PIL import Image, ImageColor

from sphinx_pl.callbacks.predictions import Predictions
from sphinx_pl.data.drawing import TRUE
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.html import mark_unseen

Fit = Callable[..., Any]
Sources = dict[str, dict[str, Any]]


class Watch(L.Callback):
    """Records losses, and what a validation must not change: random states and modes of modules."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.states: list[tuple[Any, ...]] = []
        self.modes: list[list[bool]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.states.append((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))
        self.modes.append([module.training for module in pl_module.modules()])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def test_answers_are_written_and_the_run_does_not_notice(fit: Fit, test_sources: Sources, tmp_path: Path) -> None:
    watched, plain = Watch(), Watch()
    parts = ["decoder", "projections", "convnext"]
    fit([Predictions(test_sources, str(tmp_path), per_task=2), watched], train_parts=parts)
    fit([plain], train_parts=parts)
    assert watched.losses == plain.losses
    assert watched.states == plain.states
    assert watched.modes == plain.modes
    # frozen encoders in eval mode, the rest training
    assert {len(set(modes)) for modes in plain.modes} == {2}

    files = [f"step-{step}.{kind}" for step in (2, 4) for kind in ("html", "jsonl")]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    lines = [json.loads(line) for line in (tmp_path / "step-4.jsonl").read_text().splitlines()]
    questions = json.loads(Path(test_sources["tasks"]["path"]).read_text())
    by_key = {f"tasks/val.json:{number}:{entry['id']}": entry for number, entry in enumerate(questions)}
    first = Counter(entry.get("task", "chat") for entry in questions)
    counts = Counter(line["task"] for line in lines)
    assert all(count == min(2, first[task]) for task, count in counts.items())
    assert {"short_vqa", "rec", "ocr", "pose"} <= set(counts)
    for line in lines:
        assert line["step"] == 4
        assert 0 <= line["score"] <= 1
        if line["task"] == "short_vqa":
            assert line["answer"] == by_key[line["key"]]["answer"]
    vqa = [entry["id"] for entry in questions if entry.get("task") == "short_vqa"][:2]
    assert [line["key"].rpartition(":")[2] for line in lines if line["task"] == "short_vqa"] == vqa


def test_every_second_validation(fit: Fit, test_sources: Sources, tmp_path: Path) -> None:
    fit([Predictions(test_sources, str(tmp_path), per_task=1, every=2)], steps=6)
    assert {path.stem for path in tmp_path.iterdir()} == {"step-4"}


def test_the_page_shows_every_question_with_its_places_drawn(fit: Fit, test_sources: Sources, tmp_path: Path) -> None:
    fit([Predictions(test_sources, str(tmp_path), per_task=1)], steps=2)
    lines = [json.loads(line) for line in (tmp_path / "step-2.jsonl").read_text().splitlines()]
    html = (tmp_path / "step-2.html").read_text()
    assert "<h1>finetune, step 2</h1>" in html
    tasks = re.findall(r'<article data-task="(\w+)".*?</article>', html, re.DOTALL)
    assert tasks == [line["task"] for line in lines]
    (rec,) = [line for line in lines if line["task"] == "rec"]
    assert escape(mark_unseen(rec["answer"])) in html
    assert escape(mark_unseen(rec["prediction"])) in html
    match = re.search(r'data-task="rec".*?src="data:image/png;base64,([^"]*)"', html, re.DOTALL)
    assert match is not None
    picture = Image.open(io.BytesIO(base64.b64decode(match[1]))).convert("RGB")
    colours = {colour for _, colour in picture.getcolors(1 << 20) or []}
    assert ImageColor.getrgb(TRUE) in colours  # the true box of the phrase


def test_sources_without_a_scored_task_are_refused(fit: Fit, sample_data: Path, tmp_path: Path) -> None:
    text = {"text": {"kind": "text", "path": str(sample_data / "text/val.jsonl")}}
    with pytest.raises(UserError, match=r"callbacks\.predictions\.sources"):
        fit([Predictions(text, str(tmp_path))])
    with pytest.raises(UserError, match="every=0"):
        Predictions(text, str(tmp_path), every=0)
