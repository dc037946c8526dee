"""COCO captions: one sentence on each image, compared with five (Chen et al. 2015, arXiv
1504.00325).

Files: `annotations/captions_val2014.json` or `captions_val2017.json` as the converter says
(`sphinx_pl.data.converters.coco_captions`), or Karpathy's division of 2014's images,
`dataset_coco.json` (https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip):
{"images": [{"cocoid", "filepath": "val2014", "filename", "split": "train", "restval", "val" or
"test", "sentences": [{"raw", ...}]}]}. Or the original's unified annotation, whose gt_answers are
the captions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from sphinx_pl.data.converters import coco, id_of
from sphinx_pl.data.converters.common import text
from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.evaluation.benchmarks.base import Benchmark
from sphinx_pl.evaluation.metrics import Metric, Prepared, Sums, Unsplittable, ratio
from sphinx_pl.evaluation.runner import Prediction
from sphinx_pl.evaluation.scorers.base import Score
from sphinx_pl.evaluation.scorers.caption import check_caption_tools, scores_of_images
from sphinx_pl.evaluation.scorers.tasks import caption_f1
from sphinx_pl.utils.files import write_whole

Figures = tuple[dict[str, float], dict[str, dict[str, float]]]
_KARPATHY = "karpathy_"


class COCOCaptionBenchmark(Benchmark, coco.CocoConverter):
    """CIDEr weighs words by the references of all images that were asked, so figures of a part do
    not compare with those of the whole. Its interval takes these weights as given."""

    name = "coco_caption"
    title = "COCO captions"
    family = "captions"
    splits = ("karpathy_test", "karpathy_val", "val2014", "val2017")
    tasks: ClassVar[tuple[str, ...]] = ("caption",)

    def __init__(self, src: Path | None, split: str | None = None, images: Path | None = None) -> None:
        super().__init__(src, split, images)
        self._cached: dict[int, Figures] = {}

    def check(self) -> None:
        check_caption_tools()

    @property
    def release(self) -> str:
        return self.split

    def entries(self) -> Iterator[tuple[str, Any]]:
        """(id, (id, path below the images' folder, captions))."""
        if self.split.startswith(_KARPATHY):
            for image in self.json("dataset_coco.json")["images"]:
                if id_of(image, "split") in (self.split.removeprefix(_KARPATHY), None):
                    yield str(id_of(image, "cocoid")), image
        else:
            yield from coco.by_image(self.document("captions"))

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        if self.split.startswith(_KARPATHY):
            if entry["split"] != self.split.removeprefix(_KARPATHY):
                raise ValueError("not of the split")
            number, path = entry["cocoid"], f"{text(entry['filepath'])}/{text(entry['filename'])}"
            captions = [sentence["raw"] for sentence in entry["sentences"]]
        else:
            image, annotations = entry
            path, _ = self.image(image)
            number, captions = image["id"], [annotation["caption"] for annotation in annotations]
        yield _record(key, path, captions, number)

    def annotation(self, key: str, entry: Mapping[str, Any]) -> Record:
        truth = entry["gt_answers"]
        captions = truth if isinstance(truth, list) else [truth]
        return _record(key, text(entry["image_path"]), captions, entry.get("question_id"))

    def score(self, record: Record, answer: str, coordinates: Coordinates) -> Score:
        """The words in common with the nearest caption. The official figures are of all answers
        together."""
        return Score(
            max(
                caption_f1(answer, Record("", "caption", record.images, answer=one), coordinates)
                for one in _true(record)
            ),
            bool(answer.strip()),
        )

    @property
    def metrics(self) -> Sequence[Metric]:
        return (
            Captions("CIDEr", "CIDEr-D (Vedantam et al. 2015), times 100.", self._scored),
            Captions("BLEU-4", "BLEU of up to four words; without an interval.", self._scored),
            Captions("METEOR", "METEOR; without an interval.", self._scored),
            Captions("ROUGE-L", "ROUGE-L, mean over images.", self._scored),
        )

    def _scored(self, predictions: Sequence[Prediction]) -> Figures:
        """All figures. They are computed together, and slowly, and each metric takes its own."""
        name = hash(tuple((p.key, p.prediction) for p in predictions))
        if name not in self._cached:
            captions = {p.key: p.prediction for p in predictions}
            references = {p.key: p.record["meta"]["captions"] for p in predictions}
            self._cached[name] = scores_of_images(captions, references)
        return self._cached[name]

    def submit(self, predictions: Sequence[Prediction], folder: Path) -> list[str]:
        """Write the answers in COCO's format of results."""
        file = folder / f"captions_{self.split}_results.json"
        answers = [{"image_id": p.record["meta"].get("image_id"), "caption": p.prediction} for p in predictions]
        write_whole(file, json.dumps(answers, ensure_ascii=False) + "\n")
        return [f"COCO captions in the format of its results: {file}"]


@dataclass(frozen=True)
class Captions:
    """One figure of `scores_of_images` as a `Metric`, whose units are images."""

    name: str
    description: str
    scored: Any
    percent: bool = True

    def prepare(self, predictions: Sequence[Prediction]) -> Prepared:
        figures, of_images = self.scored(predictions)
        units = [prediction.key for prediction in predictions]
        if self.name not in of_images:
            return Unsplittable(units, figures[self.name])
        rows = np.array([[of_images[self.name][unit], 1.0] for unit in units])
        return Sums(units, rows, ratio, most=10 if self.name == "CIDEr" else 1)


def _record(key: str, path: str, captions: Sequence[Any], number: Any) -> Record:
    """The record of an image.

    Raises:
        SkipSample: it has no caption.
    """
    cleaned = [" ".join(text(caption).split()) for caption in captions]
    if not (filled := [caption for caption in cleaned if caption]):
        raise SkipSample("answers_empty", key)
    meta = {"captions": filled, "image_id": number}
    return Record(key, "caption", (ImageRef(path),), answer=filled[0], meta=meta)


def _true(record: Record) -> Sequence[str]:
    captions: Sequence[str] = record.meta["captions"]
    return captions
