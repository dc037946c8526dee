"""Reweighting by bad cases: a training mixture with more of what a model fails at.

This is the loop of MLLM-DataEngine (arXiv 2308.13566) on a small scale. That finds the question
types with the most bad cases and collects more data of them. Here the data exist, and the weights
of their sources change:

    failure of a type      the mean of 1 - score over its questions, shrunk towards its task's (a task's towards that of
                           all questions) as if `prior` more questions had that failure
    failure of a source    the mean over its records of their type's failure; a record whose task was not asked counts
                           as the mean source's
    factor on its weight   (1 - strength) + strength * failure / failure of the mean source, within 1/bound..bound
    the new weight         weight * factor, all factors scaled alike so that the sources keep their share together

Text-only sources, and sources none of whose tasks was asked, keep their share.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.markup import escape

from sphinx_pl.data.readers import spread
from sphinx_pl.data.sampling.config import META, Group, SourceConfig
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.evaluation.runner import Prediction, topic_of
from sphinx_pl.runtime.hydra_app import command_of
from sphinx_pl.utils.console import Table
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import write_whole

Type = tuple[str, str]
"""A question's task and topic, "" where it has none."""

MARK = "# Written by evaluate.py"
TEXT_ONLY = "text only"
NOT_ASKED = "none of its tasks was asked"
# Characters that could end a comment's line: topics come from data.
_BREAKS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True)
class FailureRate:
    """The failure rate of a task (topic "") or of a topic of it: `failure` as counted, `shrunk` as
    it is used."""

    task: str
    topic: str
    n: int
    failure: float
    shrunk: float


@dataclass(frozen=True)
class ReweightedSource:
    """A source, before and after.

    Attributes:
        holds: the share of each task and topic in its records.
        failure: None where it keeps its share.
        kept: the reason why it keeps its share, "" where it does not.
    """

    name: str
    holds: Mapping[Type, float]
    failure: float | None
    kept: str
    weight: float
    new_weight: float
    share: float
    new_share: float


