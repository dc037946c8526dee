"""What a file holds is seen or counted: each kind of source against a count that the test makes by itself."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.readers import ImageTextReader, build_reader
from sphinx_pl.data.train_loader import TrainLoader
from tests.fuzzing import encoded, picture

JPEG = encoded(picture(), "JPEG")
Member = tuple[str, bytes | None]


def tar(path: Path, members: Sequence[Member]) -> Path:
    """A member without contents is a folder, or a link where its name has an arrow."""
    mode = "w:gz" if path.suffix in (".gz", ".tgz") else "w"
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name.partition(" -> ")[0])
            if data is None:
                info.type = tarfile.SYMTYPE if " -> " in name else tarfile.DIRTYPE
                info.linkname = name.partition(" -> ")[2]
            info.size = len(data or b"")
            archive.addfile(info, io.BytesIO(data or b""))
    return path


def counters(processor: Processor, source: dict[str, Any]) -> Counter[str]:
    """Of one epoch, without the source's name: seen, samples, skipped/<reason>, unused/<name>, ..."""
    packing = {"row_length": 256, "micro_batch_rows": 4}
    data = DataModule(processor, {"x": source}, {}, packing, max_skipped=1.0, mixing={"epochs": 1, "partitions": 1})
    loader = TrainLoader(data.planner(), data.collator, 0, 1.0, False)
    list(loader)
    total: Counter[str] = Counter()
    for key, count in loader.counters.items():
        if "/" not in key:  # what was decoded
            continue
        total[key.replace("skipped/x/", "skipped/").removeprefix("x/")] += count
    # The words are of what was really there.
    for key in (key for key in total if key.startswith(("skipped/", "unused/")) and key != "unused/ratio"):
        assert loader.example(f"x/{key}") or loader.example(key.replace("skipped/", "skipped/x/")), key
    return total


def left_out(total: Counter[str]) -> dict[str, int]:
    return {key: count for key, count in total.items() if count and key.startswith(("skipped/", "unused/"))}


def pair(key: str, image: str = "jpg", text: str = "txt", caption: bytes = b"a caption") -> list[Member]:
    return [(f"{key}.{image}", JPEG), (f"{key}.{text}", caption)]


