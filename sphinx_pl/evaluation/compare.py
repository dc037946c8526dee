"""Which differences between evaluated checkpoints are real.

    python -m sphinx_pl.evaluation.compare FOLDER_A FOLDER_B [FOLDER_C ...] [--out comparison.json]

The folders are those that evaluate.py wrote to (out=). Later ones are compared with the first, question by question:
what is hard for both cancels, so a difference can be sure though the two intervals overlap.
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

from sphinx_pl.evaluation.measures import Difference, Measure, defined, difference, holm, mean, number_text
from sphinx_pl.evaluation.results import benchmark_of, read_predictions, read_results
from sphinx_pl.evaluation.runner import Prediction, benchmark_label
from sphinx_pl.runtime.hydra_app import report as report_error
from sphinx_pl.utils.console import Table
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import check_writable, write_whole

ALPHA = 0.05


@dataclasses.dataclass(frozen=True)
class Compared:
    """A measure of two evaluations on what both were asked.

    Attributes:
        p: of the difference, corrected for the number of measures that are compared (Holm 1979).
        left_out: predictions that only one of them has.
    """

    name: str
    measure: str
    percent: bool
    difference: Difference
    p: float
    left_out: int

    @property
    def real(self) -> bool:
        return self.p < ALPHA

    def to_dict(self) -> dict[str, Any]:
        """As JSON, which lacks NaN: None stands for what is not defined."""
        values = dataclasses.asdict(self) | {"real": self.real, "p": defined(self.p)}
        return values | {"difference": {name: defined(number) for name, number in values["difference"].items()}}


def compare(
    first: Sequence[Prediction],
    second: Sequence[Prediction],
    measures: Mapping[str, Sequence[Measure]],
    seed: int = 0,
) -> list[Compared]:
    """Every task's mean score and every benchmark's measures, second minus first.

    Args:
        measures: of each benchmark by its name; of one that is missing here, and of tasks, the mean score.

    Raises:
        UserError: they have no question in common.
    """
    found: list[tuple[str, Measure, Difference, int]] = []
    asked = False
    sides = [_groups(first), _groups(second)]
    labelled = {benchmark_label(name): of_benchmark for name, of_benchmark in measures.items()}
    for name in [name for name in sides[0] if name in sides[1]]:
        keyed = [{prediction.key: prediction for prediction in side[name]} for side in sides]
        common = [key for key in keyed[0] if key in keyed[1]]
        if not common:
            continue
        asked = True
        left_out = len(keyed[0].keys() ^ keyed[1].keys())
        for measure in labelled.get(name, [mean("score", "")]):
            before, after = (measure.prepare([side[key] for key in common]) for side in keyed)
            found.append((name, measure, difference(before, after, seed), left_out))
    if not asked:
        raise UserError(
            "the evaluations have no question in common: ask both the same (test=, benchmarks=, limit, seed)"
        )
    # A difference that is not defined, such as of the precision of a model that never says yes, is not tested.
    tested = [place for place, (_, _, one, _) in enumerate(found) if not math.isnan(one.p)]
    of_tested = holm([found[place][2].p for place in tested])
    corrected = dict(zip(tested, of_tested, strict=True))
    return [
        Compared(name, measure.name, measure.percent, one, p, left_out)
        for place, (name, measure, one, left_out) in enumerate(found)
        for p in [corrected.get(place, math.nan)]
    ]


def _groups(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """By benchmark; those of test sources by task."""
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        name = benchmark_label(prediction.key) if prediction.benchmark else prediction.task
        groups.setdefault(name, []).append(prediction)
    return groups


def table(title: str, compared: Sequence[Compared]) -> Table:
    """The differences as a terminal shows them."""
    shown = Table(
        title=title,
        caption="▲ ▼: real, with p < 0.05 corrected for the number of rows; intervals are of each row alone, 95 %",
        box=box.SIMPLE_HEAD,
        padding=0,  # beside the box's own blanks: names stay whole in eighty columns
    )
    for name in ("", "measure"):
        shown.add_column(name, overflow="fold")  # a name that is cut off may be another's
    for name in ("first", "second", "change", "95 %", "", "p", "units"):
        shown.add_column(name, justify="right", no_wrap=True)
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
        shown.add_row(name, row.measure, *texts, apart, interval, mark, p, str(one.units))
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with one line that says what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m sphinx_pl.evaluation.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", type=Path, help="what evaluate.py wrote to")
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
        measures = {result["name"]: benchmark_of(result).measures for result in results["benchmarks"]}
        written = {}
        for other in others:
            read_results(other)  # an evaluation that did not end has none
            after = read_predictions(other)
            compared = compare(before, after, measures, options.seed)
            console.print(table(f"{first} → {other}", compared))
            if left_out := sum({row.name: row.left_out for row in compared}.values()):
                console.print(f"{left_out} answers that only one of the two has are left out.", highlight=False)
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
