"""Every kind of bad data through mixture, planner and collator: which counter it has, and that the rest is used."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import sphinx_pl.data.files as files_module
from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.schema import IGNORE, Batch
from sphinx_pl.data.train_loader import TrainLoader
from sphinx_pl.utils.errors import UserError
from tests.conftest import REPOSITORY
from tests.fuzzing import bad_images, encoded, good_images, picture, write_tar

JPEG = encoded(picture(), "JPEG")
Found = tuple[set[str], dict[str, int], list[Batch]]


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, which are not made."""
    waits: list[float] = []
    monkeypatch.setattr(files_module.time, "sleep", waits.append)
    monkeypatch.setattr(files_module, "_failed", {})
    return waits


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPHINX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "files"


def train(processor: Processor, sources: dict[str, Any], workers: int = 0, **options: Any) -> TrainLoader:
    """Every source once, unless `epochs` says something else."""
    mixing = {"epochs": options.pop("epochs", 1), "partitions": options.pop("partitions", 1)}
    packing = {"row_length": options.pop("row_length", 256), "micro_batch_rows": 4}
    data = DataModule(processor, sources, {}, packing, max_skipped=1.0, mixing=mixing)
    return TrainLoader(data.planner(), data.collator, workers, data.max_skipped, False)


def read(processor: Processor, sources: dict[str, Any], **options: Any) -> Found:
    """Keys that have targets, the counters of what could not be used, and the batches, of a mixture read once."""
    loader = train(processor, sources, **options)
    batches = list(loader)
    return used(batches), left_out(loader), batches


def left_out(loader: TrainLoader) -> dict[str, int]:
    marks = ("skipped/", "filtered/", "capped/")
    values = {key: value for key, value in loader.counters.items() if any(mark in key for mark in marks)}
    assert all(key.startswith("skipped/") for key in values if "skipped/" in key), values
    return values


def used(batches: list[Batch]) -> set[str]:
    """Keys of the questions that have targets."""
    names = set()
    for batch in batches:
        places = [
            (row, segment, question)
            for row in range(len(batch.segment_ids))
            for segment in batch.segment_ids[row].unique().tolist()
            if segment
            for question in batch.question_ids[row][batch.segment_ids[row] == segment].unique().tolist()
            if question
        ]
        for key, (row, segment, question) in zip(batch.keys, places, strict=True):
            mine = (batch.segment_ids[row] == segment) & (batch.question_ids[row] == question)
            if (batch.labels[row][mine] != IGNORE).any():
                assert key not in names
                names.add(key)
    return names


def pair(key: str, image: bytes = JPEG, caption: bytes = b"a caption") -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", image), (f"{key}.txt", caption)]


def web(path: Any, **values: Any) -> dict[str, Any]:
    return {"kind": "image_text", "path": path, **values}


def text_lines(path: Path, count: int, name: str = "text") -> Path:
    path.write_text("".join(json.dumps({"text": f"{name} number {i}"}) + "\n" for i in range(count)))
    return path


# --- one bad thing among good ones


def one_pair(*members: tuple[str, bytes]) -> Callable[[Path], dict[str, Any]]:
    """A tar with a good pair, these members and another good pair."""
    return lambda folder: web(str(write_tar(folder / "s.tar", [*pair("a"), *members, *pair("z")])))


def tar_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], dict[str, Any]]:
    """Two good shards and one that was changed as bytes."""

    def make(folder: Path) -> dict[str, Any]:
        first = write_tar(folder / "0.tar", pair("a"))
        last = write_tar(folder / "2.tar", pair("z"))
        bad = write_tar(folder / "1.tar", pair("b"))
        bad.write_bytes(change(bad.read_bytes()))
        return web([str(first), str(bad), str(last)])

    return make


def entry(value: Any) -> Callable[[Path], dict[str, Any]]:
    """A JSON list with a good entry, this one, and another good one."""

    def make(folder: Path) -> dict[str, Any]:
        (folder / "a.jpg").write_bytes(JPEG)
        good = {"image": "a.jpg", "question": "what?", "answer": "noise", "task": "short_vqa"}
        (folder / "c.json").write_text(json.dumps([good, value, good]))
        return {"kind": "instructions", "path": str(folder / "c.json")}

    return make


def line(data: bytes) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        good = b'{"text": "a text"}'
        (folder / "t.jsonl").write_bytes(b"\n".join([good, data, good]))
        return {"kind": "text", "path": str(folder / "t.jsonl")}

    return make


