"""How much each held-out source weighs in the one loss that a run is judged by."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from sphinx_pl.data.readers import spread
from sphinx_pl.data.sampling.config import Group, SourceConfig
from sphinx_pl.data.skip import SkipSample

LOOKED_AT = 64
"""Records of a source's first file whose tasks are counted."""


def held_out_weights(
    sources: Mapping[str, Any], val_sources: Mapping[str, Any], temperature: float | None = None
) -> dict[str, float]:
    """The weight of each held-out source, by what the mixture trains on; they sum to 1.

    A training source's share of the mixture goes to the held-out source of its own name. Where there is none, it is
    divided among the tasks of its records, and each part among the held-out sources that hold the task. So a held-out
    source of which nothing is trained weighs 0. All weigh alike where none of them is of anything that is trained.

    Args:
        sources: the training mixture, `data.sources`.
        val_sources: `data.val_sources`.
        temperature: `data.mixing.temperature`.

    Raises:
        UserError: what the sources themselves refuse.
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
    """How many of the looked at records are of each task. What cannot be read is counted where it is trained on."""
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
