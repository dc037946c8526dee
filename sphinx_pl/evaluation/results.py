"""The files of an evaluation: predictions, and results that can be computed from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sphinx_pl.evaluation.benchmarks import BENCHMARKS, Benchmark
from sphinx_pl.evaluation.runner import Prediction
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import write_whole

RESULTS = "results.json"
PREDICTIONS = "predictions"
BASELINES = ("shuffled", "constant")


def write_predictions(folder: Path, name: str, predictions: Sequence[Prediction]) -> None:
    """Write `name`.jsonl with a line for each prediction."""
    lines = (json.dumps(prediction.to_dict(), ensure_ascii=False) for prediction in predictions)
    write_whole(folder / f"{name}.jsonl", "\n".join(lines) + "\n")


def read_predictions(folder: Path, name: str = PREDICTIONS) -> list[Prediction]:
    """The predictions that `write_predictions` wrote; none for a baseline that was not asked.

    Raises:
        UserError: no such file, or it is damaged.
    """
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        if name in BASELINES:
            return []
        raise UserError(f"'{folder}' has no {path.name}: give the folder that evaluate.py wrote to (out=)")
    try:
        # Bytes, since lines of a text would also end at U+2028, which answers may have.
        return [Prediction.from_dict(json.loads(line)) for line in path.read_bytes().splitlines()]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"'{path}' is damaged ({type(error).__name__}: {error}): evaluate again") from None


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    write_whole(folder / RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def read_results(folder: Path) -> dict[str, Any]:
    """The content of results.json.

    Raises:
        UserError: it does not exist, or it is damaged.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise UserError(f"'{folder}' has no {RESULTS}: give the folder that evaluate.py wrote to (out=)")
    try:
        return {"rows": [], "benchmarks": [], **json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, TypeError) as error:
        raise UserError(f"'{path}' is damaged ({error}): evaluate again") from None


def benchmark_of(result: Mapping[str, Any]) -> Benchmark:
    """The benchmark of an entry of results.json, without its files.

    Raises:
        UserError: this version has no such kind.
    """
    return BENCHMARKS[result["kind"]](None, result["split"])


def by_benchmark(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """The predictions by the configured name of their benchmark; "" stands for test sources."""
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        name = prediction.key.partition("/")[0] if prediction.benchmark else ""
        groups.setdefault(name, []).append(prediction)
    return groups
