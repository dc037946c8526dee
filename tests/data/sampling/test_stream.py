"""One partition's part of a source: its order, its blocks of shards, and its place."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sphinx_pl.data.processor import Processor
from sphinx_pl.data.sampling.config import SourceConfig
from sphinx_pl.data.sampling.stream import SourceStream
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.utils.errors import UserError


def shards(folder: Path, count: int, records: int = 5) -> str:
    for shard in range(count):
        lines = [json.dumps({"text": f"text {shard} {i}"}) + "\n" for i in range(records + shard % 3)]
        (folder / f"{shard:03d}.jsonl").write_text("".join(lines))
    return str(folder / "*.jsonl")


def stream(path: str, processor: Processor, partition: int = 0, partitions: int = 1, **values: Any) -> SourceStream:
    config = SourceConfig.from_dict("s", {"kind": "text", "path": path, **values})
    return SourceStream("s", config, config.open("s"), processor, 0, 256, partition=partition, partitions=partitions)


def drawn(stream: SourceStream, count: int) -> list[str]:
    items: list[str] = []
    while len(items) < count and not stream.exhausted:
        items += [question.key for sample in stream.next() for question in sample.questions]
    return items


@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("partitions", [1, 3])
@pytest.mark.parametrize("shuffle_shards", [1, 4])
def test_the_partitions_of_an_epoch_are_the_source(
    processor: Processor, tmp_path: Path, count: int, partitions: int, shuffle_shards: int
) -> None:
    path = shards(tmp_path, count)
    values = {"shuffle_shards": shuffle_shards, "epochs": 2}
    parts = [drawn(stream(path, processor, partition, partitions, **values), 10**6) for partition in range(partitions)]
    total = sum(5 + shard % 3 for shard in range(count))
    twice = Counter(key for part in parts for key in part)
    assert len(twice) == total
    assert set(twice.values()) == {2}
    # In an order of its own each time, the same one for the same seed.
    repeat = stream(path, processor, 0, partitions, **values)
    assert drawn(repeat, 10**6) == parts[0]
    half = len(parts[0]) // 2
    assert parts[0][:half] != sorted(parts[0][:half])
    assert parts[0][:half] != parts[0][half : 2 * half]


def test_a_block_of_shards_is_open_at_a_time(
    processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shards(tmp_path, 40, records=6)
    config = SourceConfig.from_dict("s", {"kind": "text", "path": path, "shuffle_shards": 4})
    source = config.open("s")
    opened: list[int] = []
    plain = source.open
    monkeypatch.setattr(source, "open", lambda number: opened.append(number) or plain(number))  # type: ignore[func-returns-value]
    one = SourceStream("s", config, source, processor, 0, 256)
    assert len(opened) == 4
    first = drawn(one, one.indexed)
    assert {key.split(":")[0] for key in first} == {f"{number:03d}.jsonl" for number in opened[:4]}
    assert [key.split(":")[0] for key in first] != sorted(key.split(":")[0] for key in first)  # shuffled together
    drawn(one, 1)
    assert len(opened) == 8  # the next block, opened ahead


@pytest.mark.parametrize("count", [1, 5, 30])
@pytest.mark.parametrize("partitions", [1, 2])
def test_it_goes_on_from_any_place(processor: Processor, tmp_path: Path, count: int, partitions: int) -> None:
    path = shards(tmp_path, count)
    values = {"shuffle_shards": 3}
    whole = stream(path, processor, 0, partitions, **values)
    for _ in range(12):
        state = json.loads(json.dumps(whole.state_dict()))
        expected = drawn(whole, 7)
        resumed = stream(path, processor, 0, partitions, **values)
        resumed.load_state_dict(state)
        assert drawn(resumed, 7) == expected
        assert resumed.state_dict() == whole.state_dict()


def test_fewer_records_than_partitions_are_refused(processor: Processor, tmp_path: Path) -> None:
    path = shards(tmp_path, 1, records=2)
    with pytest.raises(
        UserError, match=r"source 's': nothing to read .* partition 2 of 3 .*fewer records than partitions"
    ):
        stream(path, processor, 2, 3)


def test_a_long_document_is_several_samples_and_none_of_it_is_lost(processor: Processor, tmp_path: Path) -> None:
    text = " ".join(f"word {i}" for i in range(400))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    one = stream(str(tmp_path / "a.jsonl"), processor)
    samples = one.next()
    size = processor.max_length
    assert [sample.length for sample in samples[:-1]] == [size] * (len(samples) - 1)
    assert len(samples) > 2
    ids: list[int] = []
    for sample in samples:
        [question] = sample.questions
        assert question.ids[0] == processor.tokenizer.bos_id
        assert question.supervised == [False] + [True] * (len(question.ids) - 1)
        ids += question.ids[1:]
    assert ids == [*processor.tokenizer.encode(text), processor.tokenizer.eos_id]
    assert [sample.questions[0].key for sample in samples[:3]] == ["a.jsonl:0", "a.jsonl:0#2", "a.jsonl:0#3"]


def test_augmentation_moves_what_is_drawn(processor: Processor, sample_data: Path) -> None:
    from sphinx_pl.data.augment import AugmentConfig

    values = {"kind": "instructions", "path": str(sample_data / "instructions/train-scenes.json"), "tasks": ["rec"]}
    config = SourceConfig.from_dict("s", values)
    plain, flipped = (
        SourceStream("s", config, config.open("s"), processor, 0, 256, augment)
        for augment in (None, AugmentConfig(flip=1.0))
    )
    changed = 0
    for _ in range(40):
        [before], [after] = plain.next(), flipped.next()
        assert before.questions[0].key == after.questions[0].key
        if after.images[0].flip:
            changed += before.questions[0].ids != after.questions[0].ids  # unless the box is in the very middle
        else:
            assert before.questions[0].ids == after.questions[0].ids
    assert changed > 5


def test_events_are_counted_beside_what_was_made_and_survive_a_resume(processor: Processor, tmp_path: Path) -> None:
    def say(*texts: str) -> dict[str, object]:
        speakers = itertools.cycle(("human", "gpt"))
        return {"conversations": [{"from": next(speakers), "value": text} for text in texts]}

    file = tmp_path / "a.json"
    file.write_text(json.dumps([say("Hi", "a\n### b"), say("Hi", "red " * 200, "And?", "no"), say("Hi", "red")]))

    short = dataclasses.replace(processor, config=dataclasses.replace(processor.config, max_length=64))

    def begin() -> SourceStream:
        return stream(str(file), short, kind="instructions", epochs=1)

    whole = begin()
    made = [whole.next() for _ in range(3)]
    assert whole.counts["samples"] == whole.counts["seen"] == 3
    assert (whole.counts["escaped"], whole.counts["cut"], whole.counts["cut_turns"]) == (1, 1, 1)
    assert whole.counts["cut_targets"] > 100
    assert whole.examples["escaped"] == ["a.json:0"]
    begun = begin()
    begun.next()
    later = begin()
    later.load_state_dict(begun.state_dict())
    later.next()
    later.next()
    assert later.counts == whole.counts
    [cut] = [sample for samples in made for sample in samples if "cut" in sample.events]
    whole.leave_out(cut, SkipSample("longer_than_row"))
    assert whole.counts["cut"] == 0
