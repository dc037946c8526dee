"""Structure: `refer.py` of https://github.com/lichengunc/refer (what `REFER.__init__` and `createIndex` read)."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any, ClassVar

import pytest

from sphinx_pl.data.schema import ImageRef, Record, Region
from sphinx_pl.utils.errors import UserError

from .conftest import Run

INSTANCES = {
    "info": {"version": "1.0"},
    "licenses": [],
    "categories": [{"supercategory": "person", "id": 1, "name": "person"}],
    "images": [
        {"file_name": "COCO_train2014_000000581857.jpg", "id": 581857, "width": 640, "height": 427, "license": 1}
    ],
    "annotations": [
        {"id": 1719310, "image_id": 581857, "category_id": 1, "bbox": [0.0, 45.95, 238.92, 408.64 - 45.95]},
        {"id": 7, "image_id": 581857, "category_id": 1, "bbox": [0.0, 45.0, -3.0, 4.0]},
    ],
}


def ref(number: int, *sentences: str, split: Any = "train", ann_id: int = 1719310, **more: Any) -> dict[str, Any]:
    return {
        "ref_id": number,
        "ann_id": ann_id,
        "category_id": 1,
        "image_id": 581857,
        "file_name": "COCO_train2014_000000581857_16.jpg",
        "split": split,
        "sent_ids": list(range(len(sentences))),
        "sentences": [
            {"tokens": text.split(), "raw": text.upper(), "sent_id": i, "sent": text}
            for i, text in enumerate(sentences)
        ],
    } | more


class _Python2(pickle._Pickler):  # type: ignore[name-defined]
    """Writes text as Python 2 wrote its `str`."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_bytes_string(self, text: str) -> None:
        data = text.encode("latin1")
        self.write(b"U" + bytes([len(data)]) + data if self.bin else b"S" + repr(text).encode("latin1") + b"\n")
        self.memoize(text)

    dispatch[str] = save_bytes_string


def pickled(refs: Any, protocol: int) -> bytes:
    file = io.BytesIO()
    _Python2(file, protocol).dump(refs)
    return file.getvalue()


@pytest.mark.parametrize("protocol", [0, 2])
def test_a_phrase_is_to_be_found_and_to_be_said(run: Run, protocol: int) -> None:
    refs = [
        ref(0, "the lady with the blue shirt", "lady in caf\xe9", unknown_field=1.5),
        ref(1, "of another split", split="val"),
        ref(2, "box is inverted", ann_id=7),
        ref(8, " "),
        ref(3, "no such object", ann_id=8),
        ref(4, "no such image", image_id=9),
        ref(5, "of no split", split=None),
        {"ref_id": 6, "split": "train"},
        "no ref",
    ]
    files = {"instances.json": INSTANCES, "refs(unc).p": pickled(refs, protocol)}
    records, report = run("refcoco", files)
    image, size = (ImageRef("train2014/COCO_train2014_000000581857.jpg"),), ((640, 427),)
    box = (0.0, 45.95, 238.92, 408.64)
    expected = []
    for number, phrase in enumerate(("the lady with the blue shirt", "lady in caf\xe9")):
        region = (Region(box, phrase),)
        expected += [
            Record(f"0-{number}-rec", "rec", image, size, question=phrase, regions=region),
            Record(f"0-{number}-reg", "reg", image, size, regions=region),
        ]
    assert records == expected
    assert report.dropped == {
        "box_inverted": 1,
        "object_unknown": 1,
        "image_unknown": 1,
        "question_empty": 1,
        "entry_malformed": 3,
    }


@pytest.mark.parametrize(
    ("name", "split", "file", "there"),
    [
        ("refcoco", "testA", "refs(unc).p", "testA"),
        ("refcoco", "google-test", "refs(google).p", "test"),
        ("refcoco+", "testB", "refs(unc).p", "testB"),
        ("refcocog", "test", "refs(umd).p", "test"),
        ("refcocog", "google-val", "refs(google).p", "val"),
    ],
)
def test_splits(run: Run, name: str, split: str, file: str, there: str) -> None:
    refs = [ref(0, "one", split=there), ref(1, "other", split="other")]
    records, report = run(name, {"instances.json": INSTANCES, file: pickled(refs, 2)}, split)
    assert [record.task for record in records] == ["rec", "reg"]
    assert not report.dropped


class _Hostile:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_runs_nothing(run: Run, tmp_path: Path, protocol: int) -> None:
    hostile = [pickle.dumps([ref(0, "one"), _Hostile(tmp_path / f"ran{number}")], protocol) for number in range(2)]
    pickle.loads(hostile[0])
    assert (tmp_path / "ran0").is_dir()  # it would, were it let
    with pytest.raises(UserError, match=r"is no pickle of plain data \(it names \w+.mkdir\)"):
        run("refcoco", {"instances.json": INSTANCES, "refs(unc).p": hostile[1]})
    assert not (tmp_path / "ran1").exists()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(pickled([ref(0, "one")], 2)[:-9], id="cut"),
        pytest.param(b"", id="empty"),
        pytest.param(b"\x82\x01.", id="a registered extension"),
        pytest.param(b"P1\n.", id="a persistent id"),
        pytest.param(b"(lp0\nI1\nb.", id="state for a list"),
        pytest.param(b"S'os.system'\n(S'true'\ntR.", id="a call of text"),
        pytest.param(pickled({"a": 1}, 2), id="a dict"),
        pytest.param(b"I" + b"9" * 5000 + b"\n.", id="a number of 5000 digits"),
    ],
)
def test_a_pickle_that_is_no_list_of_plain_data(run: Run, content: bytes) -> None:
    with pytest.raises(UserError, match=r"refs\(unc\)\.p (is no pickle of plain data|holds no list)"):
        run("refcoco", {"instances.json": INSTANCES, "refs(unc).p": content})