@dataclass(frozen=True)
class Reweighting:
    """A reweighted mixture with the reasons for its weights. `weights` is the tree of sources with
    the new ones."""

    rates: Sequence[FailureRate]
    sources: Sequence[ReweightedSource]
    mean: float
    weights: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The entry of results.json, which the report shows."""
        sources = [
            dataclasses.asdict(source)
            | {"holds": [{"task": t, "topic": p, "share": s} for (t, p), s in source.holds.items()]}
            for source in self.sources
        ]
        return {"mean": self.mean, "rates": [dataclasses.asdict(rate) for rate in self.rates], "sources": sources}

    def rate_rows(self) -> Iterator[tuple[str, ...]]:
        """A header, then a row for each rate: task, topic, questions, failure counted and used."""
        yield "task", "questions", "failure", "used"
        for rate in self.rates:
            name = f"  {rate.topic}" if rate.topic else rate.task
            yield name, str(rate.n), f"{rate.failure:.3f}", f"{rate.shrunk:.3f}"

    def source_rows(self) -> Iterator[tuple[str, ...]]:
        """A header, then a row for each source: what it holds most of, failure, weights, shares."""
        yield "source", "holds", "failure", "weight", "new weight", "share", "new share"
        for source in self.sources:
            failure = source.kept if source.failure is None else f"{source.failure:.3f}"
            weights = f"{source.weight:.4g}", f"{source.new_weight:.4g}"
            shares = f"{source.share:.1%}", f"{source.new_share:.1%}"
            yield source.name, held_text(source.holds), failure, *weights, *shares

    def tables(self) -> list[Table]:
        """The tables of failures and sources for a terminal."""
        tables = []
        for title, rows in (("Failures", self.rate_rows()), ("Reweighted mixture", self.source_rows())):
            table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
            for name in next(rows):
                table.add_column(name, justify="left" if name in ("task", "source", "holds") else "right")
            for row in rows:
                table.add_row(*map(escape, row))
            tables.append(table)
        return tables

    def yaml(self, comments: Iterable[str], base: str | None, entries: Mapping[str, Any] | None = None) -> str:
        """The content of a file of conf/data/mixture.

        Args:
            comments: the first lines, after MARK.
            base: the mixture that was reweighted; only weights are written. None: `entries` has all
                the rest.
            entries: more keys of the file, such as whole `sources`, which get the new weights.
        """
        lines = [
            "# @package data",
            f"{MARK} then=mixture (sphinx_pl/evaluation/mixtures/reweighting.py explains the weights).",
        ]
        lines += [f"# {_BREAKS.sub(' ', line)}".rstrip() for line in comments]
        for rows in (self.rate_rows(), self.source_rows()):
            lines += ["#", *(f"#   {_BREAKS.sub(' ', line)}" for line in _aligned(list(rows)))]
        content: dict[str, Any] = {"defaults": [base]} if base else {}
        content |= entries or {}
        content["sources"] = _merged(content.get("sources", {}), self.weights)
        return "\n".join([*lines, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1 << 20)])


def held_text(holds: Mapping[Type, float], at_most: int = 4) -> str:
    """The largest tasks of a source with their shares, as text."""
    tasks: Counter[str] = Counter()
    for (task, _), share in holds.items():
        tasks[task] += share  # type: ignore[assignment]
    texts = [f"{task} {share:.0%}" for task, share in tasks.most_common(at_most)]
    return ", ".join([*texts, *(["…"] if len(tasks) > at_most else [])])


def failure_rates(predictions: Iterable[Prediction], prior: float) -> list[FailureRate]:
    """The rate of each task, followed by its topics. A topic is shrunk towards its task, a task
    towards all questions.

    Args:
        prior: the strength of the shrinking, in questions.
    """
    failures_of: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for prediction in predictions:
        failures_of[prediction.task][prediction.topic].append(1 - prediction.score)
    everything = [failure for topics in failures_of.values() for failures in topics.values() for failure in failures]
    overall = _mean(everything)
    rates = []
    for task, topics in sorted(failures_of.items()):
        failures = [failure for group in topics.values() for failure in group]
        of_task = (sum(failures) + prior * overall) / (len(failures) + prior)
        rates.append(FailureRate(task, "", len(failures), _mean(failures), of_task))
        for topic, group in sorted(topics.items()):
            if topic:
                shrunk = (sum(group) + prior * of_task) / (len(group) + prior)
                rates.append(FailureRate(task, topic, len(group), _mean(group), shrunk))
    return rates


@dataclass(frozen=True)
class _MixtureEntry:
    """One weight of a mixture's file: a source, or the original's list of several."""

    share: float
    text_only: bool
    holds: Mapping[Type, float]


class TrainingMixture:
    """The sources of a training mixture, and the tasks and topics that they hold.

    Args:
        sources: `data.sources`, a tree of groups.
        temperature: `data.mixing.temperature`.
        at_most: the number of records of each source that are counted, evenly spread over it.

    Raises:
        UserError: there are no sources, or one of them is wrong.
    """

    def __init__(self, sources: Mapping[str, Any], temperature: float | None = None, at_most: int = 2000) -> None:
        self.group = Group.from_dict({"sources": sources, "temperature": temperature})
        configs = {name: config for name, config in self.group.leaves() if config.weight > 0}
        if not configs:
            raise UserError("then=mixture: data.sources is empty: choose the data/mixture= that the model trained on")
        opened = {name: config.open(name) for name, config in configs.items()}
        sizes = {name: source.size()[0] for name, source in opened.items()} if self.group.needs_sizes else {}
        self._shares = self.group.shares(dict.fromkeys(dict(self.group.leaves()), 0) | sizes)
        self._values = sources
        self.units: dict[str, _MixtureEntry] = {}
        for name, leaves in _units(self.group, sources):
            shares = {leaf: self._shares.get(leaf, 0.0) for leaf, _ in leaves}
            total = sum(shares.values())
            holds: Counter[Type] = Counter()
            for leaf, share in shares.items():
                counts: Counter[Type] = Counter()
                for index in spread(len(opened[leaf]), at_most) if share else ():
                    try:
                        record = opened[leaf].record(index)
                    except SkipSample:
                        continue
                    counts[record.task, topic_of(record)] += 1
                for kind, count in counts.items():
                    holds[kind] += share / total * count / counts.total()  # type: ignore[assignment]
            text_only = all(config.modality == "text" for _, config in leaves)
            self.units[name] = _MixtureEntry(total, text_only, dict(holds.most_common()))

    def check(self, tasks: set[str]) -> None:
        """Check that questions of these tasks can change a weight.

        Raises:
            UserError: no source with images holds one of the tasks.
        """
        present = {task for unit in self.units.values() if not unit.text_only for task, _ in unit.holds}
        if not present & tasks:
            raise UserError(
                f"then=mixture: the training sources hold {', '.join(sorted(present)) or 'nothing with images'}, "
                f"the test sources ask {', '.join(sorted(tasks))}: no weight can change. Check data/mixture and test"
            )

    def reweight(
        self, predictions: Sequence[Prediction], strength: float = 0.5, prior: float = 20.0, bound: float = 3.0
    ) -> Reweighting:
        """The mixture with more weight on sources of bad cases; the top of this file explains how.

        Args:
            strength: 0 keeps the weights, 1 makes them proportional to failures.
            prior: see `failure_rates`.
            bound: a weight changes by at most this factor.
        """
        rates = failure_rates(predictions, prior)
        by_type = {(rate.task, rate.topic): rate.shrunk for rate in rates}

        def failure(kind: Type) -> float | None:
            return by_type.get(kind, by_type.get((kind[0], "")))

        sums: dict[str, tuple[float, float]] = {}  # of a source: the sum of known failures, and of how many records
        for name, unit in self.units.items():
            parts = [(share, rate) for kind, share in unit.holds.items() if (rate := failure(kind)) is not None]
            if parts and unit.share > 0 and not unit.text_only:
                sums[name] = sum(share * rate for share, rate in parts), sum(share for share, _ in parts)
        covered = sum(self.units[name].share * part for name, (_, part) in sums.items())
        mean = sum(self.units[name].share * total for name, (total, _) in sums.items()) / covered if covered else 0.0
        failures = {name: total + (1 - part) * mean for name, (total, part) in sums.items()}
        wanted = {
            name: (1 - strength) + strength * failure / mean if mean else 1.0 for name, failure in failures.items()
        }
        factors = _scaled(wanted, {name: self.units[name].share for name in wanted}, bound)
        new = {name: unit.share * factors.get(name, 1.0) for name, unit in self.units.items()}
        weights = self._tree(self.group, self._values, new)
        sources = []
        for name, unit in self.units.items():
            weight, new_weight = _weight(self.group, name), _weight_in(weights, name)
            kept = "" if name in failures else TEXT_ONLY if unit.text_only else NOT_ASKED
            share, new_share = unit.share, new[name]
            sources.append(
                ReweightedSource(name, unit.holds, failures.get(name), kept, weight, new_weight, share, new_share)
            )
        return Reweighting(rates, sources, mean, weights)

    def _tree(self, group: Group, values: Mapping[str, Any], new: Mapping[str, float], prefix: str = "") -> Any:
        """The tree of new weights: {name: {"weight"}, or for a group {"weight", "sources"}; None if
        switched off}.

        Every node's weight grows like the share of everything under it. Common growth cancels
        within a group, and temperatures multiply weights, so the resulting shares are the new ones.
        """
        tree: dict[str, Any] = {}
        for name in values:
            full, member = f"{prefix}{name}", group.members.get(name)
            if member is None:
                tree[name] = None
                continue
            below = [unit for unit in new if unit == full or unit.startswith(f"{full}.")]
            before = sum(self.units[unit].share for unit in below)
            factor = sum(new[unit] for unit in below) / before if before else 1.0
            tree[name] = {"weight": float(f"{member.weight * factor:.6g}")}
            if isinstance(member, Group) and values[name].get("kind") != META:
                tree[name]["sources"] = self._tree(member, values[name]["sources"], new, f"{full}.")
        return tree


def write_mixture(path: Path, text: str, base: str | None) -> None:
    """Write the file, unless `check_out` refuses it."""
    check_out(path, base)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def check_out(path: Path, base: str | None) -> None:
    """Check that a mixture may be written to this file.

    Raises:
        UserError: a file exists that a person wrote, or the name is that of the reweighted mixture.
    """
    if path.suffix != ".yaml":
        raise UserError(f"mixture_out={path} must end in .yaml")
    if base is not None and path.stem == base:
        raise UserError(
            f"mixture_out={path} has the name of the mixture that it changes, '{base}': give it another name"
        )
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:200]:
        raise UserError(f"mixture_out={path} exists and evaluate.py did not write it: give another name")


def how_to_train(path: Path) -> str:
    """The command that trains on a mixture's file."""
    train = f"{command_of('train')} stage=finetune data/mixture={path.stem}"
    if path.parent.parts[-2:] != ("data", "mixture"):
        return f"copy {path} to conf/data/mixture, then: {train} …"
    folder = path.parent.parent.parent
    search = "" if folder.name == "conf" else f" 'hydra.searchpath=[file://{folder.resolve()}]'"
    return f"{train}{search} …"


