"""The numbers of evaluations as tables: one for each family of benchmarks, one for the task suite.

Evaluations stand beside each other, and beside them what others published of the same benchmark.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sphinx_pl.evaluation.benchmarks import FAMILIES
from sphinx_pl.evaluation.metrics import number_text
from sphinx_pl.evaluation.report.charts import interval_bar
from sphinx_pl.evaluation.report.reference_results import ReferenceResult
from sphinx_pl.utils.html import table, visible


@dataclass(frozen=True)
class Evaluation:
    """What evaluate.py wrote: its results and its predictions."""

    name: str
    results: dict[str, Any]
    predictions: list[dict[str, Any]]

    @property
    def benchmarks(self) -> list[dict[str, Any]]:
        return self.results.get("benchmarks") or []

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of the task suite."""
        return self.results.get("rows") or []


def results(evaluations: Sequence[Evaluation], published: Sequence[ReferenceResult]) -> str:
    """The section as HTML; "" where there is no result."""
    found = {family: _family(family, evaluations, published) for family in _families(evaluations)}
    blocks = [
        f"<h3>{visible(FAMILIES.get(family, family))}</h3>{content}" for family, content in found.items() if content
    ]
    if any(evaluation.rows for evaluation in evaluations):
        heading = "<h3>Task suite</h3>" if blocks or len(evaluations) > 1 else ""
        blocks.append(heading + _suite([evaluation for evaluation in evaluations if evaluation.rows]))
    if not blocks:
        return ""
    return _checkpoints(evaluations) + "".join(blocks) + _definitions(evaluations)


def _checkpoints(evaluations: Sequence[Evaluation]) -> str:
    def text(evaluation: Evaluation) -> str:
        checkpoint = visible("/".join(Path(str(evaluation.results.get("checkpoint", ""))).parts[-2:]))
        return f"<b>{visible(evaluation.name)}</b>: checkpoint {checkpoint}" if several else f"Checkpoint {checkpoint}"

    several = len(evaluations) > 1
    return f"<p class=note>{'; '.join(map(text, evaluations))}.</p>"


def _families(evaluations: Iterable[Evaluation]) -> list[str]:
    known = list(FAMILIES)
    there = {str(result["family"]) for evaluation in evaluations for result in evaluation.benchmarks}
    return [*(family for family in known if family in there), *sorted(there.difference(known))]


# --- benchmarks

Key = tuple[str, str, str]
"""A benchmark's kind, split and name: the same in all evaluations that asked it."""


def _family(family: str, evaluations: Sequence[Evaluation], published: Sequence[ReferenceResult]) -> str:
    asked: dict[Key, dict[int, dict[str, Any]]] = {}  # by the evaluation's place
    for place, evaluation in enumerate(evaluations):
        for result in evaluation.benchmarks:
            if result["family"] == family:
                key = str(result["kind"]), str(result["split"]), str(result["name"])
                asked.setdefault(key, {})[place] = result
    columns = [place for place in range(len(evaluations)) if any(place in results for results in asked.values())]
    about = {kind for kind, _, _ in asked}
    there = {
        (kind, split, value["measure"], line == 0)
        for (kind, split, _), results in asked.items()
        for line, value in enumerate(v for v in next(iter(results.values()))["values"] if not v["category"])
    }
    shown = _Beside([number for number in published if number.benchmark in about], there)
    rows: list[list[str]] = []
    folded = ""
    for (kind, split, _), results in asked.items():
        first = next(iter(results.values()))
        whole = [value for value in first["values"] if not value["category"]]
        for line, metric in enumerate([value["measure"] for value in whole] or [""]):
            cells = [_value(results.get(place), metric, counts=not line) for place in columns]
            label = f"<b>{visible(str(first['title']))}</b> <small>{visible(split)}</small>" if not line else ""
            beside = shown.cells((kind, split, metric, not line))
            rows.append([label, visible(metric) or "<small>scored elsewhere</small>", *cells, *beside])
        folded += _categories(f"{first['title']} {split}", [(evaluations[p].name, results.get(p)) for p in columns])
    names = [visible(evaluations[place].name) if len(evaluations) > 1 else "this model" for place in columns]
    head = ["benchmark", "metric", *names, *map(visible, shown.models)]
    return table(head, rows, set(range(2 + len(columns), len(head)))) + shown.notes() + folded