REC = {"image": "a.jpg", "task": "rec", "question": "it", "width": 40, "height": 30}
BAD: dict[str, tuple[Callable[[Path], dict[str, Any]], dict[str, int]]] = {
    # images: found out when they are decoded
    **{
        f"image_{name}": (one_pair(*pair("b", data)), {f"skipped/bad/{reason}": 1})
        for name, (data, reason) in bad_images().items()
    },
    # pairs
    "caption_latin1": (one_pair(*pair("b", caption=b"caf\xe9")), {"skipped/bad/caption_not_utf8": 1}),
    "caption_blank": (one_pair(*pair("b", caption=b" \n")), {"skipped/bad/caption_empty": 1}),
    "caption_million": (one_pair(*pair("b", caption=b"word " * 200_000)), {"bad/filtered/caption_chars": 1}),
    "caption_absent": (one_pair(("b.jpg", JPEG)), {"skipped/bad/caption_absent": 1}),
    "caption_no_string": (one_pair(("b.jpg", JPEG), ("b.json", b'{"caption": 3}')), {"skipped/bad/caption_empty": 1}),
    "json_broken": (one_pair(("b.jpg", JPEG), ("b.json", b'{"caption": "cut')), {"skipped/bad/json_unreadable": 1}),
    "json_deep": (one_pair(("b.jpg", JPEG), ("b.json", b"[" * 99_999)), {"skipped/bad/json_unreadable": 1}),
    "image_absent": (one_pair(("b.txt", b"a caption")), {"skipped/bad/image_absent": 1}),
    "key_of_a_megabyte": (one_pair(*pair("k" * 1_000_000)), {"skipped/bad/key_too_long": 1}),
    # shards
    "tar_cut": (tar_bytes(lambda data: data[:600]), {"skipped/bad/shard_truncated": 1}),
    "tar_of_zero_bytes": (tar_bytes(lambda data: b""), {"skipped/bad/shard_unreadable": 1}),
    "tar_is_a_page": (tar_bytes(lambda data: b"<html>" * 999), {"skipped/bad/shard_unreadable": 1}),
    # entries
    "entry_is_a_number": (entry(7), {"skipped/bad/entry_malformed": 1}),
    "entry_without_anything": (entry({}), {"skipped/bad/question_empty": 1}),
    "task_unknown": (entry({"task": "recc", "question": "a", "answer": "b"}), {"skipped/bad/task_unknown": 1}),
    "answer_empty": (entry({"question": "why?", "answer": " "}), {"skipped/bad/answer_empty": 1}),
    "answer_absent": (
        entry({"image": "a.jpg", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]}),
        {"skipped/bad/answer_empty": 1},
    ),
    "mark_without_image": (entry({"question": "<image> what?", "answer": "b"}), {"skipped/bad/image_absent": 1}),
    "task_without_image": (entry(REC | {"image": None}), {"skipped/bad/image_absent": 1}),
    "image_nowhere": (
        entry({"image": "no.jpg", "question": "a", "answer": "b"}),
        {"skipped/bad/image_missing": 1},
    ),
    "image_is_a_folder": (
        entry({"image": ".", "question": "a", "answer": "b"}),
        {"skipped/bad/image_unreadable": 1},
    ),
    "box_outside": (entry(REC | {"regions": [{"box": [1, 2, 90, 9]}]}), {"skipped/bad/box_outside": 1}),
    "box_inverted": (entry(REC | {"regions": [{"box": [9, 2, 3, 9]}]}), {"skipped/bad/box_inverted": 1}),
    "box_nan": (entry(REC | {"regions": [{"box": [1, 2, float("nan"), 9]}]}), {"skipped/bad/box_inverted": 1}),
    "box_huge": (entry(REC | {"regions": [{"box": [1, 2, 10**400, 9]}]}), {"skipped/bad/entry_malformed": 1}),
    "box_in_fractions": (entry(REC | {"regions": [{"box": [0.1, 0.2, 0.5, 1]}]}), {"skipped/bad/box_below_pixel": 1}),
    "box_in_thousandths": (entry(REC | {"regions": [{"box": [1, 200, 500, 999]}]}), {"skipped/bad/box_outside": 1}),
    "box_as_corner_and_size": (entry(REC | {"regions": [{"box": [20, 20, 9, 8]}]}), {"skipped/bad/box_inverted": 1}),
    "sides_swapped": (
        entry(REC | {"width": 30, "height": 40, "regions": [{"box": [1, 2, 9, 9]}]}),
        {"skipped/bad/size_mismatch": 1},
    ),
    "sides_swapped_in_a_conversation": (
        entry(
            {"image": "a.jpg", "width": 30, "height": 40}
            | {"conversations": [{"from": "human", "value": "it?"}, {"from": "gpt", "value": "<box>(1,2),(9,9)</box>"}]}
        ),
        {"skipped/bad/size_mismatch": 1},
    ),
    "region_absent": (entry(REC), {"skipped/bad/region_missing": 1}),
    "size_absent": (entry(REC | {"width": None, "regions": [{"box": [1, 2, 3, 9]}]}), {"skipped/bad/size_unknown": 1}),
    "half_a_character": (entry({"question": "\ud83d", "answer": "b"}), {"skipped/bad/entry_malformed": 1}),
    "deep": (entry({"question": json.loads("[" * 900 + "]" * 900), "answer": "b"}), {"skipped/bad/entry_malformed": 1}),
    "question_of_a_million": (entry({"question": "word " * 200_000, "answer": "b"}), {"skipped/bad/too_long": 1}),
    "many_images": (
        entry({"image": ["a.jpg"] * 9999, "question": "a", "answer": "b"}),
        {"skipped/bad/too_long": 1},
    ),
    # documents
    "line_broken": (line(b'{"text": "cut'), {"skipped/bad/json_unreadable": 1}),
    "line_latin1": (line(b'{"text": "caf\xe9"}'), {"skipped/bad/json_not_utf8": 1}),
    "line_without_text": (line(b'{"txet": "a"}'), {"skipped/bad/text_empty": 1}),
    "line_of_ten_megabytes": (line(b'{"text": "%s"}' % (b"x" * 10_000_000)), {"skipped/bad/annotation_too_long": 1}),
}


