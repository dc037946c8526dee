"""The mixture: which source the next sample comes from, by the shares that a tree of weights gives.

All that is random here is a function of (seed, source, epoch). So the state of a mixture is a few
integers, the same for any number of ranks and data workers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from sphinx_pl.data.augment import AugmentConfig
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.sampling.config import MODALITIES, Group, MixingConfig
from sphinx_pl.data.sampling.stream import SourceStream
from sphinx_pl.data.schema import Sample
from sphinx_pl.data.skip import counter_of
from sphinx_pl.utils.errors import UserError

log = logging.getLogger(__name__)


def check_names(state: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises: UserError: the position `state` of a mixture belongs to other sources."""
    if set(state["streams"]) != set(names):
        raise UserError(
            f"data.sources: the checkpoint was made with {sorted(state['streams'])}, this run has "
            f"{sorted(names)}: resume with the same sources, or start a new run from its weights (stage.init_from)"
        )


class Mixture:
    """Draws from sources so that after every draw each source's share is as near to its weight as
    possible.

    Questions about one image are joined up to `max_length` tokens, and up to the processor's own
    limit.

    Args:
        sources: the tree of sources, as `Group.from_dict` takes it under "sources".
        partition, partitions: which part of every source is drawn from, and of how many.
    """

    def __init__(
        self,
        sources: Mapping[str, Any],
        processor: Processor,
        seed: int,
        max_length: int = 1 << 30,
        mixing: MixingConfig | None = None,
        augment: AugmentConfig | None = None,
        partition: int = 0,
        partitions: int = 1,
    ) -> None:
        self.mixing = mixing or MixingConfig()
        self.group = Group.from_dict({"sources": sources, "temperature": self.mixing.temperature})
        configs = dict(self.group.leaves())
        opened = {name: config.open(name) for name, config in configs.items() if config.weight > 0}
        sizes = {name: source.size()[0] for name, source in opened.items()} if self.group.needs_sizes else {}
        self.shares = self.group.shares(dict.fromkeys(configs, 0) | sizes)
        for name in sizes.keys() - self.shares.keys():
            log.warning("source %s has no record that can be read: it is left out", name)
        if not self.shares and sizes:
            raise UserError(f"data.sources: no record can be read in {', '.join(sizes)}")
        if not self.shares:
            raise UserError("data.sources is empty: give at least one source with a weight above 0")
        self.streams = {}
        for name in self.shares:
            config = configs[name]
            if config.epochs is None:
                config.epochs = self.mixing.epochs
            self.streams[name] = SourceStream(
                name, config, opened[name], processor, seed, max_length, augment, partition, partitions
            )
        self.drawn = dict.fromkeys(self.shares, 0)

    @property
    def finite(self) -> bool:
        """Whether the mixture ends."""
        return all(stream.config.epochs is not None for stream in self.streams.values())

    @property
    def exhausted(self) -> bool:
        return all(stream.exhausted for stream in self.streams.values())

    @property
    def modalities(self) -> list[str]:
        """The modalities that still have samples."""
        live = {stream.config.modality for stream in self.streams.values() if not stream.exhausted}
        return [modality for modality in MODALITIES if modality in live]

    def draw(self, modality: str | None = None) -> list[Sample]:
        """Samples of the source (of `modality`) that is furthest behind its share; none if all
        sources have ended."""
        live = [name for name, stream in self.streams.items() if not stream.exhausted]
        names = [name for name in live if modality in (None, self.streams[name].config.modality)]
        if not names:
            return []
        # The share of a source that has ended goes to the others in proportion.
        total = (sum(self.drawn[name] for name in live) + 1) / sum(self.shares[name] for name in live)
        name = max(names, key=lambda n: self.shares[n] * total - self.drawn[n])
        samples = self.streams[name].next()
        targets = sum(sample.targets for sample in samples)
        self.drawn[name] += targets if self.mixing.unit == "token" and targets else 1
        return samples

    @property
    def counts(self) -> dict[str, int]:
        """`source/seen`, `skipped/source/reason` and other counters since the start of the run."""
        streams = self.streams.items()
        return {counter_of(name, key): value for name, stream in streams for key, value in stream.counts.items()}

    @property
    def left_out(self) -> dict[str, int]:
        """`skipped/source/reason` of what was unreadable when shards were opened."""
        return {
            counter_of(name, f"skipped/{reason}"): count
            for name, stream in self.streams.items()
            for reason, count in stream.left_out.items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "drawn": dict(self.drawn),
            "streams": {name: stream.state_dict() for name, stream in self.streams.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_names(state, self.streams)
        self.drawn = dict(state["drawn"])
        for name, stream in self.streams.items():
            stream.load_state_dict(state["streams"][name])
