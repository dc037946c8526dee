"""Evaluations compared question by question, from their files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.evaluation.benchmarks import Questions
from sphinx_pl.evaluation.benchmarks.pope import POPEBenchmark
from sphinx_pl.evaluation.compare import compare, main
from sphinx_pl.evaluation.metrics import mean
from sphinx_pl.evaluation.report.summary import summarise
from sphinx_pl.evaluation.rescore import rescore
from sphinx_pl.evaluation.results import read_predictions, read_results, write_predictions, write_results
from sphinx_pl.evaluation.runner import Prediction, score_answer
from sphinx_pl.utils.errors import UserError

GEOMETRY = Coordinates(decimals=2)


def vqa(right: int, total: int = 60) -> list[Prediction]:
    """The first `right` of `total` answers are right: whoever has more of them has the others', too."""
    records = [
        Record(f"tasks/{i}", "short_vqa", (ImageRef("a.png"),), ((9, 9),), question="How many?", answer=str(i))
        for i in range(total)
    ]
    return [score_answer(record, record.answer if i < right else "x", GEOMETRY) for i, record in enumerate(records)]


def pope(right: int, total: int = 40) -> list[Prediction]:
    benchmark = POPEBenchmark(None, "random")
    items = []
    for i in range(total):
        truth = "yes" if i % 2 else "no"
        record = Record(f"pope_random/{i}", "yes_no", (ImageRef("a.png"),), question="Is it?", answer=truth)
        answer = truth if i < right else {"yes": "no", "no": "yes"}[truth]
        items.append(benchmark.score_answer(record, answer, GEOMETRY))
    return items


def write(folder: Path, predictions: list[Prediction]) -> Path:
    folder.mkdir()
    tasks = [p for p in predictions if not p.benchmark]
    asked = [p for p in predictions if p.benchmark]
    result = Questions("pope_random", POPEBenchmark(None, "random"), (), {}).result(asked, {})
    write_predictions(folder, "predictions", predictions)
    constant = [dataclasses.replace(p, score=0.0, prediction="x") for p in tasks]
    write_predictions(folder, "constant", constant)
    rows = [row.to_dict() for row in summarise(tasks, {"constant": constant})]
    write_results(folder, {"decimals": 2, "image_size": 32, "rows": rows, "benchmarks": [result]})
    return folder


def test_what_is_real_and_what_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "a", vqa(30) + pope(20))
    better = write(tmp_path / "b", vqa(45) + pope(21))
    assert main([str(first), str(better), "--out", str(tmp_path / "c.json")]) == 0
    rows = json.loads((tmp_path / "c.json").read_text())["others"][str(better)]
    by = {(row["name"], row["measure"]): row for row in rows}
    assert by["short_vqa", "score"]["real"]
    assert by["short_vqa", "score"]["difference"]["value"] == pytest.approx(0.25)
    assert not by["pope_random", "accuracy"]["real"]
    assert by["pope_random", "accuracy"]["difference"]["value"] == pytest.approx(1 / 40)
    assert set(by) > {("pope_random", name) for name in ("precision", "recall", "f1", "yes")}
    assert "▲" in capsys.readouterr().out


def test_many_rows_can_be_real_together() -> None:
    """The bootstrap alone never gives less than 0.001, which Holm makes 0.06 of 60 rows."""
    metrics = {"pope_random": [dataclasses.replace(mean("accuracy", ""), name=str(i)) for i in range(60)]}
    rows = compare(pope(0), pope(40), metrics)
    assert len(rows) == 60
    assert all(row.real for row in rows)
    few = compare(pope(0, total=4), pope(4, total=4), {"pope_random": [mean("accuracy", "")]})
    assert few[0].p == pytest.approx(2 / 2**4)  # four signs alike


def test_what_is_scored_elsewhere_is_not_compared(tmp_path: Path) -> None:
    rows = compare(vqa(30) + pope(3), vqa(30) + pope(40), {"pope_random": ()})
    assert [row.name for row in rows] == ["short_vqa"]
    assert compare(pope(3), pope(40), {"pope_random": ()}) == []


def test_a_benchmark_that_is_called_as_a_task_stays_apart() -> None:
    renamed = [dataclasses.replace(p, key=p.key.replace("pope_random", "short_vqa")) for p in pope(10)]
    rows = compare(vqa(30) + renamed, vqa(45) + renamed, {"short_vqa": [mean("accuracy", "")]})
    assert {row.name: row.difference.units for row in rows} == {"short_vqa": 60, "short_vqa (benchmark)": 40}


def test_what_is_not_defined_is_not_tested_and_is_null_in_json() -> None:
    """Nobody who never says yes has a precision."""
    silent = [dataclasses.replace(p, prediction="no", score=float(p.answer == "no")) for p in pope(40)]
    rows = {
        row.metric: row for row in compare(silent, pope(40), {"pope_random": POPEBenchmark(None, "random").metrics})
    }
    assert json.loads(json.dumps(rows["precision"].to_dict(), allow_nan=False))["difference"]["value"] is None
    assert rows["precision"].to_dict()["p"] is None
    assert not rows["precision"].real
    assert rows["accuracy"].real


def test_answers_with_separators_of_lines_are_read_again(tmp_path: Path) -> None:
    answers = [dataclasses.replace(vqa(1, 1)[0], prediction="a\u2028b\x85c", question="?\u2029")]
    write_predictions(tmp_path, "predictions", answers)
    assert read_predictions(tmp_path) == answers


def test_only_what_both_were_asked_counts() -> None:
    fewer = vqa(30)[10:]
    (row,) = compare(vqa(30), fewer, {})
    assert row.left_out == 10
    assert row.difference.units == 50
    assert row.difference.value == 0
    with pytest.raises(UserError, match="no question in common"):
        compare(vqa(30)[:10], fewer, {})


def test_scored_anew_nothing_changes_and_a_changed_score_is_mended(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", vqa(30) + pope(20))
    before = read_results(folder), read_predictions(folder), read_predictions(folder, "constant")
    assert rescore(folder) == 0
    assert (read_results(folder), read_predictions(folder), read_predictions(folder, "constant")) == before
    spoilt = [dataclasses.replace(p, score=1.0) for p in before[1]]
    write_predictions(folder, "predictions", spoilt)
    assert rescore(folder) == 50
    assert read_results(folder) == before[0]


def test_mistakes_are_answered_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "a", vqa(3) + pope(2))
    assert main([str(folder)]) == 2
    assert main([str(folder), str(tmp_path / "gone")]) == 2
    assert "gone' has no results.json" in capsys.readouterr().err
    (folder / "predictions.jsonl").write_text("{oops")
    assert main([str(folder), str(folder)]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_names_stay_whole_in_eighty_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    folders = [str(write(tmp_path / name, vqa(right) + pope(right))) for name, right in (("a", 5), ("b", 35))]
    assert main(folders) == 0
    output = capsys.readouterr().out
    assert " pope_random " in output
    assert "precision" in output
