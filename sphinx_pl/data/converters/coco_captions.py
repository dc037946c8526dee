"""COCO captions has five sentences about each image.

The files (https://cocodataset.org/#format-data, "Image Captioning") are
`annotations/captions_{train,val}{2014,2017}.json` in COCO's format (see `coco`). An annotation is
{"id", "image_id", "caption"}.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sphinx_pl.data.converters import coco
from sphinx_pl.data.schema import ImageRef, Record


class CocoCaptionsConverter(coco.CocoConverter):
    """Each sentence is a record."""

    name = "coco_captions"
    title = "COCO captions"
    tasks = ("caption",)

    def entries(self) -> Iterator[tuple[str, Any]]:
        return coco.by_annotation(self.document("captions"))

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        annotation, image = entry
        path, size = self.image(image)
        # Many captions end in a line break or in spaces.
        caption = " ".join(annotation["caption"].split())
        yield Record(key, "caption", (ImageRef(path),), size, answer=caption)
