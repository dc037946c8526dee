"""Benchmarks that the original's unified annotation does not hold enough of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sphinx_pl.data.schema import Record
from sphinx_pl.evaluation.benchmarks import Benchmark
from sphinx_pl.utils.errors import UserError


class OfficialOnly(Benchmark):
    """Reads its official files alone."""

    def annotation(self, key: str, entry: Mapping[str, Any]) -> Record:
        raise UserError(f"{self.name}: src={self.src}/{self.unified} must be the folder of the files of {self.url}")
