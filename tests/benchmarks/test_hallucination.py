from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from benchmarks import decoding, hallucination
from benchmarks.hallucination import KINDS, absent, chair, mentioned, pope
from sphinx_pl.checkpoints.native import write_checkpoint
from sphinx_pl.data.processor import Processor
from sphinx_pl.generation.generate import GenerationConfig
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx


def test_pope_worked_by_hand() -> None:
    found = pope(["yes", "Yes.", "no", "no", "maybe"], ["yes", "no", "yes", "no", "no"])
    assert (found.accuracy, found.precision, found.recall, found.f1) == (0.6, 0.5, 0.5, 0.5)
    assert (found.yes_ratio, found.unparsed) == (0.4, 1)
    assert pope(["no"], ["yes"]).f1 == 0


def test_chair_worked_by_hand() -> None:
    truth = ["It is a red 1.", "They are a blue circle and a green 2."]
    found = chair(["It is a red 1.", "They are a blue circle, a blue circle and a red star."], truth)
    # Named: red 1, blue circle, red star; there: red 1, blue circle, green 2.
    assert (found.objects, found.descriptions, found.recall) == (
        pytest.approx(1 / 3),
        pytest.approx(1 / 2),
        pytest.approx(2 / 3),
    )
    assert chair(["Nothing."], truth[:1]).objects == 0


def test_absent_objects_are_not_there_and_adversarial_ones_share_a_word() -> None:
    scene, rng = {"red circle", "blue 7"}, random.Random(0)
    assert mentioned("There are 2: a red circle and a blue 7.") == scene
    drawn = {kind: {absent(scene, kind, rng) for _ in range(200)} for kind in KINDS}
    assert not (drawn["random"] | drawn["adversarial"]) & scene
    words = {"red", "circle", "blue", "7"}
    assert all(words & set(phrase.split()) for phrase in drawn["adversarial"])
    assert not all(words & set(phrase.split()) for phrase in drawn["random"])


def test_questions_are_asked_of_a_checkpoint(
    tmp_path: Path,
    sample_data: Path,
    model_config: SphinxConfig,
    processor: Processor,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(hallucination, "WAYS", {"greedy": GenerationConfig(), "beams": GenerationConfig(num_beams=2)})
    data = tmp_path / "data"
    data.mkdir()
    (data / "instructions").mkdir()
    (data / "instructions" / "images").symlink_to(sample_data / "instructions" / "images")
    entries = json.loads((sample_data / "instructions" / "test.json").read_text())
    few = [[entry for entry in entries if entry["task"] == task][:3] for task in ("description", "short_vqa")]
    for split in ("train-scenes", "test"):
        (data / "instructions" / f"{split}.json").write_text(json.dumps([*few[0], *few[1]]))
    assert hallucination.main(["questions", f"--data={data}"]) == 0
    asked = json.loads((data / "instructions" / "test-yes_no.json").read_text())
    assert {entry["answer"] for entry in asked} == {"yes", "no"}
    torch.manual_seed(0)
    state = Sphinx(model_config).state_dict()
    write_checkpoint(tmp_path / "m", state, model_config.to_dict(), processor.to_dict(), processor.tokenizer.path, {})
    capsys.readouterr()
    assert hallucination.main(["ask", str(tmp_path / "m"), f"--data={data}", "--limit=4"]) == 0
    shown = capsys.readouterr().out
    assert "likelihood" in shown
    assert shown.count("beams") >= 2
    assert decoding.main([str(tmp_path / "m"), f"--data={data}", "--limit=1", "--repeats=1", "--ways", "greedy"]) == 0
    assert "tokens/s" in capsys.readouterr().out


def test_absent_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hallucination.main(["questions", f"--data={tmp_path}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_way_is_timed_with_random_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert decoding.main(["--batch=2", "--new=3", "--repeats=1"]) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row[1].strip() for row in rows] == ["greedy", "beam 5", "OPERA 5"]
    assert [row[3].strip() for row in rows] == ["6"] * 3
    assert rows[0][6].strip().startswith("1.0 ")