@pytest.mark.parametrize("name", BAD)
def test_one_bad_thing_is_counted_and_the_others_are_used(processor: Processor, tmp_path: Path, name: str) -> None:
    make, expected = BAD[name]
    keys, counted, batches = read(processor, {"bad": make(tmp_path)})
    assert counted == expected
    # The two good ones, once each, and nothing in the bad one's place.
    assert len(keys) == 2
    assert all(batch.counters["tokens"] == int((batch.segment_ids > 0).sum()) for batch in batches)


def test_unusual_images_are_used(processor: Processor, tmp_path: Path) -> None:
    images = good_images()
    members = [member for name, data in images.items() for member in pair(name, data)]
    keys, counted, batches = read(processor, {"web": web(str(write_tar(tmp_path / "s.tar", members)))})
    assert counted == {}
    assert keys == {f"web/s.tar/{name}" for name in images}
    pixels = torch.cat([batch.pixels for batch in batches])
    assert len(pixels) == len(images)
    assert all(image.float().std() > 0 for image in pixels)


def test_odd_ids_are_no_fault_of_the_entry(processor: Processor, tmp_path: Path) -> None:
    ids: list[Any] = ["half \ud83d", "x" * 100_000, 10**400, "a\nb", None, ["a"], {}]
    entries = [{"id": value, "question": f"number {i}?", "answer": "b"} for i, value in enumerate(ids)]
    (tmp_path / "c.json").write_text(json.dumps(entries))
    keys, counted, _ = read(processor, {"chat": {"kind": "instructions", "path": str(tmp_path / "c.json")}})
    assert counted == {}
    assert len(keys) == len(ids)
    assert all(len(key.encode()) < 400 for key in keys)


def test_a_column_that_is_no_number_is_filtered(processor: Processor, tmp_path: Path) -> None:
    values = {"a": 0.5, "b": 10**400, "c": "0.9", "d": [[]], "e": None, "f": float("nan"), "g": 0.1}
    members = [
        member
        for key, value in values.items()
        for member in [(f"{key}.jpg", JPEG), (f"{key}.json", json.dumps({"caption": "c", "score": value}).encode())]
    ]
    source = web(str(write_tar(tmp_path / "s.tar", members)), filters={"columns": {"score": {"min": 0.3}}})
    keys, counted, _ = read(processor, {"web": source})
    assert keys == {"web/s.tar/a", "web/s.tar/c"}
    assert counted == {"web/filtered/score": 4, "web/filtered/score_absent": 1}


def test_a_book_is_used_to_its_last_word(processor: Processor, tmp_path: Path) -> None:
    text = " ".join(f"word{i}" for i in range(100_000))  # about a million characters
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": text}) + "\n")
    loader = train(processor, {"book": {"kind": "text", "path": str(tmp_path / "t.jsonl")}})
    count = sum(len(batch.keys) for batch in loader)
    assert loader.counters["book/seen"] == 1
    assert loader.counters["book/samples"] == count == 1 + loader.counters["book/parts"]
    assert loader.counters["book/targets"] == len(processor.tokenizer.encode(text)) + 1


def test_what_is_longer_than_a_row_is_counted_as_that_and_as_nothing_else(processor: Processor, tmp_path: Path) -> None:
    texts = ["short", "a long text of many words " * 20]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    loader = train(processor, {"text": {"kind": "text", "path": str(tmp_path / "t.jsonl")}}, row_length=32)
    keys = [key for batch in loader for key in batch.keys]
    counts = Counter(loader.counters)
    assert counts["skipped/text/longer_than_row"] > 0
    assert counts["text/samples"] == len(keys)
    assert counts["text/seen"] + counts["text/parts"] == len(keys) + counts["skipped/text/longer_than_row"]


