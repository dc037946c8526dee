"""The loader from damaged files to batches: what is bad is skipped and counted, and the run goes on."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.sampling.resume_state import merge_states
from sphinx_pl.data.schema import IGNORE, Batch
from sphinx_pl.data.skip import counter_of, split_counter
from sphinx_pl.data.train_loader import TrainLoader
from sphinx_pl.utils.errors import UserError

Member = tuple[str, bytes]


def pairs(sample_data: Path, count: int) -> list[tuple[bytes, str]]:
    """Real images with captions."""
    with tarfile.open(sorted(sample_data.glob("real/train-*.tar"))[0]) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    images = [data for name, data in sorted(files.items()) if name.endswith(".jpg")]
    assert images
    return [(images[i % len(images)], f"caption number {i}") for i in range(count)]


def write_tar(path: Path, members: list[Member]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def shard(path: Path, content: list[tuple[bytes, str]], bad_images: int = 0, bad_captions: int = 0) -> str:
    """A tar of pairs of which the first `bad_images` have no image in them, the last `bad_captions` no UTF-8."""
    members: list[Member] = []
    for i, (image, caption) in enumerate(content):
        text = caption.encode() if i < len(content) - bad_captions else b"caf\xe9 " + caption.encode()
        members += [(f"{i:04d}.jpg", b"<html>404</html>" if i < bad_images else image), (f"{i:04d}.txt", text)]
    return write_tar(path, members)


def text_file(path: Path) -> str:
    path.write_text("".join(json.dumps({"text": f"text number {i}"}) + "\n" for i in range(20)))
    return str(path)


def web(path: str, **values: Any) -> dict[str, Any]:
    return {"kind": "image_text", "path": path, **values}


def datamodule(processor: Processor, sources: dict[str, Any], rows: int = 4, **options: Any) -> DataModule:
    return DataModule(
        processor, sources, options.pop("val", {}), {"row_length": 96, "micro_batch_rows": rows}, **options
    )


def loader(data: DataModule, workers: int = 0, accumulate: int = 1, world_size: int = 1) -> TrainLoader:
    """As `train_dataloader` builds it for a trainer."""
    return TrainLoader(data.planner(accumulate, 0, world_size), data.collator, workers, data.max_skipped, False)


def tensors(batch: Batch) -> dict[str, Tensor]:
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def assert_same(a: Batch, b: Batch) -> None:
    assert all(torch.equal(value, tensors(b)[name]) for name, value in tensors(a).items())
    rest = ("tasks", "keys", "counters", "step_weight", "ends_step", "step")
    assert [getattr(a, name) for name in rest] == [getattr(b, name) for name in rest]


# --- damaged files


@pytest.fixture
def damaged(sample_data: Path, tmp_path: Path) -> dict[str, Any]:
    """A shard cut in half, one with 2 of 20 images broken, one with 3 of 20 captions in Latin-1, and text."""
    content = pairs(sample_data, 20)
    whole = Path(shard(tmp_path / "whole.tar", content)).read_bytes()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[: len(whole) // 2])
    return {
        "cut": web(str(cut)),
        "images": web(shard(tmp_path / "images.tar", content, bad_images=2)),
        "captions": web(shard(tmp_path / "captions.tar", content, bad_captions=3)),
        "text": {"kind": "text", "path": text_file(tmp_path / "text.jsonl")},
    }


def test_damaged_files_are_skipped_and_counted_and_the_run_goes_on(
    processor: Processor, damaged: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    train = loader(datamodule(processor, damaged, max_skipped=0.2))
    streams = train.planner.mixture.streams

    # Of the shard's first half every whole sample is used. It says so in the log and in the source's counter.
    assert 5 <= len(streams["cut"].source) < 20
    assert streams["cut"].source.skipped == {"shard_truncated": 1}
    assert any("cut.tar is cut off" in message for message in caplog.messages)

    batches = list(itertools.islice(train, 60))
    assert streams["captions"].epoch >= 3  # so every bad record came several times
    used = [key for batch in batches for key in batch.keys]
    assert {f"captions/captions.tar/{i:04d}" for i in range(17)} <= set(used)
    assert not any(f"captions/captions.tar/{i:04d}" in used for i in (17, 18, 19))

    skipped = train.skipped
    reasons = {"skipped/captions/caption_not_utf8", "skipped/images/image_unreadable", "skipped/cut/shard_truncated"}
    assert set(skipped) == reasons
    assert skipped["skipped/cut/shard_truncated"] == 1
    epochs = streams["captions"].epoch
    assert 3 * epochs <= skipped["skipped/captions/caption_not_utf8"] <= 3 * (epochs + 1)
    broken = [key for key in used if key in ("images/images.tar/0000", "images/images.tar/0001")]
    assert skipped["skipped/images/image_unreadable"] == len(broken) > 0


def test_a_broken_image_leaves_no_target_and_is_not_in_the_denominator(
    processor: Processor, damaged: dict[str, Any]
) -> None:
    bad = {"images/images.tar/0000", "images/images.tar/0001"}
    count = 0
    for batch in itertools.islice(loader(datamodule(processor, damaged, max_skipped=0.2)), 60):
        count += len(bad & set(batch.keys))
        targets = int((batch.labels != IGNORE).sum())
        assert batch.step_weight == float(batch.weights.sum()) == targets == batch.counters["targets"]
        assert len(batch.pixels) * processor.tokens_per_image == len(batch.image_slots)
        # The rows are in the keys' order: a sample has targets if and only if its image could be read.
        segments = sorted({(int(b), int(s)) for b, row in enumerate(batch.segment_ids) for s in row.unique() if s > 0})
        for key, (b, segment) in zip(batch.keys, segments, strict=True):
            of_sample = batch.labels[b][batch.segment_ids[b] == segment]
            assert bool((of_sample != IGNORE).any()) == (key not in bad), key
    assert count > 0


def test_what_cannot_even_be_indexed_stops_the_run_at_its_start(
    processor: Processor, sample_data: Path, tmp_path: Path
) -> None:
    members = [(f"{i:04d}.txt", b"a caption without its image") for i in range(10)]
    members += [
        (f"good{i}.{kind}", data)
        for i, pair in enumerate(pairs(sample_data, 20))
        for kind, data in (("jpg", pair[0]), ("txt", pair[1].encode()))
    ]
    data = datamodule(processor, {"web": web(write_tar(tmp_path / "a.tar", members))}, max_skipped=0.3)
    with pytest.raises(UserError, match=r"33\.3% of 30 .*skipped/web/image_absent: 10"):
        next(iter(loader(data)))


def test_what_held_out_sources_leave_out_is_said(
    processor: Processor, sample_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    val = {"web": web(shard(tmp_path / "a.tar", pairs(sample_data, 8), bad_captions=3))}
    assert list(datamodule(processor, {}, val=val).val_loaders()["web"])
    assert any("data.val_sources.web: 3 samples left out (caption_not_utf8: 3)" in line for line in caplog.messages)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kind": "image_txt", "path": "a.tar"}, "did you mean 'image_text'"),
        ({"kind": "image_text", "path": "a.tar", "max_caption": 3}, "data.sources.web .*filters"),
    ],
)
def test_a_wrong_source_is_found_before_anything_is_read(
    processor: Processor, source: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        datamodule(processor, {"web": source}).check()


def test_images_need_a_vision_part(processor: Processor, sample_data: Path, tmp_path: Path) -> None:
    blind = dataclasses.replace(processor, image_size=0, tokens_per_image=0)
    with pytest.raises(UserError, match="'web' has images but the model has no vision part"):
        datamodule(blind, {"web": web(shard(tmp_path / "a.tar", pairs(sample_data, 2)))}).check()


def test_too_much_that_is_bad_stops_the_run_and_names_the_worst(
    processor: Processor, sample_data: Path, tmp_path: Path
) -> None:
    content = pairs(sample_data, 20)
    sources = {
        "good": web(shard(tmp_path / "good.tar", content, bad_captions=1)),
        "awful": web(shard(tmp_path / "awful.tar", content, bad_images=10)),
    }
    train = loader(datamodule(processor, sources, max_skipped=0.1))
    with pytest.raises(UserError) as caught:
        for _ in itertools.islice(train, 400):
            pass
    message = str(caught.value)
    assert "\n" not in message
    assert "data.max_skipped=10.0%" in message
    assert 0 < message.index("skipped/awful/image_unreadable") < message.index("skipped/good/caption_not_utf8")
    total = train.planner.mixture.counts["good/seen"] + train.planner.mixture.counts["awful/seen"]
    assert 200 <= total < 300  # not before the share means something, not long after
    # The same files pass where the limit allows for them.
    assert len(list(itertools.islice(loader(datamodule(processor, sources, max_skipped=0.4)), 80))) == 80


@pytest.mark.parametrize("good", [0, 1])
def test_a_small_source_that_is_nearly_all_bad_stops_the_run_early(
    processor: Processor, sample_data: Path, tmp_path: Path, good: int
) -> None:
    content = pairs(sample_data, 20)
    alone = {"awful": web(shard(tmp_path / "awful.tar", content, bad_images=20 - good))}
    train = loader(datamodule(processor, alone, max_skipped=0.1))
    with pytest.raises(UserError, match=r"skipped/awful/image_unreadable.*repair these sources"):
        for _ in itertools.islice(train, 400):
            pass
    assert train.planner.mixture.counts["awful/seen"] < 60
    # Beside others its share is below the limit of the mixture.
    beside = {"good": web(shard(tmp_path / "good.tar", content), weight=30), **alone}
    train = loader(datamodule(processor, beside, max_skipped=0.1))
    with pytest.raises(UserError, match=r"9\d\.\d% of \d\d samples|100\.0% of \d\d samples"):
        for _ in itertools.islice(train, 4000):
            pass


def test_a_bad_record_of_a_few_stops_nothing(processor: Processor, sample_data: Path, tmp_path: Path) -> None:
    source = {"few": web(shard(tmp_path / "few.tar", pairs(sample_data, 10), bad_images=2))}
    train = loader(datamodule(processor, source, max_skipped=0.1, mixing={"epochs": 4}))
    assert list(train)
    assert train.counters["few/seen"] == 40


def test_what_is_skipped_has_one_spelling_whenever_it_is_found(
    processor: Processor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """When a file is opened, when a record is drawn and when its image is decoded."""
    for source, what in (("boxes", "seen"), ("boxes", "skipped/box_outside"), ("boxes", "filtered/caption_words")):
        assert split_counter(counter_of(source, what)) == (source, what)
    assert counter_of("boxes", "skipped/box_outside") == "skipped/boxes/box_outside"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"<html>")
    data = datamodule(
        processor, {"x": instructions(tmp_path, ["a.png", "b.png"])}, max_skipped=1.0, mixing={"epochs": 1}
    )
    path = Path(str(data.sources["x"]["path"]))
    path.write_text(json.dumps([*json.loads(path.read_text()), 7, {"question": "why?", "answer": ""}]))
    train = loader(data)
    list(train)
    own = {"skipped/x/entry_malformed": 1, "skipped/x/answer_empty": 1, "skipped/x/image_unreadable": 1}
    assert train.skipped == own
    told = re.findall(r"data: (\S+), such as", caplog.text)
    assert sorted(told) == sorted(own)
    assert re.search(r"data: x, of \d+ records: skipped/answer_empty: 1", train.summary(train.counters)[0])
    train.before.update(own)  # the reasons of both places are added
    assert train.skipped == dict.fromkeys(own, 2)


def test_a_source_without_one_usable_record_does_not_hang(processor: Processor, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n' * 3)
    train = loader(datamodule(processor, {"text": {"kind": "text", "path": str(path)}}))
    with pytest.raises(UserError, match=r"1000 draws in a row .*'skipped/text/text_empty'"):
        next(iter(train))


# --- steps


def few_images(processor: Processor, sample_data: Path, tmp_path: Path) -> DataModule:
    """One readable image in six, so that some steps of one row have none."""
    return datamodule(
        processor,
        {
            "web": web(shard(tmp_path / "web.tar", pairs(sample_data, 6), bad_images=5)),
            "text": {"kind": "text", "path": text_file(tmp_path / "text.jsonl")},
        },
        rows=1,
        max_skipped=1.0,
    )


def test_a_step_that_lost_all_its_images_is_left_out(processor: Processor, sample_data: Path, tmp_path: Path) -> None:
    train = loader(few_images(processor, sample_data, tmp_path))
    batches = list(itertools.islice(train, 12))
    assert all(batch.counters["modality/image"] > 0 and batch.counters["modality/text"] > 0 for batch in batches)
    left_out = batches[-1].step - len(batches)  # steps are numbered from 1
    assert train.counts["skipped/steps/without_image"] == left_out > 0


def test_with_several_ranks_it_is_trained_on_as_it_is(processor: Processor, sample_data: Path, tmp_path: Path) -> None:
    train = loader(few_images(processor, sample_data, tmp_path), world_size=2)
    batches = list(itertools.islice(train, 12))
    assert [batch.step for batch in batches] == list(range(1, 13))
    without = sum(batch.counters.get("modality/image", 0) == 0 for batch in batches)
    assert train.counts["skipped/steps/without_image"] == without > 0


def test_a_step_is_as_many_batches_as_are_accumulated(processor: Processor, damaged: dict[str, Any]) -> None:
    batches = list(itertools.islice(loader(datamodule(processor, damaged, rows=2), accumulate=3), 12))
    assert [batch.step for batch in batches] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert [batch.ends_step for batch in batches] == [False, False, True] * 4
    for i in range(0, 12, 3):
        total = sum(float(batch.weights.sum()) for batch in batches[i : i + 3])
        assert [batch.step_weight for batch in batches[i : i + 3]] == [total] * 3


def test_any_number_of_workers_gives_the_same_batches(processor: Processor, damaged: dict[str, Any]) -> None:
    def batches(workers: int) -> tuple[list[Batch], TrainLoader]:
        train = loader(datamodule(processor, damaged, rows=2, max_skipped=0.2), workers, accumulate=2)
        stream: Iterator[Batch] = iter(train)
        return list(itertools.islice(stream, 20)), train

    expected, one_process = batches(0)
    assert sum(len(batch.pixels) for batch in expected) > 20
    assert {batch.step for batch in expected} == set(range(1, 11))
    for workers in (1, 2):
        result, train = batches(workers)
        for a, b in zip(expected, result, strict=True):
            assert_same(a, b)
        # Planning runs ahead of the workers, decoding does not run ahead of the count.
        assert train.counts == one_process.counts


# --- held-out batches


def held_out(sample_data: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "web": web(shard(tmp_path / "val.tar", pairs(sample_data, 20))),
        "text": {"kind": "text", "path": text_file(tmp_path / "val.jsonl")},  # 20 lines
        "none": None,
    }


def test_held_out_batches_are_the_same_at_every_call(processor: Processor, sample_data: Path, tmp_path: Path) -> None:
    data = datamodule(processor, {}, rows=2, val=held_out(sample_data, tmp_path), val_samples=10)
    assert data.val_names == ["web", "text"]
    first, second = ({name: list(batches) for name, batches in data.val_loaders().items()} for _ in range(2))
    # Every second of twenty: the samples are spread over the file.
    keys = {name: sorted(key for batch in batches for key in batch.keys) for name, batches in first.items()}
    assert keys["web"] == [f"web/val.tar/{i:04d}" for i in range(0, 20, 2)]
    assert keys["text"] == sorted(f"text/val.jsonl:{i}" for i in range(0, 20, 2))
    for name, batches in first.items():
        for a, b in zip(batches, second[name], strict=True):
            assert_same(a, b)
    # Lightning's view of it, without a trainer.
    for a, b in zip(itertools.chain(*first.values()), itertools.chain(*data.val_dataloader()), strict=True):
        assert_same(a, b)


def test_ranks_share_the_held_out_samples_in_equally_many_batches(
    processor: Processor, sample_data: Path, tmp_path: Path
) -> None:
    data = datamodule(processor, {}, rows=2, val=held_out(sample_data, tmp_path), val_samples=20)
    for name, whole in data.val_loaders().items():
        ranks = [list(data.val_loaders(rank, 3)[name]) for rank in range(3)]
        assert len({len(batches) for batches in ranks}) == 1
        keys = [key for batches in ranks for batch in batches for key in batch.keys]
        assert len(keys) == 20
        assert sorted(keys) == sorted(key for batch in whole for key in batch.keys)


def test_held_out_samples_pass_over_bad_records(processor: Processor, sample_data: Path, tmp_path: Path) -> None:
    path = shard(tmp_path / "val.tar", pairs(sample_data, 10), bad_captions=4)
    data = datamodule(processor, {}, val={"web": web(path)}, val_samples=100)
    [batches] = [list(batches) for batches in data.val_loaders().values()]
    assert sorted(key for batch in batches for key in batch.keys) == [f"web/val.tar/{i:04d}" for i in range(6)]


def test_held_out_sources_without_a_usable_sample_are_named(
    processor: Processor, sample_data: Path, tmp_path: Path
) -> None:
    path = shard(tmp_path / "val.tar", pairs(sample_data, 3), bad_captions=3)
    with pytest.raises(UserError, match=r"data\.val_sources\.web: no usable sample in .*val\.tar"):
        datamodule(processor, {}, val={"web": web(path)}).val_loaders()
    with pytest.raises(UserError, match=r"'web': there is no file '.*nowhere\.tar'"):
        datamodule(processor, {}, val={"web": web(str(tmp_path / "nowhere.tar"))}).val_loaders()


# --- what can be known before anything is read


def test_text_is_there_if_a_text_source_has_weight(processor: Processor, damaged: dict[str, Any]) -> None:
    text, image = damaged["text"], damaged["images"]
    datamodule(processor, {"a": image, "b": text}).check(text_required=True)
    datamodule(processor, {"a": {**image, "modality": "text"}}).check(text_required=True)
    without = datamodule(processor, {"a": image, "b": {**text, "weight": 0}, "c": None})
    without.check()
    with pytest.raises(UserError, match=r"no text-only source"):
        without.check(text_required=True)


def test_missing_files_and_wrong_keys_of_any_source_are_named(processor: Processor, damaged: dict[str, Any]) -> None:
    good = {"web": damaged["images"]}
    with pytest.raises(UserError, match=r"'more': there is no file 'nowhere\.tar'"):
        datamodule(processor, {**good, "more": web("nowhere.tar")}).check()
    with pytest.raises(UserError, match=r"'late': there is no file 'nowhere\.tar'"):
        datamodule(processor, good, val={"late": web("nowhere.tar")}).check()
    with pytest.raises(UserError, match=r"data\.val_sources\.late\.kind is missing"):
        datamodule(processor, good, val={"late": {"path": "nowhere.tar", "kind": ""}}).check()
    with pytest.raises(UserError, match=r"'late': there is no file 'nowhere\.tar'"):
        datamodule(processor, good, val={"late": {"path": "nowhere.tar"}}).check()
    with pytest.raises(UserError, match=r"data\.packing\.row_lenght"):
        DataModule(processor, good, {}, {"row_lenght": 96, "rows": 1})


# --- counters of several ranks


def rank_loader(data: DataModule, rank: int, world_size: int, partitions: int) -> TrainLoader:
    return TrainLoader(data.planner(1, rank, world_size, partitions), data.collator, 0, data.max_skipped, False)


@pytest.mark.parametrize(("partitions", "ranks"), [(1, 2), (2, 2), (4, 2), (2, 4)])
def test_counters_of_ranks_that_share_partitions_are_not_doubled(
    processor: Processor, damaged: dict[str, Any], partitions: int, ranks: int
) -> None:
    data = datamodule(processor, damaged, max_skipped=0.5)
    loaders = [rank_loader(data, rank, ranks, partitions) for rank in range(ranks)]
    for loader in loaders:
        list(itertools.islice(loader, 20))
    total = sum((Counter(loader.counters) for loader in loaders), Counter())
    planned: dict[int, Counter[str]] = {}
    for loader in loaders:
        for number, partition in loader.planner.partitions.items():
            planned[number] = Counter(
                {key: count for key, count in partition.mixture.counts.items() if key.endswith(("/seen", "/tokens"))}
            )
            for sample in partition.pending:  # drawn, and trained on in a later step
                planned[number][f"{sample.source}/tokens"] -= sample.length
    assert len(planned) == partitions
    assert {k: v for k, v in total.items() if k.endswith(("/seen", "/tokens"))} == sum(planned.values(), Counter())


def test_what_all_ranks_lost_before_is_not_held_against_one_that_goes_on(
    processor: Processor, sample_data: Path, tmp_path: Path
) -> None:
    path = shard(tmp_path / "a.tar", pairs(sample_data, 400), bad_images=8)  # 2 %
    data = datamodule(processor, {"a": web(path)}, max_skipped=0.1)
    loaders = [rank_loader(data, rank, 4, 4) for rank in range(4)]
    for loader in loaders:
        for batch in itertools.islice(loader, 30):
            loader.planner.consumed(batch.step)
    state = merge_states([loader.planner.state_dict() for loader in loaders])
    first = rank_loader(data, 0, 4, 4)
    first.planner.load_state_dict(state)
    first.before.update({"skipped/a/image_unreadable": 300})  # of all ranks, as the checkpoint has it
    list(itertools.islice(first, 60))
    assert first.counters["skipped/a/image_unreadable"] >= 300


def test_files_that_are_lost_stop_the_run(processor: Processor, sample_data: Path, tmp_path: Path) -> None:
    content = pairs(sample_data, 40)
    paths = [shard(tmp_path / f"{i:02d}.tar", content) for i in range(16)]
    for path in paths[::2]:
        Path(path).write_bytes(b"<html>" * 1000)
    data = datamodule(processor, {"a": {**web(paths), "shuffle_shards": 4}}, max_skipped=0.1)
    with pytest.raises(UserError, match=r"of the first \d+ files could not be read, more than data\.max_skipped=10"):
        list(itertools.islice(loader(data), 400))


# --- the first records, before a run


def instructions(folder: Path, images: list[str | None]) -> dict[str, Any]:
    entries = [{"question": "what?", "answer": "red"} | ({"image": image} if image else {}) for image in images]
    (folder / "x.json").write_text(json.dumps(entries))
    return {"kind": "instructions", "path": str(folder / "x.json")}


def test_an_image_folder_that_does_not_exist_is_an_error_before_the_run(processor: Processor, tmp_path: Path) -> None:
    nowhere = instructions(tmp_path, ["a/0.png"] * 20) | {"root": "/no/where"}
    good = {"kind": "text", "path": str(tmp_path / "t.jsonl")}
    (tmp_path / "t.jsonl").write_text('{"text": "a text"}\n')
    message = (
        r"none of the first 16 records can be used \(image_missing: 16, such as '/no/where/a/0\.png': No such file"
    )
    with pytest.raises(UserError, match=rf"data\.sources\.x: {message}.*relative to /no/where; data\.sources\.x\.root"):
        datamodule(processor, {"x": nowhere}).probe()
    with pytest.raises(
        UserError, match=r"data\.sources\.group\.sources\.x: none of the first.*group\.sources\.x\.root"
    ):
        datamodule(processor, {"t": good, "group": {"sources": {"x": nowhere}}}).probe()
    with pytest.raises(UserError, match=rf"data\.val_sources\.x: {message}.*data\.val_sources\.x\.root"):
        datamodule(processor, {"t": good}, val={"x": nowhere}).probe()
    # Records without an image do not hide it.
    mixed = instructions(tmp_path, [None, None, None, "0.png"] * 20)
    with pytest.raises(UserError, match=r"none of the first 16 records with images can be used"):
        datamodule(processor, {"x": mixed}).probe()


def test_a_part_that_cannot_be_used_is_told_before_the_run(
    processor: Processor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"<html>")
    data = datamodule(processor, {"x": instructions(tmp_path, ["a.png"] * 12 + ["b.png"] * 3 + ["c.png"])})
    data.probe()
    assert "data.sources.x: 4 of 16 records that were tried cannot be used (image_unreadable: 3, such as" in caplog.text
    assert f"image_missing: 1, such as '{tmp_path}/c.png'" in caplog.text
    # And what a run skips is told when it is met, and again at its end.
    caplog.clear()
    data.mixing.epochs = 1
    train = loader(data)
    list(train)
    assert f"data: skipped/x/image_missing, such as '{tmp_path}/c.png': No such file" in caplog.text
    [line] = train.summary(train.counters)
    assert line.startswith("data: x, of 16 records: skipped/image_missing: 1, such as '")
    assert f"'{tmp_path}/c.png'" in line
    # What is changed is told as well; what waits, or is not asked for, is no loss.
    healthy = {"x/seen": 9, "x/samples": 9, "x/waiting": 4, "x/unused/tasks": 70, "samples": 12}
    assert train.summary(healthy) == []
    assert train.summary(healthy | {"x/cut": 2, "x/unused/hidden": 1}) == [
        "data: x, of 9 records: cut: 2; unused/hidden: 1"
    ]


def test_a_source_of_which_nothing_passes_is_an_error_or_told(
    processor: Processor, tmp_path: Path, sample_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = instructions(tmp_path, [None])
    with pytest.raises(UserError, match=r"data\.sources\.x: nothing to read in .*with where=.*unused/where: x\.json:0"):
        datamodule(processor, {"x": entries | {"where": {"topic": "a"}}}).probe()
    pairs = {"kind": "image_text", "path": str(sample_data / "real/train-*.tar"), "filters": {"min_words": 99}}
    datamodule(processor, {"x": pairs}).probe()
    assert re.search(r"data\.sources\.x: the filters leave out all of \d+ records.*caption_words: \d+", caplog.text)
