"""Benchmarks whose files the tests write, asked without a model: a function says what is answered."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.readers.instruction_json import to_record
from sphinx_pl.data.schema import Record
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.evaluation.benchmarks import Benchmark, Questions, load
from sphinx_pl.evaluation.runner import Prediction

GEOMETRY = Coordinates(3)


@dataclass(frozen=True)
class Asked:
    """`values`: (metric, category) -> value."""

    questions: Questions
    predictions: list[Prediction]
    result: dict[str, Any]
    values: dict[tuple[str, str], float | None]


Say = Callable[[Record], str]
Ask = Callable[..., Asked]


@pytest.fixture
def ask() -> Ask:
    def ask(benchmark: Benchmark, say: Say, limit: int | None = None) -> Asked:
        questions = load("it", benchmark, limit)
        judged = [benchmark.score_answer(record, say(record), GEOMETRY, record.images) for record in questions.records]
        # As they are read back from the disk.
        predictions = [Prediction.from_dict(json.loads(json.dumps(one.to_dict()))) for one in judged]
        assert predictions == judged
        # And scored anew without the files.
        repeat = type(benchmark)(None, benchmark.split)
        kept = [to_record(one.record, one.key, Path(), one.task) for one in predictions]
        assert [
            repeat.score_answer(r, p.prediction, GEOMETRY, p.images) for r, p in zip(kept, judged, strict=True)
        ] == judged
        result = questions.result(predictions, {})
        json.dumps(result, allow_nan=False)
        return Asked(
            questions, predictions, result, {(v["measure"], v["category"]): v["value"] for v in result["values"]}
        )

    return ask


@pytest.fixture
def question() -> Say:
    """What a record is asked."""
    return lambda record: TASKS[record.task].turns(record, GEOMETRY)[-1].question


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes files below a folder: text and bytes as they are, the rest as JSON; returns the folder."""

    def write(files: dict[str, Any]) -> Path:
        src = tmp_path / "src"
        for place, content in files.items():
            path = src / place
            path.parent.mkdir(parents=True, exist_ok=True)
            data = content if isinstance(content, str | bytes) else json.dumps(content)
            path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return src

    return write