NOTE = b'{"caption": "a caption"}'
TARS: dict[str, tuple[list[Member], int, dict[str, int]]] = {
    "a second dot in every second name": (
        [m for i in range(20) for m in pair(f"photo{i:02d}" + " v1.5" * (i % 2 == 0))],
        20,
        {},
    ),
    "a dot and spaces behind it": (pair("a v1.5 of 3") + pair("b. c. d") + pair("1.2.3"), 3, {}),
    "WebDataset's further files": (
        [*pair("a"), ("a.seg.png", JPEG), ("a.cls", b"1"), ("a.en.txt", b"x")],
        1,
        {"unused/further_image": 1, "unused/cls": 1, "unused/further_text": 1},
    ),
    "WebDataset's double extensions": ([("a.img.jpg", JPEG), ("a.cap.txt", b"a"), *pair("b")], 2, {}),
    "halves of two pairs": (
        [*pair("v1.5 cat"), ("v1.6 cat.jpg", JPEG), ("v1.7 dog.txt", b"a"), ("p.0001.jpg", JPEG), ("p.0002.txt", b"b")],
        1,
        {"skipped/caption_absent": 2, "skipped/image_absent": 2},
    ),
    "halves of two pairs in words": (
        [*pair("yard.day"), ("yard.dawn.jpg", JPEG), ("yard.dusk.txt", b"a")],
        1,
        {"skipped/caption_absent": 1, "skipped/image_absent": 1},
    ),
    "the image's extension in the note's name": ([("a.jpg", JPEG), ("a.jpg.json", NOTE)], 1, {}),
    "double extensions that say too much": (
        [("a.left.jpg", JPEG), ("a.right.jpg", JPEG), ("a.txt", b"a"), *pair("b")],
        1,
        {"skipped/caption_absent": 2, "skipped/image_absent": 1},
    ),
    "subfolders": (pair("x/a") + pair("y/a") + pair("./z/a") + pair("x//b") + pair("x.y/c"), 5, {}),
    "capitals": (pair("a", "JPG", "TXT") + pair("b", "Jpeg", "Json", NOTE) + pair("c", "PNG"), 3, {}),
    "other extensions of the same": (
        pair("a", "jpeg", "caption") + pair("b", "webp", "text") + pair("c", "tif") + pair("d", "gif", "json", NOTE),
        4,
        {},
    ),
    "extensions that nobody knows": (
        [*pair("a"), ("b.heic", JPEG), ("b.txt", b"b"), ("README.md", b"hello"), ("LICENSE", b"hello"), ("c.5", b"")],
        1,
        {"skipped/image_absent": 1, "unused/heic": 1, "unused/md": 1, "unused/other": 2},
    ),
    "halves that are not side by side": (
        [(f"{i}.jpg", JPEG) for i in range(4)] + [(f"{i}.txt", b"a") for i in range(5)],
        4,
        {"skipped/image_absent": 1},
    ),
    "images, notes and texts one after another": (
        [(f"{i}.{end}", data) for end, data in (("jpg", JPEG), ("json", NOTE), ("txt", b"a")) for i in "abc"],
        3,
        {},
    ),
    "a key twice": (pair("a") + pair("b") + pair("a"), 2, {"skipped/duplicate_key": 1}),
    "a key three times in a row": (pair("a") * 3 + pair("b"), 2, {"skipped/duplicate_key": 2}),
    "a key whose first half is alone": (
        [("a.jpg", JPEG), *pair("b"), *pair("a")],
        1,
        {"skipped/duplicate_key": 2},
    ),
    "hidden files": (
        [*pair("a"), *pair("._a"), ("x/._b.jpg", JPEG), (".DS_Store", b"x"), ("__MACOSX/._a.jpg", b"x")],
        1,
        {"unused/hidden": 5},
    ),
    "folders and links": (
        [("x", None), *pair("x/a"), ("x/b.jpg -> a.jpg", None), ("x/b.txt", b"b")],
        1,
        {"unused/folder": 1, "unused/link": 1, "skipped/image_absent": 1},
    ),
    "empty members": (
        [*pair("a"), ("b.jpg", b""), ("b.txt", b"b"), *pair("c", caption=b""), *pair("d", text="json", caption=b"")],
        4,
        {"skipped/image_empty": 1, "skipped/caption_empty": 1, "skipped/json_unreadable": 1},
    ),
    "a note without a caption": ([*pair("a"), *pair("b", text="json", caption=b"{}")], 2, {"skipped/caption_empty": 1}),
    "several captions": (
        [*pair("a"), ("a.caption", b"another"), ("a.json", NOTE), ("a.text", b"and another")],
        1,
        {"unused/caption": 1, "unused/text": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("packing", [".tar", ".tar.gz"])
@pytest.mark.parametrize("name", TARS)
def test_members_of_a_tar(processor: Processor, tmp_path: Path, name: str, packing: str) -> None:
    members, count, expected = TARS[name]
    path = tar(tmp_path / f"a{packing}", members)
    total = counters(processor, {"kind": "image_text", "path": str(path)})
    assert total["seen"] == count
    assert left_out(total) == expected
    # tarfile's own count: every image is seen or counted, whatever its name.
    with tarfile.open(path) as archive:
        files = [PurePosixPath(m.name) for m in archive.getmembers() if m.isfile()]
    images = sum(path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".tif", ".gif") for path in files)
    not_images = total["skipped/image_absent"] + sum(
        total[f"unused/{key}"] for key in total if key.startswith("unused/") and key != "unused/further_image"
    )
    assert total["seen"] + total.total() - not_images >= images
    texts = {p.with_suffix("") for p in files if p.suffix.lower() in (".txt", ".text", ".caption", ".json")}
    assert total["seen"] <= len(texts)


def test_archives_one_after_another(processor: Processor, tmp_path: Path) -> None:
    parts = [tar(tmp_path / f"{key}.tar", pair(key)).read_bytes() for key in "abc"]
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "x.tar").write_bytes(b"".join(parts))
    total = counters(processor, {"kind": "image_text", "path": str(tmp_path / "all" / "x.tar")})
    assert (total["seen"], left_out(total)) == (3, {})
    (tmp_path / "all" / "x.tar").write_bytes(parts[0] + b"no tar at all" * 100)
    total = counters(processor, {"kind": "image_text", "path": str(tmp_path / "all" / "x.tar")})
    assert (total["seen"], left_out(total)) == (1, {"skipped/shard_truncated": 1})


def test_what_a_tar_leaves_is_named(tmp_path: Path) -> None:
    members = [*pair("a"), ("photo 7.heic", JPEG), ("photo 7.txt", b"b"), ("c d.e.jpg", JPEG)]
    shard = ImageTextReader("web", str(tar(tmp_path / "a.tar", members))).open(0)
    assert shard.examples["unused/heic"] == "photo 7.heic"
    assert shard.examples["skipped/image_absent"] == "photo 7: no image beside the .txt"
    assert shard.examples["skipped/caption_absent"].startswith("c d.e: no .txt")


# --- entries

CHAT = {"conversations": [{"from": "human", "value": "How are you?"}, {"from": "gpt", "value": "Fine."}]}
BAD_LINES = [b"", b" " * 40, b"\t\r", b"null", b"7", b"\0" * 9, b'{"cut', b"{}", b'{"text": null, "conversations": 3}']


@pytest.mark.parametrize("kind", ["instructions", "text"])
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_lines(processor: Processor, tmp_path: Path, kind: str, ending: bytes, packing: str) -> None:
    good = json.dumps(CHAT if kind == "instructions" else {"text": "a text"}).encode()
    # The last line is good and has no end; a byte order mark is no part of the first.
    data = b"\xef\xbb\xbf" + ending.join([good, *BAD_LINES, good, b"  " + good, good])
    path = tmp_path / f"x.jsonl{packing}"
    if packing == ".gz":
        path.write_bytes(gzip.compress(data))
    elif packing:
        path.write_bytes(pyarrow.Codec("zstd").compress(data, asbytes=True))
    else:
        path.write_bytes(data)
    total = counters(processor, {"kind": kind, "path": str(path)})
    entries = [line for line in data.split(b"\n") if line.strip()]
    assert total["seen"] == len(entries) == 10
    assert total["samples"] == 4
    assert sum(left_out(total).values()) == 6


def test_lists_with_nulls(processor: Processor, tmp_path: Path) -> None:
    entries = [None, CHAT, [], CHAT, 3, "text", {}]
    (tmp_path / "x.json").write_text(f"{json.dumps(entries)}\n \n")
    total = counters(processor, {"kind": "instructions", "path": str(tmp_path / "x.json")})
    assert total["seen"] == len(json.loads((tmp_path / "x.json").read_text()))
    assert (total["samples"], sum(left_out(total).values())) == (2, 5)
    (tmp_path / "y.json").write_text(f"{json.dumps(entries)}\n{json.dumps(entries)}\n")
    total = counters(processor, {"kind": "instructions", "path": str(tmp_path / "y.json")})
    assert (total["seen"], total["skipped/text_after_list"]) == (7, 1)


def test_entries_that_are_not_asked_for(processor: Processor, tmp_path: Path) -> None:
    entries = [CHAT | {"meta": {"topic": topic}} for topic in ("a", "b", None)] + [{"task": "rec"}, CHAT, 7]
    (tmp_path / "x.json").write_text(json.dumps(entries))
    source = {"kind": "instructions", "path": str(tmp_path / "x.json"), "tasks": ["chat"], "where": {"topic": "a"}}
    total = counters(processor, source)
    assert (total["seen"], total["samples"]) == (1, 1)
    assert left_out(total) == {"unused/tasks": 1, "unused/where": 3, "skipped/entry_malformed": 1}
    half = counters(processor, {"kind": "instructions", "path": str(tmp_path / "x.json"), "ratio": 0.5})
    assert (half["seen"], half["unused/ratio"]) == (3, 3)


def test_rows_of_a_table(processor: Processor, tmp_path: Path) -> None:
    texts = ["one", None, "", "  ", "two"]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "x.parquet")
    total = counters(processor, {"kind": "text", "path": str(tmp_path / "x.parquet")})
    assert total["seen"] == pyarrow.parquet.read_metadata(tmp_path / "x.parquet").num_rows
    assert (total["samples"], left_out(total)) == (2, {"skipped/text_empty": 3})


def test_a_text_file_is_a_document(processor: Processor, tmp_path: Path) -> None:
    for name, data in {"a.txt": b"One.\n\nTwo.\n", "b.TXT": b"caf\xe9", "c.md": b" "}.items():
        (tmp_path / name).write_bytes(data)
    total = counters(processor, {"kind": "text", "path": str(tmp_path / "*")})
    assert (total["seen"], total["samples"]) == (3, 1)
    assert left_out(total) == {"skipped/text_not_utf8": 1, "skipped/text_empty": 1}
    assert build_reader("text", "x", str(tmp_path / "a.txt")).record(0).answer == "One.\n\nTwo.\n"
