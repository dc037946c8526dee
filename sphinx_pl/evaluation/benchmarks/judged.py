"""Benchmarks whose answers a language model judges."""

from __future__ import annotations

from collections.abc import Sequence

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.schema import Record
from sphinx_pl.evaluation.benchmarks import Verdict
from sphinx_pl.evaluation.benchmarks.official_only import OfficialOnly
from sphinx_pl.evaluation.measures import Measure


class Judged(OfficialOnly):
    """No number: `submit` writes the file for the official judge and says how it is called; nothing here calls it."""

    def verdict(self, record: Record, answer: str, coordinates: Coordinates) -> Verdict:
        return Verdict(0.0, bool(answer.strip()))

    @property
    def measures(self) -> Sequence[Measure]:
        return ()