def test_a_cap_counts_what_is_used_and_what_it_leaves_is_no_bad_data(processor: Processor, tmp_path: Path) -> None:
    good = [{"question": f"number {i}?", "answer": "b"} for i in range(3000)]
    bad = [{"question": "a", "answer": ""}] * 50
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(value) + "\n" for value in [*bad, *good]))
    source = {"kind": "instructions", "path": str(tmp_path / "c.jsonl"), "caps": {"chat": 40}}
    loader = train(processor, {"chat": source}, epochs=3)
    keys = [key for batch in loader for key in batch.keys]
    assert len(keys) == 3 * 40  # after them thousands of records in a row give nothing
    counts = loader.counters
    assert counts["chat/seen"] == 3 * 3050
    assert counts["chat/capped/chat"] + counts["skipped/chat/answer_empty"] == 3 * 3050 - len(keys)


@pytest.mark.parametrize("partitions", [1, 2])
def test_what_could_not_be_indexed_is_held_against_all_that_was(
    processor: Processor, tmp_path: Path, partitions: int
) -> None:
    members = [member for i in range(3000) for member in [(f"{i}.jpg", JPEG), (f"{i}.txt", b"a caption")]]
    members += [(f"bad{i}.jpg", JPEG) for i in range(100)]
    sources = {"web": web(str(write_tar(tmp_path / "s.tar", members)))}
    # A thirtieth of all, although for each of the first few hundred seen there is nearly one that is left out.
    data = DataModule(
        processor,
        sources,
        {},
        {"row_length": 256, "micro_batch_rows": 4},
        max_skipped=0.05,
        mixing={"partitions": partitions},
    )
    for loader in (
        TrainLoader(data.planner(), data.collator, 0, 0.05, False),
        TrainLoader(data.planner(partitions=partitions, world_size=partitions), data.collator, 0, 0.05, False),
    ):
        list(itertools.islice(loader, 60))
        assert loader.counters["web/seen"] >= 200
        assert loader.counters["skipped/web/caption_absent"] == 100
    with pytest.raises(UserError, match=r"3\.2% of 3100 samples"):
        next(iter(TrainLoader(data.planner(), data.collator, 0, 0.02, False)))


# --- files that come and go


def test_a_shard_that_is_gone_before_it_is_opened(processor: Processor, tmp_path: Path, no_waits: list[float]) -> None:
    paths = [text_lines(tmp_path / f"{i}.jsonl", 5, str(i)) for i in range(3)]
    data = DataModule(
        processor,
        {"text": {"kind": "text", "path": [str(path) for path in paths]}},
        {},
        {"row_length": 64, "micro_batch_rows": 1},
        max_skipped=1.0,
        mixing={"epochs": 1},
    )
    data.check()
    hidden = paths[1].rename(tmp_path / "elsewhere")
    # Its path is that of no file any more: that is said before anything is read.
    with pytest.raises(UserError, match=r"there is no file .*1\.jsonl"):
        data.planner()
    # Between the list of files and their opening it is an accident, tried four times.
    hidden.rename(paths[1])
    opened = files_module.local_file

    def vanishing(url: str) -> tuple[str, bool]:
        paths[1].unlink(missing_ok=True)
        return opened(url)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sphinx_pl.data.readers.text.local_file", vanishing)
        loader = TrainLoader(data.planner(), data.collator, 0, 1.0, False)
    keys = used(list(loader))
    assert keys == {f"text/{name}.jsonl:{i}" for name in (0, 2) for i in range(5)}
    assert left_out(loader) == {"skipped/text/shard_missing": 1}
    assert no_waits == [0.5, 1.0, 2.0]


def shards(folder: Path, count: int = 2, pairs: int = 6) -> list[Path]:
    return [write_tar(folder / f"{i}.tar", [m for k in range(pairs) for m in pair(f"{k}")]) for i in range(count)]


def test_a_shard_that_is_gone_after_it_was_indexed(processor: Processor, tmp_path: Path, no_waits: list[float]) -> None:
    paths = shards(tmp_path)
    loader = train(processor, {"web": web([str(path) for path in paths])})
    paths[0].unlink()
    keys, counted = used(list(loader)), left_out(loader)
    assert keys == {f"web/1.tar/{i}" for i in range(6)}
    assert counted == {"skipped/web/file_unreadable": 6}
    assert no_waits == [0.5, 1.0, 2.0]  # for the first of its records, not for each