def _units(
    group: Group, values: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, list[tuple[str, SourceConfig]]]]:
    """(name, sources) of everything with a weight in the file."""
    for name, member in group.members.items():
        full = f"{prefix}{name}"
        if not isinstance(member, Group):
            yield full, [(full, member)]
        elif values[name].get("kind") == META:
            yield full, list(member.leaves(f"{full}."))
        else:
            yield from _units(member, values[name]["sources"], f"{full}.")


def _scaled(wanted: Mapping[str, float], shares: Mapping[str, float], bound: float) -> dict[str, float]:
    """Factors proportional to `wanted` and within 1/bound..bound that keep the sum of the shares."""

    def bounded(scale: float) -> dict[str, float]:
        return {name: min(max(scale * factor, 1 / bound), bound) for name, factor in wanted.items()}

    low, high = 1e-9, 1e9
    for _ in range(200):
        middle = (low * high) ** 0.5
        kept = sum(shares[name] * (factor - 1) for name, factor in bounded(middle).items()) <= 0
        low, high = (middle, high) if kept else (low, middle)
    return bounded(low)


def _weight(group: Group, name: str) -> float:
    first, _, rest = name.partition(".")
    member = group.members[first]
    return _weight(member, rest) if rest and isinstance(member, Group) else member.weight


def _weight_in(tree: Mapping[str, Any], name: str) -> float:
    first, _, rest = name.partition(".")
    return _weight_in(tree[first]["sources"], rest) if rest else float(tree[first]["weight"])


def _merged(entries: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(entries)
    for name, value in weights.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if both else value
    return merged


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
