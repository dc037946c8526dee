"""Structure: "Annotations" in the README of https://github.com/google-research-datasets/hiertext."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from sphinx_pl.data.schema import ImageRef, Record, Region
from sphinx_pl.utils.errors import UserError

from .conftest import Run


def word(text: str, *vertices: list[float], legible: bool = True) -> dict[str, Any]:
    return {"vertices": vertices, "text": text, "legible": legible, "handwritten": False, "vertical": False}


def line(text: str, *words: dict[str, Any], vertices: Any = ((-50, -50), (990, 0), (990, 90), (0, 90))) -> Any:
    legible = all(word["legible"] for word in words)
    return {"vertices": vertices, "text": text, "legible": legible, "handwritten": False, "words": words}


def image(name: Any, *lines: Any) -> dict[str, Any]:
    paragraph = {"vertices": [[0, 0]], "legible": True, "lines": lines}
    return {"image_id": name, "image_width": 800, "image_height": 600, "paragraphs": [paragraph], "unknown_field": 1}


# The first word leans: its polygon is no rectangle along the axes.
LEANING = word("HELLO", [10, 20], [110, 5], [115, 45], [14, 61])
DOCUMENT = {
    "info": {"date": "2022", "version": "v1.0"},
    "annotations": [
        image(
            "00a1",
            line("HELLO WORLD ", LEANING, word("WORLD", [120, 8], [200, 8], [200, 44], [120, 44])),
            line("no words", vertices=[[-20, 300], [90, 300], [90, 340], [-20, 340]]),
            line("", word("", [1, 1], [9, 1], [9, 9], legible=False)),
        ),
        # What is asked for are all texts: none of these can be left out.
        *(
            image(f"00b{number}", line("no words", vertices=[[0, 30], [90, 30], [90, 34]]), bad)
            for number, bad in enumerate(
                (
                    line(" ", word(" ", [1, 1], [9, 1], [9, 9])),
                    line("beyond", word("beyond", [801, 1], [900, 1], [900, 9])),
                    line("flat", word("flat", [1, 1], [9, 1])),
                    {"text": "no vertices", "legible": True},
                )
            )
        ),
        image("00b9", {"text": "no legible"}),
        image("00a2", line("", word("", [1, 1], [9, 1], [9, 9], legible=False))),
        image("00a3") | {"image_width": "wide"},
        {"image_id": "00a4", "image_width": 800, "image_height": 600},
        "no image",
    ],
}


@pytest.mark.parametrize("compressed", [True, False])
def test_legible_lines_are_read_with_and_without_boxes(run: Run, compressed: bool) -> None:
    data = json.dumps(DOCUMENT).encode()
    files = {"gt/train.jsonl.gz": gzip.compress(data)} if compressed else {"gt/train.jsonl": data}
    records, report = run("hiertext", files)
    where, size = (ImageRef("train/00a1.jpg"),), ((800, 600),)
    regions = (Region((10.0, 5.0, 200.0, 61.0), "HELLO WORLD"), Region((0.0, 300.0, 90.0, 340.0), "no words"))
    assert records == [
        Record("00a1-boxes", "ocr", where, size, regions=regions),
        Record("00a1-text", "ocr_text", where, size, regions=regions),
    ]
    assert report.left_out == {
        "line_illegible": 2,
        "label_empty": 1,
        "box_inverted": 2,
        "part_malformed": 1,
    }
    assert report.skipped == {"image_without_legible_line": 1}
    assert report.dropped == {"part_left_out": 4, "size_malformed": 1, "entry_malformed": 3}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(gzip.compress(json.dumps(DOCUMENT).encode())[:-40], id="cut"),
        pytest.param(b"{}", id="not compressed"),
        pytest.param(gzip.compress(b'{"annotations": [{"image_id": "00a1"}, {'), id="cut before compression"),
        pytest.param(gzip.compress(b'{"images": []}'), id="no list"),
    ],
)
def test_a_damaged_file(run: Run, content: bytes) -> None:
    with pytest.raises(UserError, match=r"train.jsonl.gz is not readable as JSON"):
        run("hiertext", {"train.jsonl.gz": content})
