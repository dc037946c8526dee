"""TextCaps has five captions for each image, which read the text in it.

The file (https://textvqa.org/textcaps/dataset) is `TextCaps_0.1_{split}.json` with {"data":
[{"image_id", "caption_id", "caption_str", "reference_strs": [all of the image's], ...}]}. It has
one entry for each caption. The images are TextVQA's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sphinx_pl.data.converters import Converter
from sphinx_pl.data.converters.common import keyed, text
from sphinx_pl.data.schema import ImageRef, Record


class TextCapsConverter(Converter):
    name = "textcaps"
    title = "TextCaps"
    url = "https://textvqa.org/textcaps/dataset"
    licence = "see the page"
    tasks = ("caption",)

    def entries(self) -> Iterator[tuple[str, Any]]:
        yield from keyed(self.json(f"TextCaps_0.1_{self.split}.json")["data"], "caption_id", unique=False)

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        image = ImageRef(f"train_images/{text(entry['image_id'])}.jpg")
        if "caption_str" not in entry:
            self.skipped["captions_not_public"] += 1
            return
        references = entry.get("reference_strs", [])
        yield Record(
            key=key, task="caption", images=(image,), answer=entry["caption_str"], meta={"references": references}
        )
