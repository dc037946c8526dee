"""Structure: COCO's captions as the converter's test has them, and Karpathy's dataset_coco.json."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.evaluation.benchmarks import coco_caption, load
from sphinx_pl.evaluation.benchmarks.coco_caption import COCOCaptionBenchmark
from sphinx_pl.evaluation.scorers.caption import scores_of_images
from sphinx_pl.utils.errors import UserError

from .conftest import Ask, Say

Write = Callable[..., Path]
java = pytest.mark.skipif(shutil.which("java") is None, reason="the tokenizer is Java's")

TRUE = {
    1: ["A dog runs over the green grass.", "A brown dog running in a field\n"],
    2: ["Two people ride bicycles down a street.", "Cyclists on a city road"],
    3: ["A bowl of soup on a wooden table", "Soup with bread beside it."],
}


def karpathy(*odd: Any) -> dict[str, Any]:
    images = [
        {
            "filepath": "val2014",
            "filename": f"COCO_val2014_{number:012d}.jpg",
            "cocoid": number,
            "imgid": number,
            "split": "test",
            "sentences": [{"raw": text, "tokens": text.split()} for text in captions],
        }
        for number, captions in TRUE.items()
    ]
    return {
        "dataset_coco.json": {"images": [*images, images[0] | {"cocoid": 9, "split": "val"}, *odd], "dataset": "coco"}
    }


def release() -> dict[str, Any]:
    images = [{"id": n, "file_name": f"{n:012d}.jpg", "width": 9, "height": 6} for n in (*TRUE, 4)]
    captions = [{"id": 10 * n + i, "image_id": n, "caption": text} for n in TRUE for i, text in enumerate(TRUE[n])]
    document = {"images": images, "annotations": [*captions, {"id": 1, "image_id": 77, "caption": "of no image"}]}
    return {"annotations/captions_val2017.json": document}


@java
def test_figures_are_those_of_the_official_evaluation(
    ask: Ask, write: Write, question: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[tuple[list[str], list[list[str]], dict[str, float]]] = []

    def noted(captions: dict[str, str], references: dict[str, list[str]]) -> Any:
        """Java takes seconds, so it scores once."""
        figures = scores_of_images(captions, references)
        scored.append(([*captions.values()], [*references.values()], figures[0]))
        return figures

    monkeypatch.setattr(coco_caption, "scores_of_images", noted)
    src = write(karpathy({"split": "test", "cocoid": 5}, {"split": "test", "cocoid": 6, "sentences": []}, "x"))
    answers = {1: "a dog runs in a field", 2: "two dogs", 3: ""}
    benchmark = COCOCaptionBenchmark(src)
    asked = ask(benchmark, lambda record: answers[record.meta["image_id"]])
    record = asked.questions.records[0]
    assert record.images == (ImageRef(str(src / "val2014/COCO_val2014_000000000001.jpg")),)
    assert question(record) == "Provide a one-sentence caption for the provided image."
    assert asked.result["lost"] == {"entry_malformed": 3}
    [(captions, references, expected)] = scored
    assert captions == [answers[n] for n in TRUE]
    assert references == [[" ".join(caption.split()) for caption in TRUE[n]] for n in TRUE]
    for name in ("CIDEr", "BLEU-4", "METEOR", "ROUGE-L"):
        assert asked.values[name, ""] == pytest.approx(expected[name])
    intervals = {value["measure"]: (value["low"], value["high"]) for value in asked.result["values"]}
    low, high = intervals["CIDEr"]
    assert low < expected["CIDEr"] < high
    # BLEU and METEOR are of all answers together: a resample of unequal images is not known.
    assert intervals["BLEU-4"] in ((None, None), (expected["BLEU-4"],) * 2)
    assert asked.result["unparsed"] == 1
    (sentence,) = benchmark.submit(asked.predictions, tmp_path)
    assert json.loads((tmp_path / "captions_karpathy_test_results.json").read_text())[1] == {
        "image_id": 2,
        "caption": "two dogs",
    }
    assert sentence


@pytest.mark.long
def test_where_all_captions_have_0_the_interval_goes_by_what_a_score_can_be(ask: Ask, write: Write) -> None:
    asked = ask(COCOCaptionBenchmark(write(karpathy())), lambda record: "xyzzy")
    intervals = {value["measure"]: (value["low"], value["high"]) for value in asked.result["values"]}
    others = 1 - 0.025 ** (1 / asked.result["n"])  # share of images that may be unlike those asked
    assert intervals["CIDEr"] == (0, pytest.approx(10 * others))
    assert intervals["ROUGE-L"] == (0, pytest.approx(others))


def read(benchmark: COCOCaptionBenchmark) -> tuple[list[Record], Counter[str]]:
    """Records, and what is of no use, by reason: scoring takes Java seconds."""
    records: list[Record] = []
    lost: Counter[str] = Counter()
    for _, result in benchmark.read():
        if isinstance(result, SkipSample):
            lost[result.reason] += 1
        else:
            records += result
    return records, lost


def test_the_release_itself(write: Write) -> None:
    records, lost = read(COCOCaptionBenchmark(write(release()), "val2017"))
    assert [(record.key, record.meta) for record in records] == [
        (str(n), {"image_id": n, "captions": [" ".join(text.split()) for text in TRUE[n]]}) for n in TRUE
    ]
    assert records[0].images == (ImageRef("val2017/000000000001.jpg"),)
    assert lost == {"answers_empty": 1, "image_unknown": 1}


def test_the_unified_annotation(write: Write) -> None:
    entries = [{"image_path": f"{n}.jpg", "question": "", "question_id": n, "gt_answers": TRUE[n]} for n in TRUE]
    odd = [{"image_path": "x.jpg", "gt_answers": []}, {"image_path": "x.jpg", "gt_answers": [1]}]
    records, lost = read(COCOCaptionBenchmark(write({"all.json": [*entries, *odd]}) / "all.json"))
    assert [record.meta["image_id"] for record in records] == list(TRUE)
    assert lost == {"answers_empty": 1, "entry_malformed": 1}


def test_without_java_nothing_is_asked(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="need Java"):
        load("it", COCOCaptionBenchmark(write(karpathy())))