def _value(result: Mapping[str, Any] | None, metric: str, counts: bool, category: str = "") -> str:
    """A run's cell: the value with its interval, and beneath it how many questions it is of."""
    if result is None:
        return ""
    value = next((v for v in result["values"] if (v["measure"], v["category"]) == (metric, category)), None)
    text = ""
    if value is not None:
        ends = [number_text(value[end], value["percent"]) for end in ("low", "high") if value[end] is not None]
        interval = "–".join(ends)
        text = f"<b>{number_text(value['value'], value['percent'])}</b> <small>{interval}</small>"
    if counts:
        lost = sum((result.get("lost") or {}).values())
        parts = [f"{result['n']:,} asked", f"{result['unparsed']:,} unparsed" if result["unparsed"] else ""]
        parts.append(f"{lost:,} lost" if lost else "")
        text += f"<br><small>{', '.join(part for part in parts if part)}</small>"
    return text


def _categories(title: str, results: Sequence[tuple[str, Mapping[str, Any] | None]]) -> str:
    """The parts of a benchmark, folded; "" where there are none."""
    found = list(
        dict.fromkeys(
            (str(value["category"]), str(value["measure"]))
            for _, result in results
            if result
            for value in result["values"]
            if value["category"]
        )
    )
    if not found:
        return ""
    rows = []
    last = None
    for category, metric in found:
        cells = (_value(result, metric, False, category) for _, result in results)
        rows.append([visible(category) if category != last else "", visible(metric), *cells])
        last = category
    head = ["category", "metric", *(visible(name) if len(results) > 1 else "this model" for name, _ in results)]
    return f"<details><summary>{visible(title)} by category</summary>{table(head, rows, set())}</details>"


Line = tuple[str, str, str, bool]
"""Of a table: a benchmark's kind, split and metric, and whether that is its main one."""


class _Beside:
    """Published numbers of one table's benchmarks: a column for each model, notes with their
    sources.

    Args:
        numbers: of the benchmarks. lines: of the table; what fits none of them is only in the
            notes.
    """

    def __init__(self, numbers: Sequence[ReferenceResult], lines: Iterable[Line]) -> None:
        lines = list(lines)
        self._fitting = [number for number in numbers if any(_fits(number, line) for line in lines)]
        self._others = [number for number in numbers if number not in self._fitting]
        self._sources = list(dict.fromkeys(number.source for number in [*self._fitting, *self._others]))
        self.models = list(dict.fromkeys(number.model for number in self._fitting))

    def cells(self, line: Line) -> list[str]:
        """Of a line, blank where nothing was entered."""
        cells = dict.fromkeys(self.models, "")
        cells |= {number.model: self._cell(number) for number in self._fitting if _fits(number, line)}
        return list(cells.values())

    def _cell(self, number: ReferenceResult) -> str:
        mark = self._sources.index(number.source) + 1
        return f"{number.value:g}<sup>{mark}{'' if number.names_split else '†'}</sup>"

    def notes(self) -> str:
        """Where the numbers are from, and those that the table has no line for."""
        if not self._sources:
            return ""
        unnamed = " † The source does not name the split." if not all(n.names_split for n in self._fitting) else ""
        listed = "".join(f"<li>{visible(source)}</li>" for source in self._sources)
        sources = f"<p class=note>Published numbers are copied from:{unnamed}</p><ol class=sources>{listed}</ol>"
        if not self._others:
            return sources
        items = "".join(
            f"<li>{visible(' '.join(filter(None, (o.benchmark, o.split, o.metric))))}, {visible(o.model)}: "
            f"{self._cell(o)}</li>"
            for o in self._others
        )
        summary = "Published numbers of other splits or metrics of these benchmarks"
        others = f"<details><summary>{summary}</summary><ul class=sources>{items}</ul>"
        return f"{sources}{others}</details>" if self._fitting else f"{others}{sources}</details>"


