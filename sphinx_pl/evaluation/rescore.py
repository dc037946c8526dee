"""Score an evaluation's answers again, without the model: after a scorer changed, or to check that
none did.

python -m sphinx_pl.evaluation.rescore FOLDER
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.readers.instruction_json import to_record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.evaluation.benchmarks import Questions
from sphinx_pl.evaluation.report.summary import summarise
from sphinx_pl.evaluation.results import (
    BASELINES,
    PREDICTIONS,
    benchmark_of,
    by_benchmark,
    read_predictions,
    read_results,
    write_predictions,
    write_results,
)
from sphinx_pl.evaluation.runner import Prediction, score_answer
from sphinx_pl.runtime.hydra_app import report as report_error
from sphinx_pl.utils.errors import UserError


def rescore(folder: Path, seed: int | None = None) -> int:
    """Rewrite the folder's predictions, baselines and results.

    Args:
        seed: the bootstrap's seed; None is the evaluation's.

    Returns:
        The number of predictions whose score changed.

    Raises:
        UserError: the folder holds no evaluation, or a damaged one.
    """
    results = read_results(folder)
    coordinates = Coordinates(decimals=int(results["decimals"]))
    seed = int(results.get("options", {}).get("seed", 0)) if seed is None else seed
    scorers = {result["name"]: benchmark_of(result).score_answer for result in results["benchmarks"]}
    changed = 0

    def again(prediction: Prediction) -> Prediction:
        nonlocal changed
        try:
            record = to_record(prediction.record, prediction.key, Path(), prediction.task)
        except SkipSample as error:
            raise UserError(f"'{folder}': {prediction.key} cannot be read ({error}): evaluate again") from None
        name = prediction.key.partition("/")[0] if prediction.benchmark else ""
        scored = scorers.get(name, score_answer)(record, prediction.prediction, coordinates, prediction.images)
        changed += scored.score != prediction.score
        return scored

    predictions = [again(prediction) for prediction in read_predictions(folder)]
    baselines = {name: [again(one) for one in read_predictions(folder, name)] for name in BASELINES}
    baselines = {name: answers for name, answers in baselines.items() if answers}
    groups = by_benchmark(predictions)
    results["rows"] = [row.to_dict() for row in summarise(groups.get("", []), baselines, seed)]
    results["benchmarks"] = [
        Questions(result["name"], benchmark_of(result), (), result["lost"]).result(groups[result["name"]], {}, seed)
        for result in results["benchmarks"]
    ]
    for name, answers in {PREDICTIONS: predictions, **baselines}.items():
        write_predictions(folder, name, answers)
    write_results(folder, results)
    return changed


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 after one line that names the mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m sphinx_pl.evaluation.rescore",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="the folder that evaluate.py wrote to")
    options = parser.parse_args(arguments)
    try:
        changed = rescore(options.folder)
    except UserError as error:
        return report_error(error)
    outcome = f"{changed} scores changed" if changed else "No score changed"
    Console().print(f"{outcome}: {options.folder / 'results.json'}", highlight=False, markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