def test_a_shard_that_is_gone_before_its_images_are_decoded(
    processor: Processor, tmp_path: Path, no_waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = shards(tmp_path)
    loader = train(processor, {"web": web([str(path) for path in paths])})
    planner = loader.planner
    plans = planner.plan()
    paths[0].unlink()
    monkeypatch.setattr(files_module, "_HANDLES", files_module._Handles())  # a worker has none of its own
    batches = [loader.collator(plan.rows) for plan in plans]
    assert used(batches) == {f"web/1.tar/{i}" for i in range(6)}
    assert sum(batch.counters.get("skipped/web/image_missing", 0) for batch in batches) == 6
    assert no_waits == [0.5, 1.0, 2.0]


def test_a_handle_that_went_stale_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abcdef")
    assert files_module.read_span(str(path), 0, 3) == b"abc"
    pread, failures = os.pread, [OSError(116, "Stale file handle")]

    def flaky(handle: int, size: int, offset: int) -> bytes:
        if failures:
            raise failures.pop()
        return pread(handle, size, offset)

    monkeypatch.setattr(files_module.os, "pread", flaky)
    assert files_module.read_span(str(path), 3, 3) == b"def"


def test_a_shard_that_is_cut_while_it_is_read(processor: Processor, tmp_path: Path, no_waits: list[float]) -> None:
    paths = shards(tmp_path)
    loader = train(processor, {"web": web([str(path) for path in paths])})
    shard = loader.planner.mixture.streams["web"]._shards[0]
    assert shard is not None
    third = int(shard.spans[3, 0, 0])  # type: ignore[attr-defined]
    with paths[0].open("r+b") as file:
        file.truncate(third)
    keys, counted = used(list(loader)), left_out(loader)
    assert keys == {f"web/0.tar/{i}" for i in range(3)} | {f"web/1.tar/{i}" for i in range(6)}
    assert counted == {"skipped/web/annotation_truncated": 3}
    assert no_waits == []


def test_a_missing_shard_that_comes_back_is_read_in_the_next_epoch(
    processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "RETRY_AFTER", 0.0)
    paths = [text_lines(tmp_path / f"{i}.jsonl", 4) for i in range(2)]
    hidden = tmp_path / "elsewhere"
    opened = files_module.local_file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sphinx_pl.data.readers.text.local_file",
            lambda url: opened(str(hidden) if url.endswith("1.jsonl") else url),
        )
        loader = train(processor, {"text": {"kind": "text", "path": [str(path) for path in paths]}}, epochs=2)
    keys = Counter(key for batch in loader for key in batch.keys)
    assert keys == {f"text/0.jsonl:{i}": 2 for i in range(4)} | {f"text/1.jsonl:{i}": 1 for i in range(4)}
    assert left_out(loader) == {"skipped/text/shard_missing": 1}


# --- commands and URLs


def flaky_command(folder: Path, failures: int, path: Path) -> str:
    """Fails so often, then writes the file; every call leaves a mark."""
    script = folder / "flaky.sh"
    calls = folder / "calls"
    script.write_text(
        f"echo call >> {calls}\n"
        f'if [ "$(wc -l < {calls})" -le {failures} ]; then head -c 100 {path}; exit 3; fi\n'
        f"cat {path}\n"
    )
    return f"pipe:sh {script}"


@pytest.mark.parametrize("failures", [2, 99])
def test_a_command_that_fails(
    processor: Processor, tmp_path: Path, own_cache: Path, no_waits: list[float], failures: int
) -> None:
    url = flaky_command(tmp_path, failures, text_lines(tmp_path / "a.jsonl", 8))
    good = text_lines(tmp_path / "good.jsonl", 3)
    sources = {"text": {"kind": "text", "path": [url, str(good)]}}
    keys, counted, _ = read(processor, sources)
    calls = len((tmp_path / "calls").read_text().split())
    if failures == 2:
        assert (len(keys), counted, calls) == (11, {}, 3)
        assert no_waits == [0.5, 1.0]
    else:  # half of a command's output is not used
        assert (len(keys), counted, calls) == (3, {"skipped/text/shard_missing": 1}, 4)
        read(processor, sources)  # less than a minute later it is not even tried
        assert len((tmp_path / "calls").read_text().split()) == 4
    assert not [path for path in own_cache.iterdir() if path.name.startswith(".")]


