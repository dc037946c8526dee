"""The weights of held-out sources in the one loss by which a run is judged."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from sphinx_pl.data.readers import spread
from sphinx_pl.data.sampling.config import Group, SourceConfig
from sphinx_pl.data.skip import SkipSample

LOOKED_AT = 64
"""The number of records of a source's first file whose tasks are counted."""


def held_out_weights(
    sources: Mapping[str, Any], val_sources: Mapping[str, Any], temperature: float | None = None
) -> dict[str, float]:
    """The weight of each held-out source, by what the mixture trains on. The weights sum to 1.

    A training source's share of the mixture goes to the held-out source of its own name. If there
    is none, the share is divided among the tasks of its records, and each part among the held-out
    sources that hold the task. So a held-out source weighs 0 if the run does not train on anything
    like it. If that holds for all, all have the same weight.

    Args:
        sources: the training mixture, `data.sources`.
        val_sources: `data.val_sources`.
        temperature: `data.mixing.temperature`.

    Raises:
        UserError: a source cannot be opened.
    """
    group = Group.from_dict({"sources": sources, "temperature": temperature})
    configs = dict(group.leaves())
    sizes = dict.fromkeys(configs, 0)
    if group.needs_sizes:
        sizes |= {name: config.open(name).size()[0] for name, config in configs.items() if config.weight > 0}
    held_out = {
        name: SourceConfig.from_dict(name, values, "val_sources")
        for name, values in val_sources.items()
        if values is not None
    }
    holders: dict[str, list[str]] = defaultdict(list)  # of each task
    for name, config in held_out.items():
        for task in _tasks(name, config):
            holders[task].append(name)
    weights = dict.fromkeys(held_out, 0.0)
    for name, share in group.shares(sizes).items():
        own = name.rpartition(".")[2]  # a member of a group
        if own in weights:
            weights[own] += share
            continue
        tasks = _tasks(name, configs[name])
        for task, count in tasks.items():
            for holder in holders[task]:
                weights[holder] += share * count / tasks.total() / len(holders[task])
    total = sum(weights.values())
    return {name: weight / total if total else 1 / len(weights) for name, weight in weights.items()}


def _tasks(name: str, config: SourceConfig) -> Counter[str]:
    """The number of records of each task among those that were read."""
    tasks: Counter[str] = Counter()
    try:
        shard = config.open(name).open(0)
    except SkipSample:
        return tasks
    for index in spread(len(shard), LOOKED_AT):
        try:
            tasks[shard.record(index).task] += 1
        except SkipSample:
            continue
    return tasks
