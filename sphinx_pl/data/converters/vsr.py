"""VSR has captions about spatial relations, which are true or false of a COCO image.

The files (https://github.com/cambridgeltl/visual-spatial-reasoning, data/README.md) are
`splits/random/{train,dev,test}.jsonl` and `splits/zeroshot/...`. A line is {"image", "image_link",
"caption", "label": 0 or 1, "relation", ...}. The images are those of COCO's train2017.zip and
val2017.zip, and the link says which.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, ClassVar

from sphinx_pl.data.converters import Converter
from sphinx_pl.data.converters.common import asked, text
from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.data.skip import SkipSample

STATEMENT = "Is this statement about the image true? {caption}"


class VSRConverter(Converter):
    name = "vsr"
    title = "VSR"
    url = "https://github.com/cambridgeltl/visual-spatial-reasoning"
    licence = "Apache-2.0"
    tasks = ("yes_no",)
    splits: ClassVar[tuple[str, ...]] = ("train", "dev", "test", "zeroshot_train", "zeroshot_dev", "zeroshot_test")

    def entries(self) -> Iterator[tuple[str, Any]]:
        folder, _, split = self.split.rpartition("_")
        name = f"{folder or 'random'}/{split}.jsonl"
        for number, entry in self.json_lines(f"splits/{name}", f"data/splits/{name}", name):
            yield str(number), entry

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        folder = PurePosixPath(entry["image_link"]).parent.name
        if folder not in ("train2017", "val2017"):
            raise SkipSample("image_link", f"{key}: {entry['image_link']}")
        if entry["label"] not in (0, 1):
            raise SkipSample("label_unknown", f"{key}: {entry['label']!r}")
        yield Record(
            key=key,
            task="yes_no",
            images=(ImageRef(f"{folder}/{text(entry['image'])}"),),
            question=STATEMENT.format(caption=asked(entry["caption"])),
            answer="yes" if entry["label"] else "no",
            meta={"relation": entry.get("relation")},
        )
