"""RefCOCO, RefCOCO+ and RefCOCOg: the box of a phrase.

Files: those of `sphinx_pl.data.converters.refcoco`. Or the original's unified annotation, a JSON
list of {"image_path", "question": the phrase, "question_id": a text with "height427" and "width640"
in it, "gt_answers": [x1, y1, x2, y2] in pixels of the image}, as its `evaluate.py` reads it for the
metric miou0.5.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from sphinx_pl.data.converters import refcoco
from sphinx_pl.data.converters.common import asked, text
from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.readers.instruction_json import sizes
from sphinx_pl.data.schema import ImageRef, Record, Region
from sphinx_pl.evaluation.benchmarks.base import Benchmark
from sphinx_pl.evaluation.metrics import Metric, mean
from sphinx_pl.evaluation.scorers.base import Score
from sphinx_pl.evaluation.scorers.grounding import score_box


class RefCOCOBenchmark(Benchmark, refcoco.RefCOCOConverter):
    """Each phrase is a question, and the first box of an answer counts. Boxes are compared in the
    image without its padding. The original's script compares them in the padded square, which
    differs by a rounded pixel at most."""

    name = "refcoco"
    family = "grounding"
    splits: ClassVar[tuple[str, ...]] = ("val", "testA", "testB")

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        return (record for record in super().records(key, entry) if record.task == "rec")

    def annotation(self, key: str, entry: Mapping[str, Any]) -> Record:
        name = text(entry["question_id"])
        height, width = (re.search(rf"{side}(\d+)", name) for side in ("height", "width"))
        if not height or not width:
            raise ValueError(f"question_id {name} has no size")
        x1, y1, x2, y2 = (float(number) for number in entry["gt_answers"])
        phrase = asked(entry["question"])
        image = (ImageRef(text(entry["image_path"])),)
        size = sizes(int(width[1]), int(height[1]), key)
        return Record(key, "rec", image, size, question=phrase, regions=(Region((x1, y1, x2, y2), phrase),))

    def score(self, record: Record, answer: str, coordinates: Coordinates) -> Score:
        (region,), (size,) = record.regions, record.sizes
        return score_box(answer, region.box, size)

    @property
    def metrics(self) -> Sequence[Metric]:
        definition = "Share of the phrases whose box has an intersection over union of at least 0.5 with the true one."
        return (mean("accuracy", definition),)


class RefCOCOPlusBenchmark(RefCOCOBenchmark):
    name = "refcoco+"
    title = "RefCOCO+"


class RefCOCOgBenchmark(RefCOCOBenchmark):
    """The split of UMD, `refs(umd).p`."""

    name = "refcocog"
    title = "RefCOCOg"
    splits = ("val", "test")
    split_by = "umd"
