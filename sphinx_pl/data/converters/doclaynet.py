"""DocLayNet has the layout of document pages.

The files (https://github.com/DS4SD/DocLayNet, the core archive) are `COCO/{train,val,test}.json` in
COCO's format (see `coco`). Images and annotations also have "precedence", which is not 0 if a page
was annotated again. Images are squares of 1025 pixels, `PNG/<hash>.png`, and boxes are in these
pixels. The 11 categories are Caption, Footnote, Formula, List-item, Page-footer, Page-header,
Picture, Section-header, Table, Text and Title.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sphinx_pl.data.converters import Converter, coco
from sphinx_pl.data.schema import ImageRef, Record


class DocLayNetConverter(Converter):
    """Each page is a record if all of its elements can be used.

    The question asks for all elements, so a page with an unusable one is skipped.
    """

    name = "doclaynet"
    title = "DocLayNet"
    url = "https://github.com/DS4SD/DocLayNet"
    licence = "CDLA-Permissive-1.0"
    tasks = ("layout",)
    splits = ("train", "val", "test")

    def entries(self) -> Iterator[tuple[str, Any]]:
        document = self.json(f"COCO/{self.split}.json", f"{self.split}.json")
        names = coco.names(document)
        for key, (image, objects) in coco.by_image(document):
            yield key, (image, objects, names)

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        image, objects, names = entry
        size = coco.image_size(image)
        path = "/".join(("PNG", image["file_name"]))
        if image.get("precedence"):
            self.skipped["page_annotated_again"] += 1
            return
        if not objects:
            self.skipped["page_without_elements"] += 1
            return
        elements = [one for one in objects if not one.get("precedence")]
        self.left_out.update(["annotated_again"] * (len(objects) - len(elements)))
        regions = self.all_parts(elements, lambda one: coco.region(one, names, size))
        yield Record(key, "layout", (ImageRef(path),), size, regions=tuple(regions))
