"""The differences between evaluated checkpoints, and which of them are significant.

    python -m sphinx_pl.evaluation.compare FOLDER_A FOLDER_B [FOLDER_C ...] [--out comparison.json]

The folders are those that evaluate.py wrote to (out=). Each later one is compared with the first,
question by question. Questions hard for both cancel, so a difference can be significant even if the
two intervals overlap.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console

from sphinx_pl.evaluation.metrics import Difference, Metric, defined, difference, holm, mean, number_text
from sphinx_pl.evaluation.results import benchmark_of, read_predictions, read_results
from sphinx_pl.evaluation.runner import Prediction, benchmark_label
from sphinx_pl.runtime.hydra_app import report as report_error
from sphinx_pl.utils.console import Table
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import check_writable, write_whole

ALPHA = 0.05


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A metric of two evaluations on the questions that both answered.

    Attributes:
        p: the difference's p-value, corrected for the number of compared metrics (Holm 1979).
        left_out: the number of predictions that only one of them has.
    """

    name: str
    metric: str
    percent: bool
    difference: Difference
    p: float
    left_out: int

    @property
    def real(self) -> bool:
        return self.p < ALPHA

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON, with None for NaN. The metric's name is under "measure"."""
        values = dataclasses.asdict(self) | {"real": self.real, "p": defined(self.p)}
        values["measure"] = values.pop("metric")
        return values | {"difference": {name: defined(number) for name, number in values["difference"].items()}}


def compare(
    first: Sequence[Prediction],
    second: Sequence[Prediction],
    metrics: Mapping[str, Sequence[Metric]],
    seed: int = 0,
) -> list[Comparison]:
    """The differences of every task's mean score and every benchmark's metrics, second minus first.

    Args:
        metrics: each benchmark's metrics by its name. A benchmark without any, and a task, has the
            mean score.

    Raises:
        UserError: the evaluations have no question in common.
    """
    differences: list[tuple[str, Metric, Difference, int]] = []
    common_question = False
    sides = [_groups(first), _groups(second)]
    labelled = {benchmark_label(name): of_benchmark for name, of_benchmark in metrics.items()}
    for name in [name for name in sides[0] if name in sides[1]]:
        keyed = [{prediction.key: prediction for prediction in side[name]} for side in sides]
        common = [key for key in keyed[0] if key in keyed[1]]
        if not common:
            continue
        common_question = True
        left_out = len(keyed[0].keys() ^ keyed[1].keys())
        for metric in labelled.get(name, [mean("score", "")]):
            before, after = (metric.prepare([side[key] for key in common]) for side in keyed)
            differences.append((name, metric, difference(before, after, seed), left_out))
    if not common_question:
        raise UserError(
            "the evaluations have no question in common: ask both the same (test=, benchmarks=, limit, seed)"
        )
    # An undefined difference is not tested, such as that of the precision of a model that never
    # says yes.
    tested = [place for place, (_, _, one, _) in enumerate(differences) if not math.isnan(one.p)]
    of_tested = holm([differences[place][2].p for place in tested])
    corrected = dict(zip(tested, of_tested, strict=True))
    return [
        Comparison(name, metric.name, metric.percent, one, p, left_out)
        for place, (name, metric, one, left_out) in enumerate(differences)
        for p in [corrected.get(place, math.nan)]
    ]


def _groups(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """The predictions by benchmark, or by task for test sources."""
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        name = benchmark_label(prediction.key) if prediction.benchmark else prediction.task
        groups.setdefault(name, []).append(prediction)
    return groups


def table(title: str, compared: Sequence[Comparison]) -> Table:
    """The table of differences for a terminal."""
    rows = Table(
        title=title,
        caption="▲ ▼: p < 0.05, corrected for the number of rows; 95 % intervals are not corrected",
        box=box.SIMPLE_HEAD,
        padding=0,  # the box has blanks of its own: names stay whole in eighty columns
    )
    for name in ("", "metric"):
        rows.add_column(name, overflow="fold")  # two cut-off names could be equal
    for name in ("first", "second", "change", "95 %", "", "p", "units"):
        rows.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in compared:
        one = row.difference
        texts = [number_text(defined(value), row.percent) for value in (one.first, one.second)]
        apart, low, high = (
            f"{float(number):+.1f}" if number != "–" else number
            for number in (number_text(defined(value), row.percent) for value in (one.value, one.low, one.high))
        )
        interval = "–" if low == high == "–" else f"{low} to {high}"
        p = "–" if math.isnan(row.p) else f"{row.p:.3f}"
        mark = ("[green]▲[/]" if one.value > 0 else "[red]▼[/]") if row.real else ""
        name = "" if row.name == last else f"[bold]{row.name}[/]"
        last = row.name
        rows.add_row(name, row.metric, *texts, apart, interval, mark, p, str(one.units))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 after one line that names the mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m sphinx_pl.evaluation.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", type=Path, help="folders that evaluate.py wrote to")
    parser.add_argument("--out", type=Path, help="also write the comparison to this JSON file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    console = Console()
    try:
        if options.out:
            check_writable(options.out, "--out")
        if len(options.folders) < 2:
            raise UserError("give at least two folders that evaluate.py wrote to")
        first, *others = options.folders
        results, before = read_results(first), read_predictions(first)
        metrics = {result["name"]: benchmark_of(result).metrics for result in results["benchmarks"]}
        written = {}
        for other in others:
            read_results(other)  # an unfinished evaluation has none
            after = read_predictions(other)
            compared = compare(before, after, metrics, options.seed)
            console.print(table(f"{first} → {other}", compared))
            if left_out := sum({row.name: row.left_out for row in compared}.values()):
                console.print(f"{left_out} answers are skipped: only one of the two folders has them.", highlight=False)
            written[str(other)] = [row.to_dict() for row in compared]
        if options.out:
            content = {"first": str(first), "others": written}
            write_whole(options.out, json.dumps(content, indent=2) + "\n")
            console.print(f"Comparison: {options.out}", highlight=False, markup=False, soft_wrap=True)
    except UserError as error:
        return report_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
