"""What a mixture's table expects is what its streams give."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.inspect.table import expectations, lines, missing, reasons
from sphinx_pl.data.processor import Processor
from tests.fuzzing import encoded, picture, write_tar


@pytest.fixture
def datamodule(processor: Processor, sample_data: Path) -> DataModule:
    sources: dict[str, Any] = {
        "real": {"kind": "image_text", "path": str(sample_data / "real/train-*.tar"), "weight": 3},
        "tasks": {
            "kind": "instructions",
            "path": str(sample_data / "instructions/train-scenes.json"),
            "questions_per_sample": 4,
        },
        "text": {"kind": "text", "path": str(sample_data / "text/train.jsonl")},
    }
    return DataModule(processor, sources, {}, {"row_length": 256, "micro_batch_rows": 4})


def test_expectations_come_from_real_draws(datamodule: DataModule) -> None:
    values = {line.name: line for line in lines(datamodule, probe=40)}
    assert {name: line.share for name, line in values.items()} == pytest.approx(
        {"real": 0.6, "tasks": 0.2, "text": 0.2}
    )
    real, tasks, text = values.values()
    streams = datamodule.planner().mixture.streams
    assert [line.records for line in values.values()] == [len(stream.source) for stream in streams.values()]
    assert all(line.certain for line in values.values())
    assert (real.images, text.images) == (1.0, 0.0)
    assert real.tokens > datamodule.processor.tokens_per_image
    assert 1 < tasks.records_drawn <= 4
    assert tasks.draws == tasks.records / tasks.records_drawn
    assert (real.unusable, real.targets < real.tokens) == (0.0, True)


def test_the_table_says_how_often_a_source_is_read(datamodule: DataModule) -> None:
    result = lines(datamodule, probe=40)
    buffer = io.StringIO()
    Console(file=buffer, width=200).print(expectations(result, "sample", 256, 4, steps=1000))
    text = buffer.getvalue()
    mean = sum(line.share * line.tokens for line in result)
    expected = 1000 * 4 * 256 / mean * 0.6 / result[0].draws
    row = next(line for line in text.splitlines() if "real" in line)
    assert float(row.split("│")[-2]) == pytest.approx(expected, rel=0.01)
    assert "60.0%" in row


def test_missing_files_are_found_without_reading_anything(datamodule: DataModule, tmp_path: Path) -> None:
    from sphinx_pl.data.sampling.config import Group

    sources = datamodule.sources | {"late": {"kind": "text", "path": str(tmp_path / "nowhere.jsonl")}}
    configs = dict(Group.from_dict({"sources": sources}).leaves())
    absent = missing(configs)
    assert list(absent) == ["late"]
    assert "nowhere.jsonl" in absent["late"]


def test_shares_are_those_that_training_has(datamodule: DataModule) -> None:
    datamodule.mixing.temperature = 1.0
    values = {line.name: line.share for line in lines(datamodule, probe=4)}
    assert values == datamodule.planner().mixture.shares
    assert values["real"] != pytest.approx(0.6)


def test_the_table_says_what_was_left_out_and_what_happened_to_the_rest(processor: Processor, tmp_path: Path) -> None:
    def say(question: str, answer: str) -> dict[str, object]:
        return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}

    entries = [say("Hi", "a\n### b"), say("<image>", "red"), say("Hi", "red") | {"img": "a.jpg"}, say("Hi", "red")]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    sources = {"a": {"kind": "instructions", "path": str(tmp_path / "a.json"), "epochs": 1, "modality": "text"}}
    [line] = lines(DataModule(processor, sources, {}, {"row_length": 256, "micro_batch_rows": 1}))
    assert {key: number for key, (number, _) in line.why.items()} == {
        "escaped": 1,
        "skipped/image_absent": 1,
        "skipped/key_unknown": 1,
    }
    assert line.unusable == 0.5
    assert "a  skipped/key_unknown: 1  (" in reasons([line])


def test_images_that_cannot_be_decoded_and_what_could_not_be_indexed_are_unusable(
    processor: Processor, tmp_path: Path
) -> None:
    entries = [{"image": "no.png", "question": "what?", "answer": "red"}, {"question": "why?", "answer": "so"}] * 8
    (tmp_path / "x.json").write_text(json.dumps(entries))
    pairs = [(f"{i}.jpg", encoded(picture(), "JPEG")) for i in range(10)] + [(f"{i}.txt", b"a") for i in range(5)]
    sources = {
        "chat": {"kind": "instructions", "path": str(tmp_path / "x.json")},
        "web": {"kind": "image_text", "path": str(write_tar(tmp_path / "a.tar", pairs))},
    }
    result = lines(DataModule(processor, sources, {}, {"row_length": 256, "micro_batch_rows": 4}), probe=16)
    assert [line.unusable for line in result] == [0.5, 0.5]
    assert f"chat  skipped/image_missing: 8  ('{tmp_path}/no.png': No such file" in reasons(result)
    assert "web  skipped/caption_absent: 5  (5: no .txt" in reasons(result)
