"""What benchmarks with answers of a word or a phrase have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.schema import Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.evaluation.benchmarks import Benchmark, Verdict
from sphinx_pl.evaluation.measures import Measure, mean


class ShortAnswers(Benchmark):
    """One number: the mean score of the answers. meta["answers"] has the true ones, where there are several."""

    measure: ClassVar[tuple[str, str]]
    """Its name and its definition."""

    @abstractmethod
    def score(self, prediction: str, answers: Sequence[str]) -> float:
        """In 0..1."""

    def read(self) -> Iterator[tuple[str, list[Record] | SkipSample]]:
        """As `Benchmark.read`; answers that are no texts are bad."""
        for key, found in super().read():
            texts = isinstance(found, SkipSample) or all(isinstance(a, str) for r in found for a in _answers(r))
            yield key, found if texts else SkipSample("answers_malformed", key)

    def verdict(self, record: Record, answer: str, coordinates: Coordinates) -> Verdict:
        return Verdict(float(self.score(answer, _answers(record))), bool(answer.strip()))

    @property
    def measures(self) -> Sequence[Measure]:
        return () if self.is_hidden else (mean(*self.measure),)


def _answers(record: Record) -> Sequence[str]:
    return record.meta.get("answers") or [record.answer]
