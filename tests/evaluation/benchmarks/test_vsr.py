"""VSR: two splits, statements that are true or false, said in two ways."""

from __future__ import annotations

from pathlib import Path

import pytest

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.evaluation.benchmarks import BENCHMARKS, load
from sphinx_pl.evaluation.scorers.tasks import last_turn

from .vqa_files import STATEMENT, write


@pytest.mark.parametrize(("split", "folder"), [("test", "random"), ("zeroshot_test", "zeroshot")])
def test_statements(tmp_path: Path, split: str, folder: str) -> None:
    lines = [STATEMENT, STATEMENT | {"label": 0}, STATEMENT | {"label": 2}, STATEMENT | {"image_link": "x"}, "broken"]
    write(tmp_path, {f"{folder}/test.jsonl": lines})
    asked = load("vsr", BENCHMARKS["vsr"](tmp_path, split))
    assert asked.lost == {"label_unknown": 1, "image_link": 1, "entry_malformed": 1}
    assert last_turn(asked.records[0], Coordinates()).question == (
        'Is the following statement "The cat is under the bed." true or false?'
    )
    assert asked.records[0].images[0].path == str(tmp_path / "train2017/1.jpg")
    for answer, scores in {
        "True": [(1, True), (0, True)],
        "yes, it is": [(1, True), (0, True)],
        "False.": [(0, True), (1, True)],
        "no": [(0, True), (1, True)],
        "The statement is true": [(0, False), (0, False)],
    }.items():
        judged = [asked.benchmark.score_answer(record, answer, Coordinates()) for record in asked.records]
        assert [(p.score, p.parsed) for p in judged] == scores


def test_a_unified_answer_must_be_true_or_false(tmp_path: Path) -> None:
    entry = {"image_path": "a.jpg", "question": "Is it?", "gt_answers": "false"}
    write(tmp_path, {"a.json": [entry, entry | {"gt_answers": "maybe"}]})
    asked = load("vsr", BENCHMARKS["vsr"](tmp_path / "a.json"))
    assert asked.lost == {"label_unknown": 1}
    assert asked.benchmark.score_answer(asked.records[0], "False", Coordinates()).score == 1.0
