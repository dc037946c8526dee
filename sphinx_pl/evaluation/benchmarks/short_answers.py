"""The part that benchmarks share whose answers are a word or a phrase."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.schema import Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.evaluation.benchmarks.base import Benchmark
from sphinx_pl.evaluation.metrics import Metric, mean
from sphinx_pl.evaluation.scorers.base import Score


class ShortAnswerBenchmark(Benchmark):
    """Benchmarks of short answers have one number: the mean score. meta["answers"] holds the true
    answers, if several."""

    metric: ClassVar[tuple[str, str]]
    """The name of the number and its definition."""

    @abstractmethod
    def agreement(self, prediction: str, answers: Sequence[str]) -> float:
        """The agreement of a prediction with the true answers, from 0 to 1."""

    def read(self) -> Iterator[tuple[str, list[Record] | SkipSample]]:
        """As `Benchmark.read`; a record whose answers are not all texts is bad."""
        for key, records in super().read():
            texts = isinstance(records, SkipSample) or all(isinstance(a, str) for r in records for a in _answers(r))
            yield key, records if texts else SkipSample("answers_malformed", key)

    def score(self, record: Record, answer: str, coordinates: Coordinates) -> Score:
        return Score(self.agreement(answer, _answers(record)), bool(answer.strip()))

    @property
    def metrics(self) -> Sequence[Metric]:
        return () if self.is_hidden else (mean(*self.metric),)


def _answers(record: Record) -> Sequence[str]:
    return record.meta.get("answers") or [record.answer]
