"""Which record comes next: sources, their shares, their order, and the place that was reached.

Nothing here is random in a way that is not a function of (seed, epoch): the state of a mixture is a few integers, the
same on every rank and for any number of data workers.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sphinx_pl.data.bad import BadSample
from sphinx_pl.data.processor import Processor, merge_branches
from sphinx_pl.data.record import Sample
from sphinx_pl.data.sources import Source, build_source, check_options
from sphinx_pl.errors import UserError
from sphinx_pl.typed import build

MODALITIES = ("image", "text")


@dataclass
class SourceConfig:
    """One entry of a mixture's `sources`; further keys go to the source's constructor.

    `weight` is its share of the drawn samples relative to the others'. `branches` > 1 joins up to that many records
    about one image into one sample. `modality` says what the source counts as where a step must hold text and images.
    """

    kind: str
    path: Any
    weight: float = 1.0
    branches: int = 1
    modality: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, name: str, values: dict[str, Any], section: str = "sources") -> SourceConfig:
        prefix = f"data.{section}.{name}"
        for key in ("kind", "path"):
            if values.get(key) in (None, ""):
                raise UserError(f"{prefix}.{key} is missing: every source needs a kind and a path")
        known = {"kind", "path", "weight", "branches", "modality"}
        own = {key: value for key, value in values.items() if key in known}
        config = build(cls, own | {"options": {k: v for k, v in values.items() if k not in known}}, prefix)
        config.modality = config.modality or ("text" if config.kind == "text" else "image")
        if config.modality not in MODALITIES:
            raise UserError(f"{prefix}.modality='{config.modality}' must be one of {', '.join(MODALITIES)}")
        if config.weight < 0:
            raise UserError(f"{prefix}.weight={config.weight} must not be negative")
        check_options(config.kind, prefix, config.options)
        return config

    def open(self, name: str) -> Source:
        return build_source(self.kind, name, self.path, **self.options)


def _images(source: Source, index: int) -> object:
    """What records can share a sample over: their images; a record without any, or a bad one, stands alone."""
    try:
        return source.record(index).images or index
    except BadSample:  # counted when its turn comes
        return index


class SourceStream:
    """A source repeated for ever, each epoch in a new order; groups of records about one image stay together."""

    def __init__(self, name: str, config: SourceConfig, processor: Processor, seed: int, max_length: int) -> None:
        self.name = name
        self.max_length = min(max_length, processor.config.max_length)
        self.config = config
        self.source = config.open(name)
        self.processor = processor
        self.seed = seed
        self.counts: Counter[str] = Counter()
        self.epoch = 0
        self.position = 0
        self._units: Any = []  # lists of indices, or an [n, 1] array of them
        self._by_image: list[list[int]] = []
        if config.branches > 1:
            groups: dict[object, list[int]] = {}
            for index in range(len(self.source)):
                groups.setdefault(_images(self.source, index), []).append(index)
            self._by_image = list(groups.values())
        self._start_epoch()

    def _start_epoch(self) -> None:
        rng = np.random.default_rng([self.seed, zlib.crc32(self.name.encode()), self.epoch])
        if self._by_image:
            size = self.config.branches
            units: list[list[int]] = []
            for group in self._by_image:
                order = [group[i] for i in rng.permutation(len(group))]
                units += [order[i : i + size] for i in range(0, len(order), size)]
            self._units = [units[i] for i in rng.permutation(len(units))]
        else:
            self._units = rng.permutation(len(self.source))[:, None]  # an array: 8 bytes a record, not a list each

    def next(self) -> list[Sample]:
        """The next unit's samples: usually one, none if all of its records were bad (counted in `counts`)."""
        if self.position >= len(self._units):
            self.epoch += 1
            self.position = 0
            self._start_epoch()
        unit = self._units[self.position]
        self.position += 1
        samples = []
        for index in map(int, unit):
            self.counts["seen"] += 1
            try:
                rng = random.Random(f"{self.seed}/{self.name}/{self.epoch}/{index}")
                samples.append(self.processor.sample(self.source.record(index), self.name, rng))
            except BadSample as error:
                self.counts[f"skipped/{error.reason}"] += 1
        return merge_branches(samples, self.max_length)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self.counts = Counter(state["counts"])
        self._start_epoch()


class Mixture:
    """Draws from sources so that after every draw each source's share is as near to its weight as can be.

    Questions about one image are joined up to `max_length` tokens (and no further than the processor's own bound).
    """

    def __init__(
        self, sources: dict[str, dict[str, Any]], processor: Processor, seed: int, max_length: int = 1 << 30
    ) -> None:
        configs = {name: SourceConfig.from_dict(name, values) for name, values in sources.items() if values is not None}
        configs = {name: config for name, config in configs.items() if config.weight > 0}
        if not configs:
            raise UserError("data.sources is empty: give at least one source with a weight above 0")
        total = sum(config.weight for config in configs.values())
        self.shares = {name: config.weight / total for name, config in configs.items()}
        self.streams = {
            name: SourceStream(name, config, processor, seed, max_length) for name, config in configs.items()
        }
        self.drawn = dict.fromkeys(configs, 0)
        self.modalities = [m for m in MODALITIES if any(config.modality == m for config in configs.values())]

    def draw(self, modality: str | None = None) -> list[Sample]:
        """Samples of the source that is furthest behind its share (among those of `modality`)."""
        names = [n for n, s in self.streams.items() if modality is None or s.config.modality == modality]
        total = sum(self.drawn.values()) + 1
        name = max(names, key=lambda n: self.shares[n] * total - self.drawn[n])
        self.drawn[name] += 1
        return self.streams[name].next()

    @property
    def counts(self) -> dict[str, int]:
        """`source/seen`, `source/skipped/reason`: since the start of the run."""
        return {f"{name}/{key}": value for name, stream in self.streams.items() for key, value in stream.counts.items()}

    @property
    def left_out(self) -> dict[str, int]:
        """`source/skipped/reason`: what was already unreadable when the sources were indexed."""
        return {
            f"{name}/skipped/{reason}": count
            for name, stream in self.streams.items()
            for reason, count in stream.source.skipped.items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "drawn": dict(self.drawn),
            "streams": {name: stream.state_dict() for name, stream in self.streams.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state["streams"]) != set(self.streams):
            raise UserError(
                f"data.sources: the checkpoint was made with {sorted(state['streams'])}, this run has "
                f"{sorted(self.streams)}: resume with the same sources, or start a new run from its weights "
                "(stage.init_from)"
            )
        self.drawn = dict(state["drawn"])
        for name, stream in self.streams.items():
            stream.load_state_dict(state["streams"][name])
