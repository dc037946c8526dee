"""OCR-VQA: the test split by its number, one question of a book each."""

from __future__ import annotations

from pathlib import Path

import pytest

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.evaluation.benchmarks import BENCHMARKS, load

from .vqa_files import BOOK, write


@pytest.mark.parametrize(("split", "book"), [("test", "3"), ("val", "2")])
def test_a_split_is_a_number(tmp_path: Path, split: str, book: str) -> None:
    write(tmp_path, {"dataset.json": {str(number): BOOK | {"split": number} for number in (1, 2, 3)}})
    asked = load("ocrvqa", BENCHMARKS["ocrvqa"](tmp_path, split))
    assert [record.key for record in asked.records] == [f"ocrvqa/{book}-1", f"ocrvqa/{book}-2"]
    assert asked.records[0].images[0].path == str(tmp_path / f"images/{book}.jpg")
    assert asked.lost == {"answer_empty": 1}
    answers = ("No", "mom's family  wall calendar 2016.")
    scores = [
        asked.benchmark.score_answer(r, a, Coordinates()).score for r, a in zip(asked.records, answers, strict=True)
    ]
    assert scores == [0.0, 1.0]
