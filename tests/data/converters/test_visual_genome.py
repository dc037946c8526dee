"""Structure: https://homes.cs.washington.edu/~ranjay/visualgenome/api_readme.html.

"id" and "names" beside "image_id" and "name": https://github.com/ranjaykrishna/visual_genome_python_driver.
"""

from __future__ import annotations

from typing import Any

import pytest

from sphinx_pl.data.schema import ImageRef, Record, Region
from sphinx_pl.utils.errors import UserError

from .conftest import Run

IMAGES = [
    {
        "image_id": 2,
        "url": "https://cs.stanford.edu/people/rak248/VG_100K_2/2.jpg",
        "width": 800,
        "height": 600,
        "coco_id": None,
        "flickr_id": None,
    },
    {"image_id": 3, "url": 3, "width": 800, "height": 600},
]
IMAGE, SIZE = (ImageRef("VG_100K_2/2.jpg"),), ((800, 600),)


def test_a_region_is_to_be_found_and_to_be_said(run: Run) -> None:
    def region(number: int, phrase: Any, x: Any, y: int, width: int, height: int) -> dict[str, Any]:
        box = {"x": x, "y": y, "width": width, "height": height}
        return {"region_id": number, "image_id": 2, "phrase": phrase, **box, "synsets": [], "unknown_field": 1}

    file = [
        {
            "id": 2,
            "regions": [
                region(1353, "a cat sitting on a table. ", -1, 79, 249, 107),
                region(1354, "far out", 700, 79, 249, 107),
                region(1355, "empty", 700, 79, 0, 107),
                region(1356, " ", 1, 1, 9, 9),
                region(1357, "with <p>markup</p>", 1, 1, 9, 9),
                region(1358, None, 1, 1, 9, 9),
                region(1359, "no x", None, 1, 9, 9),
                region(1353, "again", 1, 1, 9, 9),
            ],
        },
        {"image_id": 2, "regions": [region(1360, "a white cat", 116, 29, 239, 135)]},
        {"id": 3, "regions": [region(1, "an image without place", 1, 1, 9, 9)]},
        {"id": 4, "regions": [region(1, "an unknown image", 1, 1, 9, 9)]},
        {"id": 2},
    ]
    records, report = run("vg_regions", {"image_data.json": IMAGES, "region_descriptions.json": file})
    cat, white = (
        Region((-1.0, 79.0, 248.0, 186.0), "a cat sitting on a table."),
        Region((116.0, 29.0, 355.0, 164.0), "a white cat"),
    )
    assert records == [
        Record("2-1353-rec", "rec", IMAGE, SIZE, question="a cat sitting on a table.", regions=(cat,)),
        Record("2-1353-reg", "reg", IMAGE, SIZE, regions=(cat,)),
        Record("2-1360-rec", "rec", IMAGE, SIZE, question="a white cat", regions=(white,)),
        Record("2-1360-reg", "reg", IMAGE, SIZE, regions=(white,)),
    ]
    assert report.dropped == {
        "box_outside": 1,
        "box_inverted": 1,
        "question_empty": 1,
        "label_markup": 1,
        "duplicate_key": 1,
        "image_unknown": 1,
        "entry_malformed": 4,
    }


def test_a_relationship_has_a_subject_and_an_object(run: Run) -> None:
    man = {"object_id": 1, "name": "man", "x": 10, "y": 20, "w": 100, "h": 200, "synsets": ["man.n.01"]}
    horse = {"object_id": 2, "names": ["horse", "pony"], "x": 0, "y": 100, "w": 300, "h": 400, "synsets": []}

    def relationship(number: int, predicate: Any, **more: Any) -> dict[str, Any]:
        return {
            "relationship_id": number,
            "predicate": predicate,
            "subject": man,
            "object": horse,
            "synsets": [],
            "unknown_field": 1,
        } | more

    relationships = [
        relationship(15927, "ON "),
        relationship(15928, ""),
        relationship(15929, "on", object=man | {"w": 0}),
        relationship(15930, "on", object={"names": []}),
        None,
    ]
    file = [{"image_id": 2, "relationships": relationships}]
    records, report = run("vg_relationships", {"image_data.json": IMAGES, "relationships.json": file})
    regions = (Region((10.0, 20.0, 110.0, 220.0), "man"), Region((0.0, 100.0, 300.0, 500.0), "horse"))
    assert records == [Record("2-15927", "relation_detection", IMAGE, SIZE, answer="on", regions=regions)]
    assert report.dropped == {"answer_empty": 1, "box_inverted": 1, "entry_malformed": 2}


def test_questions(run: Run) -> None:
    def question(number: int, answer: Any) -> dict[str, Any]:
        return {"qa_id": number, "image_id": 2, "question": "Where are the clouds?", "answer": answer, "a_objects": []}

    file = [{"id": 2, "qas": [question(912402, "In the sky."), question(912403, "."), question(912404, 4)]}]
    records, report = run("vg_questions", {"image_data.json": IMAGES, "question_answers.json": file})
    assert records == [
        Record("2-912402", "short_vqa", IMAGE, SIZE, question="Where are the clouds?", answer="In the sky")
    ]
    assert report.dropped == {"answer_empty": 1, "entry_malformed": 1}


@pytest.mark.parametrize("content", [b'{"a": 1}', b'[{"id": 2}, {"id"', b'[{"id": 2}', b"\xff"])
def test_a_damaged_file(run: Run, content: bytes) -> None:
    with pytest.raises(UserError, match=r"region_descriptions.json is not readable as JSON"):
        run("vg_regions", {"image_data.json": IMAGES, "region_descriptions.json": content})