def test_images_of_a_dead_command_cost_one_wait(
    processor: Processor, tmp_path: Path, own_cache: Path, no_waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    [path] = shards(tmp_path, 1, pairs=40)
    loader = train(processor, {"web": web(f"pipe:cat {path}")}, row_length=1024)
    plans = loader.planner.plan()
    path.unlink()
    for copy in own_cache.iterdir():
        copy.unlink()
    monkeypatch.setattr(files_module, "_HANDLES", files_module._Handles())  # a worker has none of its own
    batches = [loader.collator(plan.rows) for plan in plans]
    assert sum(batch.counters.get("skipped/web/image_missing", 0) for batch in batches) == 40
    assert no_waits == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("failures", [0, 2, 99])
def test_a_file_behind_fsspec(
    processor: Processor, own_cache: Path, no_waits: list[float], monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    memory = fsspec.filesystem("memory")
    for i in range(2):
        memory.pipe(f"/bucket/{i}.jsonl.gz", gzip.compress(b'{"text": "from afar"}\n' * 4))
    opened, left = memory._open, [failures]

    def flaky(path: str, *args: Any, **options: Any) -> Any:
        if "0.jsonl" in path and left[0]:
            left[0] -= 1
            raise RuntimeError("the service is down")  # not an OSError, as those of some services
        return opened(path, *args, **options)

    monkeypatch.setattr(type(memory), "_open", lambda self, *args, **options: flaky(*args, **options))
    keys, counted, _ = read(processor, {"text": {"kind": "text", "path": "memory://bucket/{0..1}.jsonl.gz"}})
    if failures < 4:
        assert keys == {f"text/{name}.jsonl.gz:{i}" for name in (0, 1) for i in range(4)}
        assert counted == {}
    else:
        assert keys == {f"text/1.jsonl.gz:{i}" for i in range(4)}
        assert counted == {"skipped/text/shard_missing": 1}
    assert len(no_waits) == min(failures, 3)


def test_a_scheme_that_nothing_reads_is_said(processor: Processor, own_cache: Path) -> None:
    with pytest.raises(UserError, match="nosuch"):
        train(processor, {"text": {"kind": "text", "path": "nosuch://bucket/a.jsonl"}})


# --- damaged archives and tables


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["text", "instructions"])
def test_an_archive_that_is_cut_gives_what_comes_before(
    processor: Processor, tmp_path: Path, own_cache: Path, suffix: str, kind: str
) -> None:
    rng = random.Random(0)
    asked = "text" if kind == "text" else "question"
    values = [{asked: f"{i} {rng.random()} {rng.random()}", "answer": "yes"} for i in range(20_000)]
    data = "".join(json.dumps(value) + "\n" for value in values).encode()
    pack = gzip.compress(data) if suffix == ".gz" else pyarrow.compress(data, "zstd", asbytes=True)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack[: len(pack) // 2])
    for _ in range(2):  # unpacked, then from the cache
        loader = train(processor, {"s": {"kind": kind, "path": str(path), "modality": "text"}}, row_length=1024)
        stream = loader.planner.mixture.streams["s"]
        assert stream.left_out == {"shard_truncated": 1}
        assert 1000 < stream.indexed < 19_000
    keys = [key for batch in itertools.islice(loader, 3) for key in batch.keys]
    assert len(set(keys)) == len(keys) > 50


def test_an_archive_that_cannot_be_read_just_now_is_not_taken_for_a_cut_one(
    processor: Processor, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 9))
    opened, failures = gzip.GzipFile.read1, [1]

    def flaky(self: gzip.GzipFile, size: int = -1) -> bytes:
        if failures:
            failures.pop()
            raise OSError(5, "Input/output error")
        return opened(self, size)

    monkeypatch.setattr(gzip.GzipFile, "read1", flaky)
    keys, counted, _ = read(processor, {"text": {"kind": "text", "path": str(path)}})
    assert (len(keys), counted) == (9, {})


def test_tables_that_are_damaged_or_lack_the_column(processor: Processor, tmp_path: Path, own_cache: Path) -> None:
    def table(name: str, columns: dict[str, list[Any]]) -> Path:
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / name)
        return tmp_path / name

    paths = [
        table("good.parquet", {"text": ["one", None, "", "two"]}),
        table("other.parquet", {"content": ["one"]}),
        table("numbers.parquet", {"text": [[1.5], [2.5]]}),
        table("cut.parquet", {"text": ["three"] * 99}),
        table("rotten.parquet", {"text": [f"row {i}" for i in range(999)]}),
    ]
    paths[3].write_bytes(paths[3].read_bytes()[:-50])
    rotten = bytearray(paths[4].read_bytes())
    rotten[40:400] = bytes(360)
    paths[4].write_bytes(rotten)
    sources = {"table": {"kind": "text", "path": [str(path) for path in paths]}}
    for _ in range(2):
        keys, counted, _ = read(processor, sources)
        assert keys == {"table/good.parquet:0", "table/good.parquet:3"}
        assert counted == {
            "skipped/table/text_empty": 2,
            "skipped/table/column_absent": 1,
            "skipped/table/shard_unreadable": 3,
        }


# --- the cache


def test_a_cache_that_cannot_be_written_is_said_at_once(
    processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_waits: list[float]
) -> None:
    (tmp_path / "file").write_text("")
    good = text_lines(tmp_path / "t.jsonl", 3)
    monkeypatch.setenv("SPHINX_CACHE", str(tmp_path / "file" / "cache"))
    for url in (str(good), f"pipe:cat {good}"):
        with pytest.raises(UserError, match="SPHINX_CACHE") as caught:
            train(processor, {"text": {"kind": "text", "path": url}})
        assert "\n" not in str(caught.value)
    assert no_waits == []


