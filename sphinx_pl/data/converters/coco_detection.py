"""COCO detection has the boxes of objects of 80 classes.

The files (https://cocodataset.org/#format-data, "Object Detection") are
`annotations/instances_{train,val}{2014,2017}.json` in COCO's format (see `coco`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sphinx_pl.data.converters import coco, id_of
from sphinx_pl.data.schema import ImageRef, Record, Region


class CocoDetectionConverter(coco.CocoConverter):
    """Each class that an image shows is a record, and one record has all of its objects.

    A record is skipped if a crowd is among its objects. A box around many objects is no answer, and
    without that box the answer is incomplete. A record is also skipped if one of its objects cannot
    be used. An object of an unknown class could belong to every class.
    """

    name = "coco_detection"
    title = "COCO detection"
    tasks = ("detection", "detection_all")

    def entries(self) -> Iterator[tuple[str, Any]]:
        document = self.document("instances")
        names = coco.names(document)
        for key, (image, objects) in coco.by_image(document):
            yield key, (image, objects, names)

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        image, objects, names = entry
        path, size = self.image(image)
        if not objects:
            self.skipped["image_without_objects"] += 1
            return
        crowds = {names.get(id_of(one, "category_id")) for one in objects if id_of(one, "iscrowd")}
        regions: tuple[Region, ...] = ()
        incomplete = set()
        for one in objects:
            usable = tuple(self.parts([one], lambda one: coco.region(one, names, size)))
            regions += usable
            if not usable:
                incomplete.add(names.get(id_of(one, "category_id")))
        everything = Record(f"{key}-all", "detection_all", (ImageRef(path),), size, regions=regions)
        if crowds:
            self.skipped["detection_all_with_crowd"] += 1
        elif incomplete:
            self.skipped["detection_all_incomplete"] += 1
        else:
            yield everything
        for label in dict.fromkeys(region.label for region in regions):
            if label in crowds:
                self.skipped["detection_with_crowd"] += 1
                continue
            if label in incomplete or None in incomplete:
                self.skipped["detection_incomplete"] += 1
                continue
            members = tuple(region for region in regions if region.label == label)
            yield Record(f"{key}-{label}", "detection", everything.images, size, question=label, regions=members)
