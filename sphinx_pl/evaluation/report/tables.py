"""The numbers of evaluations as tables: one for each family of benchmarks, one for the task suite.

Evaluations stand beside each other, and beside them the published results of other models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sphinx_pl.evaluation.benchmarks import FAMILIES
from sphinx_pl.evaluation.metrics import number_text
from sphinx_pl.evaluation.report.charts import interval_bar
from sphinx_pl.evaluation.report.reference_results import ReferenceResult
from sphinx_pl.evaluation.report.render import render


@dataclass(frozen=True)
class EvaluationFiles:
    """An evaluation's results and predictions, as evaluate.py wrote them."""

    name: str
    results: dict[str, Any]
    predictions: list[dict[str, Any]]

    @property
    def benchmarks(self) -> list[dict[str, Any]]:
        return self.results.get("benchmarks") or []

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of the task suite."""
        return self.results.get("rows") or []


def results(evaluations: Sequence[EvaluationFiles], references: Sequence[ReferenceResult]) -> Markup:
    """The section of results as HTML; "" where there are none."""
    families = [_family(family, evaluations, references) for family in _families(evaluations)]
    with_tasks = [evaluation for evaluation in evaluations if evaluation.rows]
    if not families and not with_tasks:
        return Markup()
    checkpoints = [(e.name, "/".join(Path(str(e.results.get("checkpoint", ""))).parts[-2:])) for e in evaluations]
    suite = _suite(with_tasks) if with_tasks else None
    definitions = sorted(_definitions(evaluations).items())
    return render("tables.html", checkpoints=checkpoints, families=families, suite=suite, definitions=definitions)


def _families(evaluations: Iterable[EvaluationFiles]) -> list[str]:
    families = list(FAMILIES)
    present = {str(result["family"]) for evaluation in evaluations for result in evaluation.benchmarks}
    return [*(family for family in families if family in present), *sorted(present.difference(families))]


# --- benchmarks

Key = tuple[str, str, str]
"""A benchmark's kind, split and name: the same in all evaluations that asked it."""


def _family(
    family: str, evaluations: Sequence[EvaluationFiles], references: Sequence[ReferenceResult]
) -> dict[str, Any]:
    """The table of a family, as its template takes it."""
    by_benchmark: dict[Key, dict[int, dict[str, Any]]] = {}  # results by the evaluation's place
    for place, evaluation in enumerate(evaluations):
        for result in evaluation.benchmarks:
            if result["family"] == family:
                key = str(result["kind"]), str(result["split"]), str(result["name"])
                by_benchmark.setdefault(key, {})[place] = result
    columns = [place for place in range(len(evaluations)) if any(place in each for each in by_benchmark.values())]
    kinds = {kind for kind, _, _ in by_benchmark}
    lines = {
        (kind, split, value["measure"], line == 0)
        for (kind, split, _), each in by_benchmark.items()
        for line, value in enumerate(v for v in next(iter(each.values()))["values"] if not v["category"])
    }
    beside = _Beside([number for number in references if number.benchmark in kinds], lines)
    rows: list[dict[str, Any]] = []
    categories: list[dict[str, Any]] = []
    for (kind, split, _), each in by_benchmark.items():
        first = next(iter(each.values()))
        whole = [value["measure"] for value in first["values"] if not value["category"]]
        for line, metric in enumerate(whole or [""]):
            cells = [_value(each.get(place), metric, counts=not line) for place in columns]
            label = None if line else (str(first["title"]), split)
            numbers = beside.cells((kind, split, metric, not line))
            rows.append({"label": label, "metric": metric, "cells": cells, "references": numbers})
        named = [(evaluations[place].name, each.get(place)) for place in columns]
        if folded := _categories(f"{first['title']} {split}", named):
            categories.append(folded)
    names = [evaluations[place].name if len(evaluations) > 1 else "this model" for place in columns]
    return {
        "title": FAMILIES.get(family, family),
        "head": ["benchmark", "metric", *names, *beside.models],
        "numbers": range(2 + len(columns), 2 + len(columns) + len(beside.models)),
        "rows": rows,
        "beside": beside,
        "categories": categories,
    }


def _value(result: Mapping[str, Any] | None, metric: str, counts: bool, category: str = "") -> dict[str, str] | None:
    """A run's cell: the value with its interval, and the number of questions that it is of."""
    if result is None:
        return None
    cell = {"value": "", "interval": "", "counts": ""}
    value = next((v for v in result["values"] if (v["measure"], v["category"]) == (metric, category)), None)
    if value is not None:
        ends = [number_text(value[end], value["percent"]) for end in ("low", "high") if value[end] is not None]
        cell |= {"value": number_text(value["value"], value["percent"]), "interval": "–".join(ends)}
    if counts:
        lost = sum((result.get("lost") or {}).values())
        parts = [f"{result['n']:,} asked", f"{result['unparsed']:,} unparsed" if result["unparsed"] else ""]
        parts.append(f"{lost:,} lost" if lost else "")
        cell["counts"] = ", ".join(part for part in parts if part)
    return cell


