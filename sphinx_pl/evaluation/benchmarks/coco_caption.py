"""COCO captions: one sentence on each image, compared with five (Chen et al. 2015, arXiv 1504.00325).

Files: `annotations/captions_val2014.json` or `captions_val2017.json` as the converter says
(`sphinx_pl.data.converters.coco_captions`), or Karpathy's division of 2014's images, `dataset_coco.json`
(https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip): {"images": [{"cocoid", "filepath":
"val2014", "filename", "split": "train", "restval", "val" or "test", "sentences": [{"raw", ...}]}]}. Or the original's
unified annotation, whose gt_answers are the captions.
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
from sphinx_pl.evaluation.benchmarks import Benchmark, Verdict
from sphinx_pl.evaluation.measures import Measure, Prepared, Sums, Whole, ratio
from sphinx_pl.evaluation.metrics import caption_f1
from sphinx_pl.evaluation.runner import Prediction
from sphinx_pl.evaluation.scorers.caption import check_caption_tools, scores_of_images
from sphinx_pl.utils.files import write_whole

Scores = tuple[dict[str, float], dict[str, dict[str, float]]]
_KARPATHY = "karpathy_"


class CocoCaption(Benchmark, coco.CocoConverter):
    """CIDEr weighs words by the references of all images that were asked, so figures of a part are not comparable to
    those of the whole. Its interval takes these weights for given."""

    name = "coco_caption"
    title = "COCO captions"
    family = "captions"
    splits = ("karpathy_test", "karpathy_val", "val2014", "val2017")
    tasks: ClassVar[tuple[str, ...]] = ("caption",)

    def __init__(self, src: Path | None, split: str | None = None, images: Path | None = None) -> None:
        super().__init__(src, split, images)
        self._known: dict[int, Scores] = {}

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
        found = entry["gt_answers"]
        captions = found if isinstance(found, list) else [found]
        return _record(key, text(entry["image_path"]), captions, entry.get("question_id"))

    def verdict(self, record: Record, answer: str, coordinates: Coordinates) -> Verdict:
        """Words in common with the nearest caption: the official figures are of all answers together."""
        return Verdict(
            max(
                caption_f1(answer, Record("", "caption", record.images, answer=one), coordinates)
                for one in _true(record)
            ),
            bool(answer.strip()),
        )

    @property
    def measures(self) -> Sequence[Measure]:
        return (
            Captions("CIDEr", "CIDEr-D (Vedantam et al. 2015), times 100.", self._scored),
            Captions("BLEU-4", "BLEU of up to four words; without an interval.", self._scored),
            Captions("METEOR", "METEOR; without an interval.", self._scored),
            Captions("ROUGE-L", "ROUGE-L, mean over images.", self._scored),
        )

    def _scored(self, predictions: Sequence[Prediction]) -> Scores:
        """All figures, of which each measure takes its own: they are computed together, and slowly."""
        name = hash(tuple((p.key, p.prediction) for p in predictions))
        if name not in self._known:
            captions = {p.key: p.prediction for p in predictions}
            references = {p.key: p.record["meta"]["captions"] for p in predictions}
            self._known[name] = scores_of_images(captions, references)
        return self._known[name]

    def submit(self, predictions: Sequence[Prediction], folder: Path) -> list[str]:
        """COCO's format of results."""
        file = folder / f"captions_{self.split}_results.json"
        answers = [{"image_id": p.record["meta"].get("image_id"), "caption": p.prediction} for p in predictions]
        write_whole(file, json.dumps(answers, ensure_ascii=False) + "\n")
        return [f"COCO captions in the format of its results: {file}"]


@dataclass(frozen=True)
class Captions:
    """One figure of `scores_of_images` as a `Measure`, whose units are images."""

    name: str
    description: str
    scored: Any
    percent: bool = True

    def prepare(self, predictions: Sequence[Prediction]) -> Prepared:
        figures, of_images = self.scored(predictions)
        units = [prediction.key for prediction in predictions]
        if self.name not in of_images:
            return Whole(units, figures[self.name])
        rows = np.array([[of_images[self.name][unit], 1.0] for unit in units])
        return Sums(units, rows, ratio, most=10 if self.name == "CIDEr" else 1)


def _record(key: str, path: str, captions: Sequence[Any], number: Any) -> Record:
    """Raises: SkipSample: no caption."""
    cleaned = [" ".join(text(caption).split()) for caption in captions]
    if not (kept := [caption for caption in cleaned if caption]):
        raise SkipSample("answers_empty", key)
    meta = {"captions": kept, "image_id": number}
    return Record(key, "caption", (ImageRef(path),), answer=kept[0], meta=meta)


def _true(record: Record) -> Sequence[str]:
    captions: Sequence[str] = record.meta["captions"]
    return captions
