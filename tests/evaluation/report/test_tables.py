"""Tables of benchmarks: runs beside each other, published numbers where they belong, categories, what is missing."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.schema import Record
from sphinx_pl.evaluation.benchmarks import BENCHMARKS, Questions, load
from sphinx_pl.evaluation.benchmarks.pope import POPEBenchmark
from sphinx_pl.evaluation.report.reference_results import ReferenceResult, read_reference_results
from sphinx_pl.evaluation.report.tables import EvaluationFiles, results
from sphinx_pl.utils.errors import UserError
from tests.evaluation.report.test_page import Page

GEOMETRY = Coordinates(decimals=2)


class Halves(POPEBenchmark):
    """POPE whose questions are of two categories."""

    def category(self, record: Record) -> str:
        return "even" if int(record.meta["question_id"]) % 2 == 0 else "odd <i>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [
        {"question_id": i, "image": "0.jpg", "text": "Is there a dog?", "label": "yes" if i < 2 else "no"}
        for i in range(4)
    ]
    (tmp_path / "coco_pope_random.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def evaluated(
    name: str, questions: Questions, answers: list[str], lost: dict[str, int] | None = None
) -> EvaluationFiles:
    pairs = zip(questions.records, answers, strict=True)
    predictions = [questions.benchmark.score_answer(record, answer, GEOMETRY) for record, answer in pairs]
    result = questions.result(predictions, lost or {})
    written = json.loads(json.dumps({"benchmarks": [result], "rows": []}))
    return EvaluationFiles(name, written, [prediction.to_dict() for prediction in predictions])


class Rows(Page):
    """The text of each cell of each row."""

    def __init__(self, html: str) -> None:
        self.rows: list[list[str]] = []
        super().__init__(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        super().handle_starttag(tag, attrs)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        super().handle_data(data)
        if self.open and "tr" in self.open:
            self.rows[-1][-1] += data


def rows_of(html: str) -> list[list[str]]:
    return Rows(html).rows


def cell(html: str, metric: str, column: int) -> str:
    return next(row[column] for row in rows_of(html) if len(row) > column and row[1] == metric)


def test_runs_stand_beside_each_other_with_published_numbers(folder: Path) -> None:
    questions = load("pope_random", POPEBenchmark(folder, "random"))
    good = evaluated("good", questions, ["yes", "yes", "no", "maybe"], {"image_missing": 2})
    bad = evaluated("<script>bad", questions, ["no", "no", "no", "no"])
    numbers = [
        ReferenceResult("pope", "Net", 88.5, "Paper, table 1", "random"),
        ReferenceResult("pope", "Net", 87.0, "Paper, table 1", "random", "f1"),
        ReferenceResult("pope", "Other", 50.0, "Paper, table 2"),
        ReferenceResult("pope", "Other", 77.7, "Paper, table 2", "all"),
        ReferenceResult("mme", "Third", 1.0, "Paper, table 3"),
    ]
    html = results([good, bad], numbers)
    assert Page(html).open == []
    head = rows_of(html)[0]
    assert head == ["benchmark", "metric", "good", "<script>bad", "Net", "Other"]  # Third has nothing of POPE
    assert "<script>" not in html
    assert cell(html, "accuracy", 2).startswith("75.0 ")
    assert cell(html, "accuracy", 2).endswith("4 asked, 1 unparsed, 2 lost")
    assert cell(html, "accuracy", 3).startswith("50.0 ")
    assert cell(html, "accuracy", 3).endswith("4 asked")
    assert (cell(html, "accuracy", 4), cell(html, "accuracy", 5)) == ("88.51", "502†")  # with the sources' marks
    assert (cell(html, "f1", 4), cell(html, "f1", 5)) == ("871", "")
    assert cell(html, "recall", 4) == ""
    assert cell(html, "precision", 3).startswith("– ")  # nothing was called yes
    assert "The source does not name the split" in html
    above, others = html.split("Published numbers of other splits")
    assert "pope all, Other: 77.7" in others
    assert "77.7" not in above
    alone = results([good], [])
    assert rows_of(alone)[0] == ["benchmark", "metric", "this model"]
    assert "copied from" not in alone


def test_categories_are_folded(folder: Path) -> None:
    html = results([evaluated("run", load("pope_random", Halves(folder, "random")), ["yes", "no", "no", "no"])], [])
    folded = html[html.index("<details>") : html.index("</details>") + len("</details>")]
    values = {row[0]: row[2].split()[0] for row in rows_of(folded)[1:]}
    assert values == {"even": "100.0", "odd <i>": "50.0"}
    assert "odd <i>" not in folded


def test_what_is_scored_elsewhere_is_said(folder: Path) -> None:
    evaluation = evaluated("run", load("pope_random", POPEBenchmark(folder, "random")), ["yes"] * 4)
    evaluation.results["benchmarks"][0] |= {"values": [], "family": "unheard of"}
    html = results([evaluation], [ReferenceResult("pope", "Net", 88.5, "Paper", "random")])
    assert rows_of(html)[1][1:] == ["scored elsewhere", "4 asked"]
    assert "<h3>unheard of</h3>" in html


def test_nothing_is_nothing() -> None:
    assert results([], []) == ""
    assert results([EvaluationFiles("old", {}, [])], []) == ""


def test_the_published_numbers() -> None:
    numbers = read_reference_results()
    keys = [(number.benchmark, number.split, number.metric, number.model) for number in numbers]
    assert len(set(keys)) == len(keys) > 0
    assert all("table" in number.source for number in numbers)
    for number in numbers:  # one that fits nothing would never be seen
        kind = BENCHMARKS[number.benchmark]
        assert fnmatch.filter(kind.splits, number.split or "*") or number.split == "all"
        metrics = {metric.name for split in kind.splits for metric in kind(None, split).metrics}
        assert number.metric is None or number.metric in metrics


MLLM = "pope mme/perception mme/cognition mmbench seed_bench llava_bench mm_vet ccbench mathvista"
REC = "refcoco+/val refcoco+/testA refcoco+/testB refcoco/val refcoco/testA refcoco/testB refcocog/val refcocog/test"


@pytest.mark.parametrize(
    ("table", "model", "columns", "row"),
    [
        ("table 1", "SPHINX-MoE", MLLM, "89.6 1485.3 367.1 71.3 73.0 70.2 40.9 15.4 42.7"),
        ("table 2", "SPHINX-Tiny", "okvqa vqav2 vizwiz gqa scienceqa iconqa", "53.6 74.7 49.2 58.0 21.5 40.7"),
        ("table 4", "SPHINX-Plus-2k", "textvqa ocrvqa docvqa chartqa infographicvqa", "70.6 68.9 71.6 55.1 39.1"),
        ("table 5", "SPHINX-Intern2", REC, "76.80 84.86 69.01 86.08 89.70 81.78 83.99 83.40"),
    ],
)
def test_rows_of_sphinx_x_as_its_tables_print_them(table: str, model: str, columns: str, row: str) -> None:
    there = [number for number in read_reference_results() if number.model == model and number.source.endswith(table)]
    assert all("2402.05935v3" in number.source for number in there)
    parts = [number.metric or (number.split if "refcoco" in number.benchmark else None) for number in there]
    values = {"/".join(filter(None, (n.benchmark, part))): n.value for n, part in zip(there, parts, strict=True)}
    assert values == dict(zip(columns.split(), map(float, row.split()), strict=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1", "must be a list of entries"),
        ("- {benchmark: pope, model: x, value: 1}", "source"),
        ("- {benchmark: pope, model: x, value: 1, source: ' '}", "pope of x has no source"),
        ("- {benchmark: pope, model: x, value: high, source: y}", r"entry 1.*value"),
        ("- {", "cannot be read"),
    ],
)
def test_entries_that_do_not_fit(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "reference_results.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        read_reference_results(tmp_path / "reference_results.yaml")


def task_suite(name: str, **row: Any) -> EvaluationFiles:
    base = {"task": "rec", "domain": "", "topic": "", "metric": "iou", "score": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    base |= {"unparsed": 0, "baseline": 0.1, "baseline_kind": "constant", "above": True}
    rows = [base | row, base | row | {"topic": "<b>", "domain": "real"}]
    return EvaluationFiles(name, {"rows": rows}, [])


def test_the_task_suite_beside_another(folder: Path) -> None:
    html = results([task_suite("old"), task_suite("new", score=0.75, unparsed=3)], [])
    assert Page(html).open == []
    whole = next(row for row in rows_of(html) if row[0] == "rec")
    assert whole[:6] == ["rec", "0.500 0.40–0.60", "0.100 constant", "▲", "9", ""]
    assert whole[6:] == ["0.750 0.40–0.60", "0.100 constant", "▲", "9", "3", "iou"]
    folded = html[html.index("<details>") :]
    assert rows_of(folded)[1][:3] == ["rec", "<b>", "real"]
    assert "<td><b></td>" not in folded