def _fits(number: ReferenceResult, line: Line) -> bool:
    """A number that does not name its split fits any; one that does not name its metric is of the
    main one."""
    kind, split, metric, main = line
    same = number.benchmark == kind and fnmatchcase(split, number.split or "*")
    return same and (number.metric == metric or (number.metric is None and main))


# --- the task suite


def _suite(evaluations: Sequence[Evaluation]) -> str:
    keys = list(dict.fromkeys(_row_key(row) for evaluation in evaluations for row in evaluation.rows))
    found = [{_row_key(row): row for row in evaluation.rows} for evaluation in evaluations]
    several = len(evaluations) > 1
    tops, parts = [], []
    metrics = {row["task"]: str(row["metric"]) for rows in found for row in rows.values()}
    for task, topic, domain in keys:
        cells = [cell for rows in found for cell in _score(rows.get((task, topic, domain)), bar=not several)]
        if topic or domain:
            parts.append([visible(task), visible(topic) or "all", visible(domain) or "all", *cells])
        else:
            tops.append([f"<b>{visible(task)}</b>", *cells, f"<small>{visible(metrics[task])}</small>"])
    head: list[str] = []
    for evaluation in evaluations:
        score = f"{visible(evaluation.name)}: score" if several else "score"
        head += [*([] if several else ["0 … 1"]), score, "baseline", "", "n", "unparsed"]
    plain = {i for i, name in enumerate(head) if name not in ("0 … 1", "")}
    whole = table(["task", *head, "metric"], tops, {i + 1 for i in plain})
    if parts:
        inner = table(["task", "topic", "domain", *head], parts, {i + 3 for i in plain})
        whole += f"<details><summary>By topic and domain</summary>{inner}</details>"
    return (
        "<p>Scores on held-out data, 0 to 1, each with its 95 % bootstrap interval. The baseline is the better of the "
        "best constant answer fitted on training data and of the same model with shuffled images"
        + ("" if several else " (a tick in the bar)")
        + ". ▲ marks a score whose whole interval is above it.</p>"
        + whole
    )


def _row_key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(row["task"]), str(row["topic"]), str(row["domain"])


def _score(row: Mapping[str, Any] | None, bar: bool) -> list[str]:
    """The cells of a row of the task suite: (bar), score, baseline, mark, n, unparsed."""
    if row is None:
        return [""] * (6 if bar else 5)
    baseline = row["baseline"]
    mark = "" if baseline is None else ("▲" if row["above"] else "·")
    return [
        *([interval_bar(row["score"], row["low"], row["high"], baseline)] if bar else []),
        f"<b>{row['score']:.3f}</b> <small>{row['low']:.2f}–{row['high']:.2f}</small>",
        "–" if baseline is None else f"{baseline:.3f} <small>{visible(row['baseline_kind'])}</small>",
        f'<span class="{"up" if row["above"] else "flat"}">{mark}</span>',
        f"{row['n']:,}",
        f"{row['unparsed']:,}" if row["unparsed"] else "",
    ]


def _definitions(evaluations: Sequence[Evaluation]) -> str:
    terms: dict[str, str] = {}
    for evaluation in evaluations:
        for result in evaluation.benchmarks:
            for name, text in (result.get("descriptions") or {}).items():
                terms[f"{result['title']}: {name}"] = text
        terms |= evaluation.results.get("metrics") or {}
    items = "".join(f"<dt>{visible(name)}</dt><dd>{visible(str(text))}</dd>" for name, text in sorted(terms.items()))
    return f"<details><summary>How each metric is defined</summary><dl>{items}</dl></details>" if items else ""


STYLE = """
sup{font-size:.65em;line-height:0;color:var(--soft)}.sources{color:var(--soft);font-size:.85rem;margin:.2rem 0 1rem;
padding-left:1.6rem;overflow-wrap:anywhere}td br+small{display:inline-block;padding-top:.1rem}
"""
