"""HierText has the words, lines and paragraphs of text in photographs and scans.

The files (https://github.com/google-research-datasets/hiertext) are
`gt/{train,validation}.jsonl.gz`, or the same without .gz. Despite the name, each is one JSON value
{"annotations": [{"image_id", "image_width", "image_height", "paragraphs": [{"lines": [{"text",
"legible", "vertices": [[x, y], ...], "words": [{"vertices", "text", "legible"}]}]}]}]}. A line is
legible if all of its words are. The polygon of a line is a loose rotated rectangle, and that of a
word is tight. Boxes are therefore the bounds of words.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sphinx_pl.data.converters import Converter, checked, id_of
from sphinx_pl.data.readers.instruction_json import sizes
from sphinx_pl.data.schema import ImageRef, Record, Region


class HierTextConverter(Converter):
    """Each image gives a record of its legible lines with boxes, and one without boxes.

    An image is skipped if one of its legible lines cannot be used.
    """

    name = "hiertext"
    title = "HierText"
    url = "https://github.com/google-research-datasets/hiertext"
    licence = "CC BY-SA 4.0"
    tasks = ("ocr", "ocr_text")
    splits = ("train", "validation")

    def entries(self) -> Iterator[tuple[str, Any]]:
        file = f"{self.split}.jsonl"
        images = self.json_items(
            *(f"{folder}{file}{end}" for folder in ("gt/", "") for end in ("", ".gz")), of="annotations"
        )
        for number, image in enumerate(images):
            yield str(id_of(image, "image_id") or number), image

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        size = sizes(entry["image_width"], entry["image_height"], key)
        paragraphs = self.all_parts(entry["paragraphs"], lambda one: list(one["lines"]))
        lines = [line for lines in paragraphs for line in lines]
        # Text that is not legible is not asked for.
        legible = [line for line in lines if line["legible"]]
        self.left_out.update(["line_illegible"] * (len(lines) - len(legible)))
        regions = tuple(self.all_parts(legible, lambda line: _region(line, size)))
        if not regions:
            self.skipped["image_without_legible_line"] += 1
            return
        image = (ImageRef(f"{self.split}/{entry['image_id']}.jpg"),)
        yield Record(f"{key}-boxes", "ocr", image, size, regions=regions)
        yield Record(f"{key}-text", "ocr_text", image, size, regions=regions)


def _region(line: Any, size: tuple[tuple[int, int], ...]) -> Region:
    points = [point for word in line["words"] for point in word["vertices"]] or line["vertices"]
    xs, ys = zip(*((float(x), float(y)) for x, y in points), strict=True)
    width, height = size[0]
    box = max(min(xs), 0.0), max(min(ys), 0.0), min(max(xs), float(width)), min(max(ys), float(height))
    return checked(Region(box, " ".join(line["text"].split())), size)
