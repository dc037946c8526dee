"""The index of a shard is what tarfile alone would make of it."""

from __future__ import annotations

import io
import random
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from sphinx_pl.data.readers import ImageTextReader, image_text

Index = tuple[list[bytes], list[list[list[int]]], Counter[str]]
NAMES = (
    "a",
    "./b",
    "dir/c",
    "dir//d",
    "dir/./e",
    ".f",
    "dir/.g",
    "/h",
    "i.tar",
    "dir./j",
    "ü",
    "l" * 90 + "/" + "m" * 60,
)


def write(path: Path, form: int, mtime: float, pax_headers: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w", format=form, pax_headers=pax_headers) as tar:
        for name in NAMES:
            for extension in ("JPG", "txt"):
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size, info.mtime = 600, mtime
                tar.addfile(info, io.BytesIO(b"x" * 600))
        tar.addfile(tarfile.TarInfo("empty.jpg"))
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    return path


def index(path: Path) -> Index:
    shard = ImageTextReader("web", str(path)).open(0)
    assert isinstance(shard, image_text._TarShard)
    return shard.keys.tolist(), shard.spans.tolist(), shard.skipped


def indices(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Index, Index]:
    """Ours, and tarfile's."""
    result = index(path)
    with monkeypatch.context() as patch:
        patch.setattr(image_text, "_plain_header", lambda *arguments: None)
        return result, index(path)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("mtime", [0, 1_700_000_000.25])
def test_every_format_and_name(tmp_path: Path, form: int, mtime: float, monkeypatch: pytest.MonkeyPatch) -> None:
    result, expected = indices(write(tmp_path / "a.tar", form, mtime), monkeypatch)
    assert result == expected
    assert len(result[0]) == len(NAMES) - 2  # .f and .g are hidden


def test_a_global_header_applies_to_all_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.tar", tarfile.PAX_FORMAT, 0.5, {"path": "same.jpg"})
    result, expected = indices(path, monkeypatch)
    assert result == expected


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_damage_and_cuts(tmp_path: Path, form: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(tmp_path / "a.tar", form, 0.5).read_bytes()
    rng = random.Random(0)
    path = tmp_path / "b.tar"
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(0, 3)):
            header = rng.randrange(len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            field = rng.choice((rng.randrange(100), 124 + rng.randrange(12), 148 + rng.randrange(9)))
            data[header + field] = rng.choice((0, 32, 48, 55, 0x80, 0xFF, rng.randrange(256)))
            if rng.random() < 0.5:  # a checksum that agrees
                data[header + 148 : header + 156] = b" " * 8
                data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + tarfile.BLOCKSIZE])
        path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
        result, expected = indices(path, monkeypatch)
        assert result == expected
