"""Official benchmarks: their configuration, and their questions as they are asked.

Each module here is one benchmark or a family of them. A `Benchmark` names its files, turns their
entries into records in the wording of a training task, scores an answer, and has the metrics of its
authors. Where training data are made of the same files, a benchmark also inherits from their
`Converter`, after `Benchmark`.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Optional

from sphinx_pl.data.schema import Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.evaluation.benchmarks.base import BENCHMARKS, FAMILIES, Benchmark
from sphinx_pl.evaluation.metrics import estimate, to_json
from sphinx_pl.evaluation.runner import Prediction
from sphinx_pl.utils.config import build
from sphinx_pl.utils.errors import UserError, suggest

__all__ = ["BENCHMARKS", "FAMILIES", "ROOT", "Benchmark", "BenchmarkConfig", "Questions", "choose", "load"]

ROOT = "root"
"""The key of conf/benchmark that is no benchmark but the folder of their files."""


@dataclass
class BenchmarkConfig:
    """One entry of `benchmark` in conf/evaluate.yaml."""

    kind: str
    src: str
    split: Optional[str] = None
    images: Optional[str] = None

    def open(self, name: str) -> Benchmark:
        """The benchmark with its files.

        Raises:
            UserError: an unknown kind or split, or a folder that does not exist.
        """
        try:
            kind = BENCHMARKS[self.kind]
        except UserError as error:
            raise UserError(f"benchmark.{name}: {error}") from None
        return kind(Path(self.src), self.split, Path(self.images) if self.images else None)


@dataclass(frozen=True)
class Questions:
    """A benchmark with its records, whose image paths are absolute, and the number of unusable
    entries by reason."""

    name: str
    benchmark: Benchmark
    records: Sequence[Record]
    lost: Mapping[str, int]

    def result(self, predictions: Sequence[Prediction], lost: Mapping[str, int], seed: int = 0) -> dict[str, Any]:
        """The benchmark's entry of results.json: metrics with their intervals, for all answers and
        for each category."""
        benchmark = self.benchmark
        values = [to_json(estimate(m.prepare(predictions), seed), m) | {"category": ""} for m in benchmark.metrics]
        parts: dict[str, list[Prediction]] = defaultdict(list)
        for prediction in predictions:
            for part in benchmark.groups(prediction):
                parts[part].append(prediction)
        if len(parts) > 1:
            for part, group in sorted(parts.items()):
                for m in benchmark.category_metrics if part else ():
                    values.append(to_json(estimate(m.prepare(group), seed), m) | {"category": part})
        return {
            "name": self.name,
            "kind": benchmark.name,
            "title": benchmark.title,
            "family": benchmark.family,
            "split": benchmark.split,
            "url": benchmark.url,
            "n": len(predictions),
            "unparsed": sum(not prediction.parsed for prediction in predictions),
            "lost": dict(Counter(self.lost) + Counter(lost)),
            "values": values,
            "descriptions": {m.name: m.description for m in (*benchmark.metrics, *benchmark.category_metrics)},
        }


def load(name: str, benchmark: Benchmark, limit: int | None = None, seed: int = 0) -> Questions:
    """Read a benchmark's records.

    Args:
        limit: at most this many units of each category (`Benchmark.stratum`), drawn with `seed`.
            Most units are single questions.

    Raises:
        UserError: its files are missing or malformed, or hold no question.
    """
    benchmark.check()
    groups: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    lost: Counter[str] = Counter()
    for _, entry in benchmark.read():
        if isinstance(entry, SkipSample):
            lost[entry.reason] += 1
            continue
        for record in entry:
            paths = tuple(dataclasses.replace(i, path=str(benchmark.images / i.path)) for i in record.images)
            record = dataclasses.replace(record, key=f"{name}/{record.key}", images=paths)
            groups[benchmark.stratum(record)][benchmark.unit(record)].append(record)
    lost += benchmark.skipped + benchmark.left_out
    records: list[Record] = []
    rng = random.Random(seed)  # one generator for all categories: the same places in each may have the same answer
    for units in groups.values():
        chosen = list(units) if limit is None or len(units) <= limit else rng.sample(list(units), limit)
        records += [record for unit in chosen for record in units[unit]]
    if not records:
        raise UserError(f"{name}: no question in '{benchmark.src}' can be used ({dict(lost) or 'there is none'})")
    return Questions(name, benchmark, records, lost)


def choose(
    wanted: Sequence[str], configured: Mapping[str, Any], limit: int | None = None, seed: int = 0
) -> tuple[list[Questions], dict[str, str]]:
    """The questions of the benchmarks that `wanted` names or matches.

    A benchmark given by name must have its files. A pattern skips the benchmarks whose files are
    missing.

    Args:
        limit, seed: see `load`.

    Returns:
        The questions, and the reason for each skipped benchmark by its name.

    Raises:
        UserError: a name is not configured or its benchmark cannot be asked, or all benchmarks are
            skipped.
    """
    available = {name: values for name, values in configured.items() if name != ROOT}
    chosen: dict[str, Questions] = {}
    left_out: dict[str, str] = {}
    for pattern in wanted:
        names = [name for name in available if fnmatchcase(name, pattern)]
        if not names:
            raise UserError(f"benchmarks: no '{pattern}': {suggest(pattern, available, 'conf/benchmark')}")
        for name in names:
            if name in chosen:
                continue
            try:
                if available[name] is None:
                    raise UserError(f"benchmark.{name} is null, which switches it off")
                if not isinstance(available[name], Mapping):
                    raise UserError(
                        f"benchmark.{name}={available[name]} must be a mapping such as {{kind: pope, src: FOLDER}}"
                    )
                config = build(BenchmarkConfig, available[name], f"benchmark.{name}")
                chosen[name] = load(name, config.open(name), limit, seed)
            except UserError as error:
                if name == pattern:
                    raise
                left_out[name] = str(error)
    if wanted and not chosen:
        reasons = "; ".join([*left_out.values()][:3])
        raise UserError(f"benchmarks: none of {', '.join(wanted)} can be asked: {reasons}")
    return list(chosen.values()), {name: why for name, why in left_out.items() if name not in chosen}


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
