"""RefCOCO, RefCOCO+ and RefCOCOg have phrases that tell one object of a COCO image from the others.

The files (https://github.com/lichengunc/refer, refcoco.zip, refcoco+.zip, refcocog.zip) are
`instances.json` in COCO's format (see `coco`) and pickles of a list of {"ref_id", "ann_id",
"image_id", "split", "sentences": [{"sent", "raw", "sent_id", "tokens"}]}. There is one pickle for
each way to split the images: `refs(unc).p` and `refs(google).p`; for RefCOCOg `refs(umd).p` and
`refs(google).p`. The images are COCO's train2014. The "file_name" of a ref is no image's name.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any, ClassVar, NoReturn

from sphinx_pl.data.converters import Converter, coco, id_of
from sphinx_pl.data.schema import ImageRef, Record, Region
from sphinx_pl.utils.errors import UserError


class RefCOCOConverter(Converter):
    """Each phrase gives a record that asks for its box and one that asks for the phrase.

    The splits of `refs(google).p` are called google-train and so on.
    """

    name = "refcoco"
    title = "RefCOCO"
    url = "https://github.com/lichengunc/refer"
    licence = "see the page; images and boxes are COCO's: https://cocodataset.org/#termsofuse"
    tasks = ("rec", "reg")
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "testA", "testB", "google-train", "google-val", "google-test")
    split_by: ClassVar[str] = "unc"

    def entries(self) -> Iterator[tuple[str, Any]]:
        by, _, split = self.split.rpartition("-")
        instances = self.json("instances.json")
        images, objects = coco.by_id(instances["images"]), coco.by_id(instances["annotations"])
        for ref in self._refs(f"refs({by or self.split_by}).p"):
            if id_of(ref, "split") in (split, None):
                sentences = ref.get("sentences") if isinstance(ref, dict) else None
                for number, sentence in enumerate(sentences if isinstance(sentences, list) else [None]):
                    yield f"{id_of(ref, 'ref_id')}-{number}", (ref, sentence, images, objects)

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        ref, sentence, images, objects = entry
        if ref["split"] != self.split.rpartition("-")[2]:
            raise ValueError("not of the split")
        image = coco.find(images, ref["image_id"], "image")
        path, size = (ImageRef("/".join(("train2014", image["file_name"]))),), coco.image_size(image)
        phrase = sentence["sent"].strip()
        regions = (Region(coco.corners(coco.find(objects, ref["ann_id"], "object")["bbox"]), phrase),)
        yield Record(f"{key}-rec", "rec", path, size, question=phrase, regions=regions)
        yield Record(f"{key}-reg", "reg", path, size, regions=regions)

    def _refs(self, name: str) -> list[Any]:
        path = self.file(name)
        try:
            with path.open("rb") as file:
                refs = _PlainData(file, encoding="latin1").load()  # Python 2 wrote the files
        except Exception as error:  # a damaged or hostile pickle can raise anything
            raise UserError(f"{self.name}: {path} is no pickle of plain data ({error}): download it again") from None
        if not isinstance(refs, list):
            raise UserError(f"{self.name}: {path} holds no list of refs")
        return refs


class RefCOCOPlusConverter(RefCOCOConverter):
    name = "refcoco+"
    title = "RefCOCO+"
    splits = ("train", "val", "testA", "testB")


class RefCOCOgConverter(RefCOCOConverter):
    """A converter of RefCOCOg with the splits of UMD and of Google.

    Google's validation images are among its training images. Those of UMD's split are not.
    """

    name = "refcocog"
    title = "RefCOCOg"
    splits = ("train", "val", "test", "google-train", "google-val")
    split_by = "umd"


class _PlainData(pickle.Unpickler):
    """An unpickler of lists, dicts, strings and numbers only.

    A pickle runs code through the classes and functions that it names.
    """

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}")
