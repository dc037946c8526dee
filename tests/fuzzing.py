"""Damage to files and records, for the tests that read them."""

from __future__ import annotations

import copy
import gzip
import io
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One to four of: flipped bits, a cut, noise put in, a part doubled, a part lost, another
    number or word.
    """
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) or 1)
        end = at + rng.choice((1, 8, 64, 600))
        kind = rng.randrange(6)
        if kind == 0:
            spots = {rng.randrange(len(data) or 1): rng.randrange(256) for _ in range(rng.choice((1, 4, 40)))}
            data = bytes(spots.get(i, byte) for i, byte in enumerate(data))
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data = data[:at] + rng.randbytes(end - at) + data[at:]
        elif kind == 3:
            data = data[:end] + data[at:]
        elif kind == 4:
            data = data[:at] + data[end:]
        else:
            old, new = rng.choice(WORDS), rng.choice(WORDS)
            data = data.replace(old, new, rng.randint(1, 3))
    return data


# What our formats are made of, and values that code likes to trip over.
WORDS = tuple(
    word.encode()
    for word in (
        *('"task"', '"box"', '"image"', '"regions"', '"conversations"', '"value"', '"from"', '"label"', '"keypoints"'),
        *(
            '"width"',
            '"height"',
            '"question"',
            '"answer"',
            '"caption"',
            '"text"',
            '"choices"',
            "null",
            "{}",
            "[]",
            '""',
        ),
        *("64", "-1", "0", "1e999", "NaN", "99999999999999999999", "true", "<image>", "###", "[", "]", "{", "}", ","),
    )
)


# --- values that JSON can hold and no annotation should

_DEEP = "@deep@"  # json.dumps itself stops at depths that a file can have
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 0.5, 1e308, float("nan"), float("inf"), -float("inf"), 10**400, -(10**30)),
    *(
        "",
        " ",
        "\n",
        "\0",
        "half \ud83d",
        "x" * 3000,
        "<image>",
        "<image>" * 30,
        "###",
        "{0}",
        "{9999}",
        "</p>",
        "é" * 40,
    ),
    *("../../nowhere.jpg", "/dev/zero", "images", "a" * 5000, "~nobody/x", _DEEP),
    *([], {}, [[]], [None], ["a", "b"], [1, 2, 3], {"a": {}}, [_DEEP], list(range(300))),
)


def mangled(value: Any, rng: random.Random) -> Any:
    """One place of a JSON value changed: another value, a key lost, an item doubled, lost or
    wrapped.
    """
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {other: kept for other, kept in value.items() if other != key}
        return {**value, key: mangled(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.75:
        at = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.15:
            return value[:at] + value[at + 1 :]
        if kind < 0.3:
            return value[:at] + [value[at]] * rng.choice((2, 30)) + value[at + 1 :]
        return [*value[:at], mangled(value[at], rng), *value[at + 1 :]]
    if isinstance(value, int | float) and rng.random() < 0.5:
        return value * rng.choice((-1, 0, 2, 1000))
    return [value] if rng.random() < 0.1 else rng.choice(ODD)


def spelt(value: Any, rng: random.Random) -> str:
    """As JSON, with values of any depth."""
    depth = rng.choice((50, 900, 990, 5000))
    return json.dumps(value).replace(json.dumps(_DEEP), "[" * depth + "]" * depth)


# --- images of every kind that data sets hold


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def picture(size: tuple[int, int] = (40, 30), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def rotated(image: Image.Image, orientation: int = 6) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, "JPEG", exif=exif)


def good_images() -> dict[str, bytes]:
    """Name -> an image that must be used, however unusual."""
    image = picture()
    frames = [picture(seed=seed) for seed in (1, 2)]
    grey16 = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 54)
    animated: dict[str, Any] = {"save_all": True, "append_images": frames}
    return {
        "jpeg": encoded(image, "JPEG"),
        "png": encoded(image, "PNG"),
        "webp": encoded(image, "WEBP"),
        "bmp": encoded(image, "BMP"),
        "tiff": encoded(image, "TIFF", compression="tiff_lzw"),
        "ppm": encoded(image, "PPM"),
        "cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "grey": encoded(image.convert("L"), "JPEG"),
        "one_bit": encoded(image.convert("1"), "PNG"),
        "sixteen_bit": encoded(grey16, "PNG"),
        "alpha": encoded(image.convert("RGBA"), "PNG"),
        "palette": encoded(image.convert("P"), "PNG", transparency=0),
        "animated_gif": encoded(image, "GIF", **animated),
        "animated_webp": encoded(image, "WEBP", **animated),
        "exif_rotated": rotated(image),
        "one_pixel": encoded(picture((1, 1)), "PNG"),
    }


def bad_images() -> dict[str, tuple[bytes, str]]:
    """Name -> what is no use as an image, and the reason that it is counted under."""
    jpeg = encoded(picture(), "JPEG")
    return {
        "zero_bytes": (b"", "image_empty"),
        "html": (b"<html>not found</html>", "image_unreadable"),
        "cut": (jpeg[: len(jpeg) // 2], "image_truncated"),
        "thin": (png_header(1, 100_000), "image_too_large"),
        "long": (png_header(1500, 10), "image_aspect"),
        "bomb": (png_header(50_000, 50_000), "image_too_large"),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image_unreadable"),
    }


# --- shards


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


class World:
    """Damaged files of every kind, a function of its seed, and the mixture that reads them.

    About half of the records are whole, so that a reader that gives up is seen.
    """

    def __init__(self, folder: Path, entries: list[dict[str, Any]], seed: int) -> None:
        self.folder = folder
        self.entries = entries
        self.rng = random.Random(seed)
        folder.mkdir(parents=True)
        (folder / "images").mkdir()
        self.pool = [*good_images().values(), *(data for data, _ in bad_images().values())]

    def image(self) -> bytes:
        data = self.rng.choice(self.pool)
        return damaged(data, self.rng) if self.rng.random() < 0.3 else data

    def entry(self) -> dict[str, Any]:
        value = self.rng.choice(self.entries)
        for _ in range(self.rng.choice((0, 0, 1, 1, 2, 4))):
            value = mangled(value, self.rng)
        if isinstance(value, dict) and isinstance(value.get("image"), str) and self.rng.random() < 0.9:
            number = self.rng.randrange(25)
            value = {**value, "image": f"images/{number}"}
        return value

    def file(self, name: str, data: bytes, harm: float = 0.3) -> str:
        path = self.folder / name
        path.write_bytes(damaged(data, self.rng) if self.rng.random() < harm else data)
        return str(path)

    def tar(self, name: str, count: int) -> str:
        members = []
        for number in range(count):
            key = f"{number:04d}" if self.rng.random() < 0.95 else self.rng.choice(("0000", "", "a/../b", "k" * 1200))
            note: Any = {"caption": f"caption {number}", "width": 40, "height": 30, "similarity": 0.3, "ocr": "a word"}
            if self.rng.random() < 0.4:
                note = mangled(note, self.rng)
            text = f"caption number {number}".encode()
            if self.rng.random() < 0.3:
                text = damaged(text, self.rng)
            kept = [
                member
                for member in (
                    (f"{key}.{self.rng.choice(('jpg', 'png', 'webp', 'JPG'))}", self.image()),
                    (f"{key}.txt", text),
                    (f"{key}.json", spelt(note, self.rng).encode("utf-8", "surrogatepass")),
                )
                if self.rng.random() < 0.93
            ]
            members += kept
        path = write_tar(self.folder / name, members)
        return self.file(name, path.read_bytes())

    def lines(self, values: Iterable[Any]) -> bytes:
        lines = [spelt(value, self.rng).encode("utf-8", "surrogatepass") for value in values]
        return b"\n".join(damaged(line, self.rng) if self.rng.random() < 0.1 else line for line in lines)

    def text_values(self, count: int) -> list[Any]:
        values: list[Any] = [{"text": f"document {number} " * self.rng.choice((1, 10, 200))} for number in range(count)]
        return [mangled(value, self.rng) if self.rng.random() < 0.4 else value for value in values]

    def parquet(self, name: str, count: int) -> str:
        odd = (None, "", " ", "x" * 9000, "\0")
        texts = [self.rng.choice(odd) if self.rng.random() < 0.4 else f"row {number}" for number in range(count)]
        sink = io.BytesIO()
        column = self.rng.choice(("text", "text", "text", "content"))
        pyarrow.parquet.write_table(pyarrow.table({column: texts}), sink, row_group_size=10)
        return self.file(name, sink.getvalue())

    def packed(self, name: str, data: bytes) -> str:
        pack = gzip.compress(data) if name.endswith(".gz") else pyarrow.compress(data, "zstd", asbytes=True)
        if self.rng.random() < 0.4:
            pack = pack[: self.rng.randrange(len(pack) // 2, len(pack))]
        return self.file(name, pack, harm=0.2)

    def sources(self, size: int) -> dict[str, Any]:
        """About `size` records over all kinds of sources."""
        rng, few = self.rng, max(size // 14, 2)
        for number in range(25):
            (self.folder / "images" / str(number)).write_bytes(self.image())
        entries = [self.entry() for _ in range(5 * few)]
        # A list that does not begin with its bracket is refused as a whole, which is not what is
        # looked for here.
        listed = b"[" + b",".join(spelt(value, rng).encode("utf-8", "surrogatepass") for value in entries[: 2 * few])
        yaml_list = [{"path": str(self.folder / "list.json"), "type": "image_text"}]
        listed = b"[" + damaged(listed, rng) + b"]" if rng.random() < 0.5 else listed + b"]"
        self.file("list.json", listed, harm=0)
        meta = self.file("meta.yaml", json.dumps({"META": yaml_list}).encode(), harm=0)
        # Beside each a whole file: a source without any record stops a run, as it should.
        pairs = [member for i in range(3) for member in ((f"{i}.jpg", self.pool[0]), (f"{i}.txt", b"a caption"))]
        whole = {
            "tar": str(write_tar(self.folder / "whole.tar", pairs)),
            "text": self.file("whole.jsonl", b'{"text": "a document"}\n' * 3, harm=0),
            "chat": self.file("chat.jsonl", b'{"question": "why?", "answer": "because"}\n' * 3, harm=0),
        }
        lines_file = self.file("c.jsonl", self.lines(entries[2 * few : 4 * few]))
        text_file = self.file("t.jsonl", self.lines(self.text_values(2 * few)))
        packed = self.packed("t.jsonl.zst", self.lines(self.text_values(2 * few)))
        filters = {"columns": {"similarity": {"min": 0.1}}, "parrot_column": "ocr", "min_side": rng.choice((None, 2))}
        lines = {"kind": "instructions", "root": str(self.folder)}
        return {
            "web": {"kind": "image_text", "path": [self.tar("0.tar", few), self.tar("1.tar", few), whole["tar"]]},
            "chosen": {"kind": "image_text", "path": [self.tar("2.tar", few), whole["tar"]], "filters": filters},
            "list": {
                "kind": "meta",
                "path": meta,
                "root": str(self.folder),
                "questions_per_sample": rng.choice((1, 3)),
            },
            "lines": {
                **lines,
                "path": [lines_file, whole["chat"]],
                "questions_per_sample": 3,
            },
            "limited": {
                **lines,
                "path": [self.packed("d.jsonl.gz", self.lines(entries[4 * few :])), whole["chat"]],
                "caps": {"chat": 1, "rec": 2},
            },
            "text": {
                "kind": "text",
                "path": [text_file, whole["text"]],
            },
            "packed": {
                "kind": "text",
                "path": [packed, whole["text"]],
            },
            "table": {"kind": "text", "path": [self.parquet("t.parquet", 2 * few), whole["text"]]},
        }


def replaced(value: Any, path: tuple[Any, ...], junk: Any) -> Any:
    """A copy of nested lists and mappings with something else at one place."""
    if not path:
        return junk
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = junk
    return value
