"""Flickr30k Entities has captions whose phrases are linked to boxes.

The files (https://github.com/BryanPlummer/flickr30k_entities) are those of annotations.zip,
unpacked beside the repository's lists. `{train,val,test}.txt` has an image id a line.
`Sentences/<id>.txt` has a caption a line. Its phrases are written [/EN#<chain>/<type> words], with
chain 0 if a phrase names nothing visible. `Annotations/<id>.xml` has <size><width/>
<height/></size> and <object>s. An object has its chains as <name>s and a <bndbox> (xmin, ymin,
xmax, ymax counted from 1). A whole scene and what is not visible have no box. `UNRELATED_CAPTIONS`
has lines "<id> <number of the caption>".
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from sphinx_pl.data.converters import Converter, checked
from sphinx_pl.data.readers.instruction_json import sizes
from sphinx_pl.data.schema import ImageRef, Record, Region
from sphinx_pl.data.skip import SkipSample

_PHRASE = re.compile(r"\[/EN#([^/\s\]]+)\S* ([^\[\]]+)\]")
_MARKUP = re.compile(r"[\[\]{}]|</?p>")


class Flickr30kEntitiesConverter(Converter):
    """Each caption that names a box is a record, if all boxes of what it names can be used.

    The images are those of flickr30k-images.tar.gz.
    """

    name = "flickr30k_entities"
    title = "Flickr30k Entities"
    url = "https://github.com/BryanPlummer/flickr30k_entities"
    licence = "see the page; images under Flickr's terms, for non-commercial research and education only"
    tasks = ("grounded_caption",)
    splits = ("train", "val", "test")

    def entries(self) -> Iterator[tuple[str, Any]]:
        unrelated = {tuple(line.split()) for line in self._lines("UNRELATED_CAPTIONS")}
        for image in self._lines(f"{self.split}.txt"):
            if not re.fullmatch("[0-9]+", image):
                yield image, None
                continue
            xml = self.file(f"Annotations/{image}.xml").read_text("utf-8-sig", errors="replace")
            for number, caption in enumerate(self._lines(f"Sentences/{image}.txt"), start=1):
                yield f"{image}-{number}", (image, xml, caption, (image, str(number)) in unrelated)

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        image, xml, caption, unrelated = entry
        if unrelated:
            self.skipped["caption_unrelated"] += 1
            return
        if _MARKUP.search(_PHRASE.sub(r"\2", caption)):
            raise SkipSample("caption_markup", f"{key}: {caption}")
        size, boxes = _annotation(xml, key)
        regions: list[Region] = []

        def phrase(match: re.Match[str]) -> str:
            text = match[2].strip()
            group = self.all_parts(boxes[match[1]], lambda box: checked(Region(_corners(box), text), size))
            indices = range(len(regions), len(regions) + len(group))
            regions.extend(group)
            return f"{{{','.join(map(str, indices))}}}" if group else text

        answer = _PHRASE.sub(phrase, caption)
        if not regions:
            self.skipped["caption_without_box"] += 1
            return
        # Captions have spaces between words and punctuation.
        answer = re.sub(r"\s+([.,;:!?])(?=\s|$)", r"\1", answer)
        path = ImageRef(f"flickr30k-images/{image}.jpg")
        yield Record(key, "grounded_caption", (path,), size, answer=answer, regions=tuple(regions))

    def _lines(self, name: str) -> list[str]:
        lines = self.file(name).read_text("utf-8-sig", errors="replace").split("\n")
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _annotation(xml: str, key: str) -> tuple[tuple[tuple[int, int], ...], dict[str | None, list[Any]]]:
    """Return the image's size and the boxes of each chain."""
    if "<!" in xml:  # without declarations there are no entities to expand
        raise SkipSample("xml_declaration", key)
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise SkipSample("xml_malformed", f"{key}: {error}") from None
    boxes = defaultdict(list)
    for thing in root.iter("object"):
        for chain in thing.findall("name"):
            boxes[chain.text].extend(thing.findall("bndbox"))
    return sizes(_number(root, "size/width"), _number(root, "size/height"), key), boxes


def _corners(box: Any) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (_number(box, name) - 1.0 for name in ("xmin", "ymin", "xmax", "ymax"))
    return x1, y1, x2, y2


def _number(element: Any, path: str) -> int:
    return int(element.findtext(path))
