"""COCO keypoints has 17 points of each person.

The files (https://cocodataset.org/#format-data, "Keypoint Detection") are
`annotations/person_keypoints_{train,val}{2014,2017}.json` in COCO's format (see `coco`). An
annotation also has "keypoints": [x1, y1, v1, x2, ...], where v is 0 for not labelled, 1 for hidden
and 2 for visible. "num_keypoints" is the number of labelled points. "area" is that of the person,
in square pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sphinx_pl.data.converters import coco
from sphinx_pl.data.schema import ImageRef, Record, Region


class CocoKeypointsConverter(coco.CocoConverter):
    """Each person is a record, except in a crowd or without a labelled point."""

    name = "coco_keypoints"
    title = "COCO person keypoints"
    tasks = ("pose",)

    def entries(self) -> Iterator[tuple[str, Any]]:
        return coco.by_annotation(self.document("person_keypoints"))

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        annotation, image = entry
        path, size = self.image(image)
        if annotation["iscrowd"]:
            self.skipped["crowd"] += 1
            return
        if not annotation["num_keypoints"]:
            self.skipped["no_keypoints"] += 1
            return
        numbers = annotation["keypoints"]
        points = zip(numbers[0::3], numbers[1::3], numbers[2::3], strict=True)
        keypoints = tuple((float(x), float(y), int(visibility)) for x, y, visibility in points)
        person = Region(coco.corners(annotation["bbox"]), "person", keypoints)
        # The area is that of the outline, not of the box. An evaluation divides distances by it.
        meta = {"area": float(annotation["area"])} if "area" in annotation else {}
        yield Record(key, "pose", (ImageRef(path),), size, regions=(person,), meta=meta)
