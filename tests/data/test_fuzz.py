"""Damaged data: whatever bytes a file holds, its samples are read, or skipped with a reason; nothing else happens."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import sphinx_pl.data.files as files_module
from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.images import load_image
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.readers import build_reader
from sphinx_pl.data.sampling.config import MixingConfig
from sphinx_pl.data.sampling.mixture import Mixture
from sphinx_pl.data.schema import ImageRef
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.train_loader import TrainLoader
from sphinx_pl.utils.errors import UserError
from tests.fuzzing import World, damaged, mangled

RECORDS = 12  # of each damaged file that are read


def read_all(kind: str, path: Path, processor: Processor, counts: Counter[str]) -> None:
    """What training does with a source, up to pixels and token ids."""
    source = build_reader(kind, "fuzzed", str(path))
    try:
        len(source)
    except UserError:
        counts["refused"] += 1
        return
    counts.update(source.skipped)
    for index in range(min(len(source), RECORDS)):
        try:
            record = source.record(index)
            for ref in record.images:
                load_image(ref, 32)
            processor.sample(record, "fuzzed", random.Random(0))
            counts["read"] += 1
        except SkipSample as error:
            counts[error.reason] += 1


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
    counts: dict[str, Counter[str]] = {}
    for name, (kind, whole) in files.items():
        original, counts[name] = whole.read_bytes(), Counter()
        for seed in range(rounds):
            path = folder / name
            path.write_bytes(damaged(original, random.Random(f"{name} {seed}")))
            try:
                read_all(kind, path, processor, counts[name])
            except Exception as error:
                error.add_note(f"{name}, seed {seed}")
                raise
    return counts


def test_damaged_data_is_read_or_skipped(
    files: dict[str, tuple[str, Path]], processor: Processor, tmp_path: Path
) -> None:
    for name, counts in fuzz_sources(files, tmp_path, processor, rounds=24).items():
        assert counts["read"] > 0, name
        assert sum(counts.values()) > counts["read"], name


@pytest.mark.long
def test_much_damaged_data_is_read_or_skipped(
    files: dict[str, tuple[str, Path]], processor: Processor, tmp_path: Path
) -> None:
    for name, counts in fuzz_sources(files, tmp_path, processor, rounds=600).items():
        print(name, dict(counts.most_common()))
        assert counts["read"] > 0, name


def test_damaged_images_are_read_or_skipped(sample_data: Path, tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    path = tmp_path / "image.jpg"
    for index, whole in enumerate(sorted((sample_data / "instructions/images").iterdir())[:200]):
        path.write_bytes(damaged(whole.read_bytes(), random.Random(index)))
        with contextlib.suppress(SkipSample):
            load_image(ImageRef(str(path)), 32)
            counts["read"] += 1
    assert 0 < counts["read"] < 200


# --- the whole path: damaged files of every kind -> mixture -> planner -> collated batches

CASE_SECONDS = 30
"""A bound, not a measure: a case of 200 records takes about half a second."""


def used_and_counted(data: DataModule) -> tuple[Counter[str], list[str]]:
    """Counters and keys of a finite mixture that was read to its end; every record must be in one of them."""
    train = TrainLoader(data.planner(), data.collator, 0, data.max_skipped, False)
    keys: list[str] = []
    for batch in train:
        assert torch.isfinite(batch.weights).all()
        keys += batch.keys
    left_out, indexed = train.planner.left_out(train.planner.number)
    counts = train.planner.counts(train.planner.number)
    planned = counts - left_out
    total = sum(value for key, value in planned.items() if key.endswith("/seen"))
    samples = sum(value for key, value in planned.items() if key.endswith("/samples"))
    others = sum(value for key, value in planned.items() if {"skipped", "filtered", "capped"} & set(key.split("/")))
    parts = sum(value for key, value in planned.items() if key.endswith("/parts"))
    assert total == indexed.total()
    assert total + parts == samples + others, dict(planned)
    assert len(keys) == samples
    return counts + train.counts, keys


def fuzz_case(folder: Path, entries: list[dict[str, Any]], processor: Processor, seed: int) -> tuple[Counter[str], str]:
    """Counters of one damaged world, and a digest of them and of all keys in their order."""
    world = World(folder, entries, seed)
    sources = world.sources(200)
    inline = dataclasses.replace(processor, image_position="inline") if seed % 3 == 1 else processor
    if seed % 3 == 2:  # sizes are read from headers
        inline = dataclasses.replace(processor, view_tokens=(2,) * 5)
    begun = time.monotonic()
    data = DataModule(
        inline,
        sources,
        {},
        {"row_length": 256, "micro_batch_rows": 8},
        max_skipped=1.0,
        mixing={"epochs": 1},
        seed=seed,
    )
    keys: list[str] = []
    try:
        counts, keys = used_and_counted(data)
    except UserError:
        counts = Counter(["refused"])
    except Exception as error:
        error.add_note(f"seed {seed}, {folder}")
        raise
    took = time.monotonic() - begun
    assert took < CASE_SECONDS, (seed, took)
    return counts, hashlib.sha256(repr((sorted(counts.items()), keys)).encode()).hexdigest()


def fuzz_path(
    sample_data: Path, folder: Path, processor: Processor, records: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> Counter[str]:
    """`records` records at least; the first `rounds` cases are made twice."""
    monkeypatch.setattr(files_module, "FIRST_WAIT", 0.0)
    entries = json.loads((sample_data / "instructions/val.json").read_text())
    outcomes: Counter[str] = Counter()
    seed = 0
    while sum(value for key, value in outcomes.items() if key.endswith("/seen")) < records:
        counts, digest = fuzz_case(folder / "world", entries, processor, seed)
        shutil.rmtree(folder / "world")
        if seed < rounds:
            assert fuzz_case(folder / "world", entries, processor, seed)[1] == digest, seed
            shutil.rmtree(folder / "world")
        outcomes += counts
        seed += 1
    print(seed, "cases:", dict(outcomes.most_common()))
    assert outcomes["refused"] * 10 < seed
    for name in ("web", "chosen", "list.image_text-list", "lines", "limited", "text", "packed", "table"):
        assert outcomes[f"{name}/samples"] > outcomes[f"{name}/seen"] / 5, name
        assert any(key.startswith((f"skipped/{name}/", f"{name}/filtered/")) for key in outcomes), name
    return outcomes


def test_ten_thousand_damaged_records_through_the_whole_path(
    sample_data: Path, tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuzz_path(sample_data, tmp_path, processor, records=10_000, rounds=3, monkeypatch=monkeypatch)


@pytest.mark.long
def test_many_more_damaged_records_through_the_whole_path(
    sample_data: Path, tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuzz_path(sample_data, tmp_path, processor, records=200_000, rounds=20, monkeypatch=monkeypatch)


def test_damaged_lists_of_files_are_read_or_refused(
    tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original's META files: entries changed in structure, and their text as bytes."""
    monkeypatch.setattr(files_module, "FIRST_WAIT", 0.0)
    (tmp_path / "a.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 4)
    whole = {"META": [{"path": str(tmp_path / "a.jsonl"), "type": "image_text", "root": "x", "ratio": 0.5}] * 2}
    values = [
        *("{0..99999999999999999999}", "{a,b}" * 60, "~nobody/a.json", "\0", "a" * 5000, "pipe:exit 3", "no://x"),
        *("&a [*a]", "!!python/object:os.system x", "2024-99-99", "[" * 5000, "<<: *a", "0o9", "1:1:1"),
    ]
    counts: Counter[str] = Counter()
    meta = tmp_path / "meta.yaml"
    for seed in range(300):
        rng = random.Random(seed)
        text = json.dumps(mangled(whole, rng)) if seed % 3 else json.dumps(whole)
        if seed % 2:
            text = text.replace(rng.choice(('"image_text"', '"x"', "0.5", str(tmp_path))), rng.choice(values))
        data = text.encode("utf-8", "surrogatepass")
        meta.write_bytes(damaged(data, rng) if seed % 5 == 0 else data)
        try:
            Mixture({"list": {"kind": "meta", "path": str(meta)}}, processor, 0, mixing=MixingConfig(epochs=1))
            counts["read"] += 1
        except UserError:
            counts["refused"] += 1
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    assert counts["read"] > 50
    assert counts["refused"] > 50