@pytest.mark.parametrize("url", ["{path}", "pipe:cat {path}", "{path}.gz"])
def test_a_full_disk_is_not_taken_for_bad_data(
    processor: Processor, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    good = text_lines(tmp_path / "t.jsonl", 3)
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(good.read_bytes()))

    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None: ...

    make = files_module.CacheFile.__init__

    def full(self: files_module.CacheFile, path: Path) -> None:
        make(self, path)
        self._file.close()
        self._file = Full()  # type: ignore[assignment]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files_module.CacheFile, "__init__", full)
        with pytest.raises(UserError, match=r"No space left on device.*SPHINX_CACHE"):
            train(processor, {"text": {"kind": "text", "path": url.format(path=good)}})
    assert [path for path in tmp_path.joinpath("cache").rglob("*") if path.is_file()] == []
    assert len(read(processor, {"text": {"kind": "text", "path": url.format(path=good)}})[0]) == 3


def test_an_index_that_a_full_disk_left_empty_is_made_again(
    processor: Processor, tmp_path: Path, own_cache: Path
) -> None:
    sources = {"text": {"kind": "text", "path": str(text_lines(tmp_path / "t.jsonl", 3))}}
    read(processor, sources)
    for content in (b"", b"\x93NUMPY", b"PK\x03\x04"):
        for index in own_cache.with_name("spans").iterdir():
            index.write_bytes(content)
        assert len(read(processor, sources)[0]) == 3


