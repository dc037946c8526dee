"""These functions are shared by the converters of COCO's format.

A file (https://cocodataset.org/#format-data) is {"images": [{"id", "file_name", "width",
"height"}], "annotations": [{"id", "image_id", ...}], "categories": [{"id", "name"}]}. The
annotation of an object has "category_id", "bbox" and "iscrowd". The box is [x, y, width, height] in
pixels from the upper left corner. "iscrowd" is 1 if the annotation is a group whose members are not
annotated one by one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sphinx_pl.data.converters import Converter, checked, id_of
from sphinx_pl.data.coordinates import Box4
from sphinx_pl.data.readers.instruction_json import sizes
from sphinx_pl.data.schema import Region
from sphinx_pl.data.skip import SkipSample

ImageSizes = tuple[tuple[int, int], ...]


class CocoConverter(Converter):
    """A converter of one of COCO's own data sets.

    `train` and `val` are the splits of the 2017 release. It has the images of the 2014 release,
    divided in another way.
    """

    url = "https://cocodataset.org/#download"
    licence = "CC BY 4.0 (annotations), the images' own: https://cocodataset.org/#termsofuse"
    splits = ("train", "val", "train2014", "val2014")

    @property
    def release(self) -> str:
        """Return the split's name in COCO's files, which is also the folder of its images."""
        return self.split if self.split.endswith("2014") else f"{self.split}2017"

    def document(self, kind: str) -> Any:
        name = f"{kind}_{self.release}.json"
        return self.json(f"annotations/{name}", name)

    def image(self, image: Any) -> tuple[str, ImageSizes]:
        """Return the path and the size of an image of the file."""
        size = image_size(image)
        return "/".join((self.release, image["file_name"])), size


def by_id(things: Iterable[Any]) -> dict[Any, Any]:
    return {id_of(thing): thing for thing in things}


def find(things: Mapping[Any, Any], wanted: Any, kind: str) -> Any:
    """Return the item with an id.

    Raises:
        SkipSample: no item has it.
    """
    if wanted is None or wanted not in things:
        raise SkipSample(f"{kind}_unknown", f"{kind} {wanted!r}")
    return things[wanted]


def by_annotation(document: Any) -> Iterator[tuple[str, Any]]:
    """Yield (id, (annotation, its image)) for each annotation.

    The image is None if the file has none with that id.
    """
    images = by_id(document["images"])
    for annotation in document["annotations"]:
        yield str(id_of(annotation)), (annotation, images.get(id_of(annotation, "image_id")))


def by_image(document: Any) -> Iterator[tuple[str, Any]]:
    """Yield (id, (image, its annotations)) for each image.

    The image is None for the annotations of an image that the file does not have.
    """
    of_image: dict[Any, list[Any]] = defaultdict(list)
    for annotation in document["annotations"]:
        of_image[id_of(annotation, "image_id")].append(annotation)
    for image in document["images"]:
        yield str(id_of(image)), (image, of_image.pop(id_of(image), []))
    for image_id, orphans in of_image.items():
        yield f"{image_id} of no image", (None, orphans)


def image_size(image: Any) -> ImageSizes:
    if image is None:
        raise SkipSample("image_unknown")
    return sizes(image["width"], image["height"], str(image["id"]))


def corners(bbox: Iterable[Any]) -> Box4:
    """Return the box (x1, y1, x2, y2) of (x, y, width, height)."""
    x, y, width, height = (float(number) for number in bbox)
    return x, y, x + width, y + height


def region(annotation: Any, categories: Mapping[Any, str], size: ImageSizes) -> Region:
    """Return the box of an annotated object, labelled with its category.

    Raises:
        SkipSample: no task can use the box, or the category is unknown.
    """
    return checked(Region(corners(annotation["bbox"]), find(categories, annotation["category_id"], "category")), size)


def names(document: Any) -> dict[Any, str]:
    """Return the name of each category id."""
    return {category["id"]: category["name"] for category in document["categories"]}