def _categories(title: str, named: Sequence[tuple[str, Mapping[str, Any] | None]]) -> dict[str, Any] | None:
    """The folded table of a benchmark's parts; None where it has none."""
    values = [value for _, result in named if result for value in result["values"] if value["category"]]
    keys = list(dict.fromkeys((str(value["category"]), str(value["measure"])) for value in values))
    if not keys:
        return None
    rows = []
    last = None
    for category, metric in keys:
        cells = [_value(result, metric, False, category) for _, result in named]
        rows.append({"category": category if category != last else "", "metric": metric, "cells": cells})
        last = category
    names = [name if len(named) > 1 else "this model" for name, _ in named]
    return {"title": title, "head": ["category", "metric", *names], "rows": rows}


Line = tuple[str, str, str, bool]
"""A line of a table: a benchmark's kind, split and metric, and whether that is its main one."""


class _Beside:
    """The published results of one table's benchmarks: a column for each model, notes with their
    sources.

    Args:
        numbers: the results of the benchmarks.
        lines: the table's lines. A result that fits none of them is only in the notes.
    """

    def __init__(self, numbers: Sequence[ReferenceResult], lines: Iterable[Line]) -> None:
        lines = list(lines)
        self.fitting = [number for number in numbers if any(_fits(number, line) for line in lines)]
        self.others = [number for number in numbers if number not in self.fitting]
        self.sources = list(dict.fromkeys(number.source for number in [*self.fitting, *self.others]))
        self.models = list(dict.fromkeys(number.model for number in self.fitting))

    @property
    def names_splits(self) -> bool:
        """Whether every source names the split of its number."""
        return all(number.names_split for number in self.fitting)

    def cells(self, line: Line) -> list[ReferenceResult | None]:
        """The results of a line, None where there is none."""
        cells: dict[str, ReferenceResult | None] = dict.fromkeys(self.models)
        cells |= {number.model: number for number in self.fitting if _fits(number, line)}
        return list(cells.values())

    def mark(self, number: ReferenceResult) -> str:
        """The number of its source, with a dagger where that does not name the split."""
        return f"{self.sources.index(number.source) + 1}{'' if number.names_split else '†'}"


def _fits(number: ReferenceResult, line: Line) -> bool:
    """Whether a result belongs to a line. No split fits any; no metric fits the main one."""
    kind, split, metric, main = line
    same = number.benchmark == kind and fnmatchcase(split, number.split or "*")
    return same and (number.metric == metric or (number.metric is None and main))


# --- the task suite


def _suite(evaluations: Sequence[EvaluationFiles]) -> dict[str, Any]:
    """The tables of the task suite, as their template takes them."""
    keys = list(dict.fromkeys(_row_key(row) for evaluation in evaluations for row in evaluation.rows))
    by_key = [{_row_key(row): row for row in evaluation.rows} for evaluation in evaluations]
    several = len(evaluations) > 1
    metrics = {row["task"]: str(row["metric"]) for rows in by_key for row in rows.values()}
    tops: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for task, topic, domain in keys:
        cells = [_score(rows.get((task, topic, domain)), bar=not several) for rows in by_key]
        row = {"task": task, "topic": topic, "domain": domain, "cells": cells, "metric": metrics[task]}
        (parts if topic or domain else tops).append(row)
    head: list[str] = []
    for evaluation in evaluations:
        score = f"{evaluation.name}: score" if several else "score"
        head += [*([] if several else ["0 … 1"]), score, "baseline", "", "n", "unparsed"]
    plain = [place for place, name in enumerate(head) if name not in ("0 … 1", "")]
    numbers, part_numbers = ([place + shift for place in plain] for shift in (1, 3))
    return {
        "several": several,
        "head": head,
        "numbers": numbers,
        "part_numbers": part_numbers,
        "tops": tops,
        "parts": parts,
    }


def _row_key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(row["task"]), str(row["topic"]), str(row["domain"])


def _score(row: Mapping[str, Any] | None, bar: bool) -> dict[str, Any]:
    """The cells of a row of the task suite; without `row` they are blank."""
    if row is None:
        return {"row": None, "bar": "" if bar else None}
    picture = interval_bar(row["score"], row["low"], row["high"], row["baseline"]) if bar else None
    return {"row": row, "bar": picture}


def _definitions(evaluations: Sequence[EvaluationFiles]) -> dict[str, str]:
    """The definition of each metric by its name."""
    terms: dict[str, str] = {}
    for evaluation in evaluations:
        for result in evaluation.benchmarks:
            for name, text in (result.get("descriptions") or {}).items():
                terms[f"{result['title']}: {name}"] = str(text)
        terms |= {name: str(text) for name, text in (evaluation.results.get("metrics") or {}).items()}
    return terms
