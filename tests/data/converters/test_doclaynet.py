"""Structure: the example records in the README of https://github.com/DS4SD/DocLayNet."""

from __future__ import annotations

from typing import Any

from sphinx_pl.data.schema import ImageRef, Record, Region

from .conftest import Run


def test_a_page_is_a_record_with_all_its_elements(run: Run) -> None:
    def image(number: int, precedence: int = 0) -> dict[str, Any]:
        return {
            "id": number,
            "width": 1025,
            "height": 1025,
            "file_name": f"{number:064x}.png",
            "doc_category": "financial_reports",
            "collection": "ann_reports_00_04_fancy",
            "doc_name": "NASDAQ_FFIN_2002.pdf",
            "page_no": 9,
            "precedence": precedence,
            "unknown_field": None,
        }

    def element(number: int, page: int, category: Any, bbox: Any, precedence: int = 0) -> dict[str, Any]:
        return {
            "id": number,
            "image_id": page,
            "category_id": category,
            "bbox": bbox,
            "segmentation": [[]],
            "area": 1.0,
            "iscrowd": 0,
            "precedence": precedence,
        }

    document = {
        "categories": [
            {"supercategory": "Caption", "id": 1, "name": "Caption"},
            {"supercategory": "Picture", "id": 7, "name": "Picture"},
        ],
        "images": [image(1), image(2, precedence=1), image(3), image(4) | {"file_name": 4}, image(5), image(6)],
        "annotations": [
            element(8, 1, 1, [210.0, 31.0, 173.5, 39.25]),
            element(9, 1, 7, [434.5, -0.5, 589.5, 590.0]),
            element(10, 1, 7, [434.5, -0.5, 589.5, 590.0], precedence=1),
            # What is asked for are all elements of a page.
            *(element(11, 5, 7, [0, 0, 2000, 10]), element(15, 5, 7, [0, 0, 200, 10])),
            *(element(12, 6, None, [0, 0, 200, 10]), element(16, 6, 7, [0, 0, 200, 10])),
            element(13, 2, 7, [0, 0, 200, 10]),
            element(14, 4, 7, [0, 0, 200, 10]),
        ],
    }
    records, report = run("doclaynet", {"COCO/val.json": document}, split="val")
    regions = (
        Region((210.0, 31.0, 383.5, 70.25), "Caption"),
        Region((434.5, -0.5, 1024.0, 589.5), "Picture"),
    )
    assert records == [Record("1", "layout", (ImageRef(f"PNG/{1:064x}.png"),), ((1025, 1025),), regions=regions)]
    assert report.left_out == {"annotated_again": 1, "box_outside": 1, "category_unknown": 1}
    assert report.skipped == {"page_annotated_again": 1, "page_without_elements": 1}
    assert report.dropped == {"entry_malformed": 1, "part_left_out": 2}
