"""Visual Genome has regions, relationships and questions. Each has a converter.

The files (https://homes.cs.washington.edu/~ranjay/visualgenome/api_readme.html) are lists with an
object for each image. `image_data.json` has {"image_id", "url", "width", "height"}. The url ends in
the image's path below the folder where images.zip and images2.zip are unpacked, such as
VG_100K_2/2.jpg. `region_descriptions.json` has {"id" or "image_id", "regions": [{"region_id",
"phrase", "x", "y", "width", "height"}]}. `relationships.json` has {"image_id", "relationships":
[{"relationship_id", "predicate", "subject", "object"}]}, where the last two are {"name" or "names",
"x", "y", "w", "h"}. `question_answers.json` has {"id" or "image_id", "qas": [{"qa_id", "question",
"answer"}]}.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from sphinx_pl.data.converters import Converter, coco, id_of
from sphinx_pl.data.readers.instruction_json import sizes
from sphinx_pl.data.schema import ImageRef, Record, Region
from sphinx_pl.data.skip import SkipSample


class VisualGenomeConverter(Converter):
    url = "https://homes.cs.washington.edu/~ranjay/visualgenome/"
    licence = "CC BY 4.0"
    splits = ("train",)  # there is no other split
    parts_of: ClassVar[tuple[str, str, str]]
    """The file, the key of an image's list in it, and the key of an element's id."""

    def entries(self) -> Iterator[tuple[str, Any]]:
        images = {id_of(image, "image_id"): image for image in self.json("image_data.json")}
        file, listed, id_name = self.parts_of
        for number, image in enumerate(self.json_items(file)):
            image_id = id_of(image, "image_id") or id_of(image)
            things = image.get(listed) if isinstance(image, dict) else None
            if not isinstance(things, list):
                yield f"element {number}", (images.get(image_id), None)
                continue
            for thing in things:
                yield f"{image_id}-{id_of(thing, id_name)}", (images.get(image_id), thing)

    def image(self, image: Any) -> tuple[tuple[ImageRef, ...], coco.ImageSizes]:
        if image is None:
            raise SkipSample("image_unknown")
        folder, name = image["url"].split("/")[-2:]
        return (ImageRef(f"{folder}/{name}"),), sizes(image["width"], image["height"], str(image["image_id"]))


class VGRegionsConverter(VisualGenomeConverter):
    """Each region gives a record that asks for its box and one that asks for its phrase."""

    name = "vg_regions"
    title = "Visual Genome: region descriptions"
    tasks = ("rec", "reg")
    parts_of = ("region_descriptions.json", "regions", "region_id")

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        images, size = self.image(entry[0])
        thing = entry[1]
        phrase = thing["phrase"].strip()
        box = coco.corners((thing["x"], thing["y"], thing["width"], thing["height"]))
        regions = (Region(box, phrase),)
        yield Record(f"{key}-rec", "rec", images, size, question=phrase, regions=regions)
        yield Record(f"{key}-reg", "reg", images, size, regions=regions)


class VGRelationshipsConverter(VisualGenomeConverter):
    """Each relationship is a record.

    The predicate is in lower case, because annotators wrote both ON and on.
    """

    name = "vg_relationships"
    title = "Visual Genome: relationships"
    tasks = ("relation_detection",)
    parts_of = ("relationships.json", "relationships", "relationship_id")

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        images, size = self.image(entry[0])
        relationship = entry[1]
        regions = (_thing(relationship["subject"]), _thing(relationship["object"]))
        predicate = relationship["predicate"].strip().lower()
        yield Record(key, "relation_detection", images, size, answer=predicate, regions=regions)


class VGQuestionsConverter(VisualGenomeConverter):
    """Each question is a record.

    The full stop at the end of an answer is removed. Answers of a single word have it too.
    """

    name = "vg_questions"
    title = "Visual Genome: questions"
    tasks = ("short_vqa",)
    parts_of = ("question_answers.json", "qas", "qa_id")

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        images, size = self.image(entry[0])
        question, answer = entry[1]["question"], entry[1]["answer"].strip().removesuffix(".")
        yield Record(key, "short_vqa", images, size, question=question, answer=answer)


def _thing(thing: Any) -> Region:
    label = thing["name"] if "name" in thing else thing["names"][0]
    return Region(coco.corners((thing["x"], thing["y"], thing["w"], thing["h"])), label)
