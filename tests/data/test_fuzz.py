"""Damaged data: whatever bytes a file holds, its samples are read, or skipped with a reason; nothing else happens."""

from __future__ import annotations

import contextlib
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from sphinx_pl.data.bad import BadSample
from sphinx_pl.data.images import load_image
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.record import ImageRef
from sphinx_pl.data.sources import build_source
from sphinx_pl.errors import UserError
from tests.fuzzing import damaged

RECORDS = 12  # of each damaged file that are read


def read_all(kind: str, path: Path, processor: Processor, found: Counter[str]) -> None:
    """What training does with a source, up to pixels and token ids."""
    source = build_source(kind, "fuzzed", str(path))
    try:
        len(source)
    except UserError:
        found["refused"] += 1
        return
    found.update(source.skipped)
    for index in range(min(len(source), RECORDS)):
        try:
            record = source.record(index)
            for ref in record.images:
                load_image(ref, 32)
            processor.sample(record, "fuzzed", random.Random(0))
            found["read"] += 1
        except BadSample as error:
            found[error.reason] += 1


@pytest.fixture
def files(sample_data: Path, tmp_path: Path) -> dict[str, tuple[str, Path]]:
    """Name -> kind of source and a small whole file of it."""
    entries = json.loads((sample_data / "instructions/val.json").read_text())
    few = random.Random(0).sample(entries, min(60, len(entries)))
    (tmp_path / "few.json").write_text(json.dumps(few))
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in few))
    (tmp_path / "images").symlink_to(sample_data / "instructions/images")
    return {
        "shard.tar": ("image_text", sample_data / "synthetic/val-00000.tar"),
        "text.jsonl": ("text", sample_data / "text/val.jsonl"),
        "list.json": ("instructions", tmp_path / "few.json"),
        "lines.jsonl": ("instructions", tmp_path / "few.jsonl"),
    }


def fuzz_sources(
    files: dict[str, tuple[str, Path]], folder: Path, processor: Processor, rounds: int
) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for name, (kind, whole) in files.items():
        original, found[name] = whole.read_bytes(), Counter()
        for seed in range(rounds):
            path = folder / name
            path.write_bytes(damaged(original, random.Random(f"{name} {seed}")))
            try:
                read_all(kind, path, processor, found[name])
            except Exception as error:
                error.add_note(f"{name}, seed {seed}")
                raise
    return found


def test_damaged_data_is_read_or_skipped(
    files: dict[str, tuple[str, Path]], processor: Processor, tmp_path: Path
) -> None:
    for name, found in fuzz_sources(files, tmp_path, processor, rounds=24).items():
        assert found["read"] > 0, name
        assert sum(found.values()) > found["read"], name


@pytest.mark.long
def test_much_damaged_data_is_read_or_skipped(
    files: dict[str, tuple[str, Path]], processor: Processor, tmp_path: Path
) -> None:
    for name, found in fuzz_sources(files, tmp_path, processor, rounds=600).items():
        print(name, dict(found.most_common()))
        assert found["read"] > 0, name


def test_damaged_images_are_read_or_skipped(sample_data: Path, tmp_path: Path) -> None:
    found: Counter[str] = Counter()
    path = tmp_path / "image.jpg"
    for index, whole in enumerate(sorted((sample_data / "instructions/images").iterdir())[:200]):
        path.write_bytes(damaged(whole.read_bytes(), random.Random(index)))
        with contextlib.suppress(BadSample):
            load_image(ImageRef(str(path)), 32)
            found["read"] += 1
    assert 0 < found["read"] < 200
