"""A canonical partition: its own part of every source and its own packer.

A run has a fixed number of partitions, whatever the number of ranks and workers that serve them. So
the order of the data does not depend on the hardware.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sphinx_pl.data.sampling.config import MODALITIES
from sphinx_pl.data.sampling.mixture import Mixture
from sphinx_pl.data.sampling.packing import PackingConfig, Row, fullest_rows
from sphinx_pl.data.schema import Sample
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.utils.errors import UserError

log = logging.getLogger(__name__)

_SETTLED = 100
"""Steps after which the shares of sources have settled and are compared with the configured."""
DRAWS_IN_VAIN = 1000
"""Draws in a row without a usable sample that stop a run."""
MAX_WAITING = 8
"""Global batches of samples that may wait for their turn. Where a modality is rarer than that,
steps lack it."""


class Partition:
    """A mixture and its packer: this partition's rows of every global batch, independent of other
    partitions.

    Its state is that of the mixture, and the samples that were drawn but not placed yet.
    """

    def __init__(self, mixture: Mixture, config: PackingConfig) -> None:
        self.mixture = mixture
        self.config = config
        self.pending: list[Sample] = []
        self._in_vain: Counter[str] = Counter()
        """Draws for each modality since one gave a sample of it."""
        self._met: set[str] = set()
        """Modalities that draws have given."""
        self.steps = 0
        """Steps that this process has planned."""
        self.without: Counter[str] = Counter()
        """Steps that lack a modality although the mixture has it."""
        self._placed: Counter[str] = Counter()
        """Samples of each modality in these steps."""
        self._shares_compared = False

    def plan(self, rows: int, modalities: Sequence[str] = MODALITIES) -> list[Row]:
        """The next `rows` rows; they are empty when the mixture has ended.

        Args:
            modalities: those that the rows must hold as long as the mixture has them.

        Raises:
            UserError: a single row cannot hold one sample of each modality, or too many draws give
                nothing usable.
        """
        config = self.config
        capacity = rows * config.row_length
        pool = list(self.pending)
        drawn_in_vain = 0
        missing = capacity * (1 + config.look_ahead) - sum(sample.length for sample in pool)
        while missing > 0 and not self.mixture.exhausted:
            before = len(pool)
            drawn_in_vain = self._draw(pool, None, drawn_in_vain)
            missing -= sum(sample.length for sample in pool[before:])
        # A small global batch could lack a modality with a small share, so it is asked for by name.
        # Samples drawn on the way have to wait. More would wait after every step if their number
        # had no bound.
        musts = []
        waiting = sum(sample.length for sample in pool)
        for modality in modalities:
            candidates = [sample for sample in pool if modality_of(sample) == modality]
            while not candidates and waiting < MAX_WAITING * capacity and modality in self.mixture.modalities:
                before = len(pool)
                self._in_vain[modality] = self._draw(pool, modality, self._in_vain[modality])
                waiting += sum(sample.length for sample in pool[before:])
                candidates = [sample for sample in pool[before:] if modality_of(sample) == modality]
            self.without[modality] += not candidates and modality in self.mixture.modalities
            if candidates:
                # A single row has to hold both modalities, so it takes the shortest. Else the
                # oldest sample is taken.
                musts.append(min(candidates, key=lambda sample: sample.length) if rows == 1 else candidates[0])
        if rows == 1 and sum(sample.length for sample in musts) > config.row_length:
            raise UserError(
                f"data.packing: one row of {config.row_length} positions cannot hold an image sample and a text "
                "sample, which every step needs: raise micro_batch_rows, row_length or stage.accumulate, or lower "
                "data.mixing.partitions"
            )
        # The samples that have waited longest come next, so that none waits for ever.
        self.steps += 1
        self._compare_shares()
        others = [sample for sample in pool if not any(sample is must for must in musts)]
        packed, self.pending = fullest_rows(
            [*musts, *others],
            rows,
            config.row_length,
            config.images_per_row,
            first=len(musts) if rows == 1 and musts else 1,
        )
        self._placed.update(modality_of(sample) for row in packed for sample in row)
        return packed + [[] for _ in range(rows - len(packed))]

    def _draw(self, pool: list[Sample], modality: str | None, in_vain: int) -> int:
        """Add a draw's samples to the pool; the result counts the draws in a row that gave none (of
        `modality`)."""
        for sample in self.mixture.draw(modality):
            if sample.length > self.config.row_length:
                self._leave_out(sample)
            else:
                pool.append(sample)
                self._met.add(modality_of(sample))
                in_vain = -1 if modality in (None, modality_of(sample)) else in_vain
        if in_vain >= DRAWS_IN_VAIN and modality not in self._met:
            what = f"{modality} sample (is data.sources.*.modality right?)" if modality else "usable sample"
            raise UserError(
                f"data: {DRAWS_IN_VAIN} draws in a row gave no {what}; so far: {self.mixture.counts}: "
                "check the sources' files and filters, or raise data.packing.row_length"
            )
        return in_vain + 1

    def _leave_out(self, sample: Sample) -> None:
        reason = SkipSample("longer_than_row", f"{sample.questions[0].key}: {sample.length} tokens")
        self.mixture.streams[sample.source].leave_out(sample, reason)

    def _compare_shares(self) -> None:
        """Warn once if what is trained on differs from the configuration."""
        if self._shares_compared or self.steps < _SETTLED:
            return
        self._shares_compared = True
        for modality, count in self.without.items():
            if count:
                log.warning(
                    "data: %d of the first %d steps have no %s sample (%.1f %% of all samples are): to have one in "
                    "each, raise data.packing.micro_batch_rows for larger steps, or the weight of sources that have "
                    "more of them",
                    count,
                    self.steps,
                    modality,
                    100 * self._placed[modality] / max(self._placed.total(), 1),
                )
        mixture = self.mixture
        total = sum(mixture.drawn.values())
        if any(stream.config.epochs is not None for stream in mixture.streams.values()) or not total:
            return  # shares change where sources end
        real = {name: count / total for name, count in mixture.drawn.items()}
        if odd := [name for name, share in mixture.shares.items() if abs(real[name] - share) > max(0.02, 0.2 * share)]:
            log.warning(
                "data: shares so far differ from the configured ones, since every step holds images and text: %s; "
                "raise data.packing.micro_batch_rows for larger steps, or change the weights",
                ", ".join(f"{name} {real[name]:.1%} instead of {mixture.shares[name]:.1%}" for name in odd),
            )

    def state_dict(self) -> dict[str, Any]:
        return {"mixture": self.mixture.state_dict(), "pending": list(self.pending), "met": sorted(self._met)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mixture.load_state_dict(state["mixture"])
        self.pending = []
        for sample in state["pending"]:
            if sample.length > self.config.row_length:  # rows were longer when it was drawn
                self._leave_out(sample)
            else:
                self.pending.append(sample)
        self._met = set(state.get("met", ()))


def modality_of(sample: Sample) -> str:
    """image or text: whether a sample has images."""
    return "image" if sample.images else "text"