def test_many_ranks_make_the_same_index_at_the_same_time(processor: Processor, tmp_path: Path, own_cache: Path) -> None:
    paths = [str(text_lines(tmp_path / f"{i}.jsonl", 300)) for i in range(6)]
    paths += [f"{path}.gz" for path in paths]
    for path in paths[:6]:
        Path(f"{path}.gz").write_bytes(gzip.compress(Path(path).read_bytes()))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["row"] * 3000}), tmp_path / "a.parquet")
    paths.append(str(tmp_path / "a.parquet"))
    faults: list[BaseException] = []
    counts: list[int] = []
    start = threading.Barrier(6)

    def rank() -> None:
        try:
            start.wait()
            loader = train(processor, {"text": {"kind": "text", "path": paths, "shuffle_shards": 99}})
            counts.append(loader.planner.mixture.streams["text"].indexed)
            assert loader.planner.plan()
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=rank) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert counts == [12 * 300 + 3000] * 6


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_that_is_too_small_loses_nothing(
    processor: Processor, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Every copy that is not held is deleted when the next one comes: in the planner, and in the workers."""
    monkeypatch.setenv("SPHINX_CACHE_GB", "1e-6")
    folders = [tmp_path / str(i) for i in range(6)]
    for i, folder in enumerate(folders):
        folder.mkdir()
        write_tar(folder / "s.tar", [m for k in range(8) for m in pair(f"{i}-{k}")])
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"row {i}" for i in range(20)]}), tmp_path / "a.parquet")
    sources = {
        "web": web([f"pipe:cat {folder}/s.tar" for folder in folders], shuffle_shards=2),
        "table": {"kind": "text", "path": [f"pipe:cat {tmp_path}/a.parquet", str(tmp_path / "a.parquet")]},
    }
    loader = train(processor, sources, workers=workers, epochs=2)
    keys = Counter(key for batch in loader for key in batch.keys)
    assert left_out(loader) == {}
    assert set(keys.values()) == {2}
    assert len(keys) == 6 * 8 + 40
    assert len(list(own_cache.iterdir())) < 8 + 2


def test_what_is_held_is_not_deleted(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPHINX_CACHE_GB", "0")
    for name in "abc":
        (tmp_path / name).write_text(name)
    first, _ = files_module.local_file(f"pipe:cat {tmp_path}/a")
    hold = files_module.Hold(first)
    second, _ = files_module.local_file(f"pipe:cat {tmp_path}/b")
    assert Path(first).exists()
    third, _ = files_module.local_file(f"pipe:cat {tmp_path}/c")
    assert (Path(first).exists(), Path(second).exists(), Path(third).exists()) == (True, False, True)
    del hold
    files_module.local_file(f"pipe:cat {tmp_path}/b")
    assert not Path(first).exists()
    with pytest.raises(FileNotFoundError):
        files_module.Hold(first)


# --- the loader itself


@pytest.fixture
def endless(tmp_path: Path) -> dict[str, Any]:
    return {
        "web": web(str(write_tar(tmp_path / "s.tar", [m for k in range(30) for m in pair(f"{k}")]))),
        "text": {"kind": "text", "path": str(text_lines(tmp_path / "t.jsonl", 30))},
    }


def planning() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "plan-steps"]


def workers() -> Iterator[int]:
    """Child processes of this one."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with_name = stat.read_text() if stat.exists() else ""
        fields = with_name.rpartition(")")[2].split()
        if fields and int(fields[1]) == os.getpid() and fields[0] != "Z":
            yield int(stat.parent.name)


def test_nothing_is_left_over_after_an_early_stop(processor: Processor, endless: dict[str, Any]) -> None:
    before = set(workers())
    loader = train(processor, endless, workers=2, epochs=None)
    batches = iter(loader)
    list(itertools.islice(batches, 3))
    assert planning()
    assert len(set(workers()) - before) == 2
    del batches
    assert (planning(), set(workers()) - before) == ([], set())


def test_an_exception_of_the_planner_reaches_the_user_and_leaves_nothing_over(
    processor: Processor, endless: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(workers())
    loader = train(processor, endless, workers=2, epochs=None)
    plan, calls = loader.planner.plan, [0]

    def failing() -> Any:
        calls[0] += 1
        if calls[0] == 30:
            raise UserError("the storage is gone")
        return plan()

    monkeypatch.setattr(loader.planner, "plan", failing)
    batches: list[Batch] = []
    with pytest.raises(UserError, match="the storage is gone"):
        batches.extend(loader)
    # Those that were planned before are out, but for the few that were under way.
    assert len(batches) > 10
    assert (planning(), set(workers()) - before) == ([], set())


def test_an_exception_in_a_worker_reaches_the_user_and_leaves_nothing_over(
    processor: Processor, endless: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(workers())
    loader = train(processor, endless, workers=2, epochs=None)
    monkeypatch.setattr(loader.collator, "weighting", "no such")
    with pytest.raises(KeyError) as caught:
        list(itertools.islice(loader, 3))
    assert "no such" in str(caught.value)
    assert (planning(), set(workers()) - before) == ([], set())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_iterator_goes_on_after_what_was_handed_out(
    processor: Processor, endless: dict[str, Any], workers: int
) -> None:
    def keys(batches: Any, count: int) -> list[list[str]]:
        return [batch.keys for batch in itertools.islice(batches, count)]

    expected = keys(train(processor, endless, epochs=None), 9)
    loader = train(processor, endless, workers=workers, epochs=None)
    first = iter(loader)
    result = keys(first, 4)
    time.sleep(0.2)  # the planner is ahead by now
    result += keys(loader, 5)
    assert result == expected
    assert keys(first, 1) == []  # the first one has ended


# --- memory

PEAK = 1.5e9
"""Bytes beyond what the imports take, for one worker: an image of 64 million pixels with transparency is most of it."""

HUGE = """
import re, sys
from pathlib import Path
from tests.conftest import tiny_model
from tests.data.test_bad_data import huge_sources, train
from sphinx_pl.data.processor import Processor, ProcessorConfig
from sphinx_pl.data.tokenizers import load_tokenizer

def peak():
    return int(re.search(r"VmHWM:\\s+([0-9]+)", Path("/proc/self/status").read_text())[1]) * 1024

folder, tokenizer = map(Path, sys.argv[1:])
processor = Processor(ProcessorConfig("", 2, 2048), load_tokenizer(tokenizer), tiny_model().tokens_per_image, 32)
before = peak()
for name, source in huge_sources(folder).items():
    loader = train(processor, {name: source}, row_length=2048)
    tokens = sum(int(batch.counters["tokens"]) for batch in loader)
    print(name, tokens, peak() - before, dict(loader.counters))
print(int(peak() - before))
"""


def huge_files(folder: Path) -> None:
    """Small files that ask for much memory."""
    images = {
        "square": encoded(Image.new("P", (8000, 8000)), "PNG", compress_level=1, transparency=0),
        "thin": encoded(Image.new("RGB", (15_900, 160)), "PNG"),
    }
    write_tar(folder / "s.tar", [m for name, data in images.items() for m in pair(name, data)])
    near = 8_000_000
    (folder / "text.jsonl").write_text(json.dumps({"text": "a word " * (near // 7)}) + "\n")
    (folder / "lists.jsonl").write_text('{"text": [' + "[]," * (near // 3) + "[]]}\n" + '{"text": "a"}\n')
    (folder / "brackets.json").write_text("[" * (1 << 25))
    (folder / "asked.json").write_text(json.dumps([{"question": "a word " * (near // 7), "answer": "b"}] * 2))
    (folder / "names.tar").write_bytes(
        write_tar(
            folder / "n.tar", [m for i in range(400) for m in pair(f"{i:04d}")] + pair("k" * 1_000_000)
        ).read_bytes()
    )


def huge_sources(folder: Path) -> dict[str, Any]:
    chat = {"kind": "instructions", "root": str(folder), "modality": "text"}
    good = folder / "good.jsonl"
    good.write_text('{"question": "a", "answer": "b"}\n')
    return {
        "names": web(str(folder / "names.tar")),
        "text": {"kind": "text", "path": str(folder / "text.jsonl")},
        "lists": {"kind": "text", "path": str(folder / "lists.jsonl")},
        "brackets": chat | {"path": [str(folder / "brackets.json"), str(good)]},
        "asked": chat | {"path": str(folder / "asked.json")},
        "images": web(str(folder / "s.tar")),
    }


def test_small_files_do_not_take_all_memory(processor: Processor, tmp_path: Path) -> None:
    huge_files(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", HUGE, str(tmp_path), str(processor.tokenizer.path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    print(result.stdout)
    assert int(result.stdout.splitlines()[-1]) < PEAK, result.stdout
