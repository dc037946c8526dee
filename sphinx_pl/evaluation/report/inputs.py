"""The inputs of the report: training runs, the mixing curve and evaluations.

A damaged input does not prevent the report: it is skipped with a warning.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sphinx_pl.evaluation.report.tables import EvaluationFiles
from sphinx_pl.evaluation.results import RESULTS, read_predictions, read_results
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.metrics_csv import METRICS, read_metrics

log = logging.getLogger(__name__)
T = TypeVar("T")

WITHOUT_TEXT = "_notext"
"""The ending of a run's name that trained without text; the other run has none."""


@dataclass(frozen=True)
class TrainingRun:
    """A training run. `columns` maps a logged name to its (step, value) points in order of steps."""

    name: str
    folder: Path
    columns: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """The number of optimizer steps."""
        return int(max((points[-1][0] for points in self.columns.values()), default=0))

    @property
    def seconds(self) -> float:
        """The seconds in optimizer steps, without validation and checkpoints."""
        return sum(seconds * steps for _, seconds, steps in self._logged())

    def total(self, what: str) -> float:
        """The tokens or images of all steps, from the logged rates."""
        rates = dict(self.columns.get(f"perf/{what}_per_s", []))
        return sum(rates.get(step, 0.0) * seconds * steps for step, seconds, steps in self._logged())

    def _logged(self) -> list[tuple[float, float, float]]:
        """(step, seconds per step, steps since the log before) of each log of the throughput."""
        logs = self.columns.get("perf/time_step", [])
        before = [0.0, *(step for step, _ in logs)]
        return [(step, seconds, step - last) for (step, seconds), last in zip(logs, before, strict=False)]

    @property
    def sources(self) -> list[str]:
        """The names of the training sources that are switched on."""
        data = self.config.get("data")
        sources = data.get("sources") if isinstance(data, dict) else None
        return (
            [str(name) for name, values in sources.items() if values is not None] if isinstance(sources, dict) else []
        )

    @property
    def reads_text(self) -> bool:
        """Whether text-only data was trained on; without a configuration, the name decides."""
        if not self.sources:
            return not self.name.endswith(WITHOUT_TEXT)
        sources = (self.config["data"]["sources"][name] for name in self.sources)
        return any("text" in (source.get("kind"), source.get("modality")) for source in sources)

    @property
    def stage(self) -> str:
        """The stage's name in the configuration, else the run's."""
        stage = self.config.get("stage")
        return str(stage.get("name", self.name)) if isinstance(stage, dict) else self.name.removesuffix(WITHOUT_TEXT)

    def under(self, prefix: str) -> dict[str, list[tuple[float, float]]]:
        """The columns that begin with `prefix`, by the rest of their names."""
        return {name.removeprefix(prefix): points for name, points in self.columns.items() if name.startswith(prefix)}


def read_run(name: str, folder: Path) -> TrainingRun:
    """The run of a folder: its metrics.csv and configuration, without those of sweeps in it."""
    columns: dict[str, list[tuple[float, float]]] = {}
    for step, row in read_metrics(folder / METRICS)[1].items():
        for column, text in row.items():
            if (value := _number(text)) is not None and column != "epoch":
                columns.setdefault(column, []).append((step, value))
    config: dict[str, Any] = {}
    for candidate in (folder / "config.yaml", folder / ".hydra" / "config.yaml"):
        if candidate.is_file():
            config = _parsed(candidate, yaml.safe_load) or {}
            break
    return TrainingRun(name, folder, columns, config)


def read_curve(folder: Path | None) -> dict[str, Any] | None:
    """The content of curve.json, which mix_weights.py writes with `curve=`; None without one."""
    file = folder / "curve.json" if folder else None
    return _parsed(file, json.loads) if file and file.is_file() else None


def read_evaluation(folder: Path, name: str = "") -> EvaluationFiles | None:
    """The results and predictions that evaluate.py wrote to a folder; None without results.

    Args:
        name: by default the folder's.
    """
    if not (folder / RESULTS).is_file():
        return None
    results, predictions = _undamaged(read_results, folder), _undamaged(read_predictions, folder)
    if results is None:
        return None
    return EvaluationFiles(name or folder.name, results, [prediction.to_dict() for prediction in predictions or ()])


def _undamaged(read: Callable[[Path], T], folder: Path) -> T | None:
    """The content that `read` returns; None, with a warning, where it is damaged."""
    try:
        return read(folder)
    except UserError as error:
        log.warning("left out of the report: %s", error)
        return None


def _parsed(file: Path, parse: Callable[[str], Any]) -> Any:
    """The mapping in a file; None, with a warning, where it is damaged."""
    try:
        content = parse(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict | None):
            raise ValueError("no mapping")
        return content
    except (OSError, ValueError, yaml.YAMLError) as error:
        log.warning("%s is left out of the report: %s", file, str(error).splitlines()[0])
        return None


def find_inputs(folder: Path) -> tuple[list[TrainingRun], Path | None]:
    """The training runs in `folder`, oldest first, and the newest folder in it with a curve."""
    logs = sorted(folder.glob(f"*/{METRICS}"), key=lambda file: file.stat().st_mtime)
    curves = sorted(folder.glob("*/curve.json"), key=lambda file: file.stat().st_mtime)
    return [read_run(log.parent.name, log.parent) for log in logs], curves[-1].parent if curves else None


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None
