"""Stopping and going on, with other numbers of workers and ranks: no record is lost and none comes twice.

The state is taken as a run does it: after a step has been trained on, while loader and workers are ahead of it.
"""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.sampling.planner import Planner
from sphinx_pl.data.sampling.resume_state import merge_states
from sphinx_pl.data.train_loader import TrainLoader
from sphinx_pl.utils.errors import UserError
from tests.fuzzing import encoded, picture, write_tar

JPEG = encoded(picture(), "JPEG")
Sources = dict[str, dict[str, Any]]


def text_shards(folder: Path, name: str, lengths: Sequence[int]) -> list[str]:
    paths = []
    for number, length in enumerate(lengths):
        path = folder / f"{name}-{number}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name} {number} {i}"}) + "\n" for i in range(length)))
        paths.append(str(path))
    return paths


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    """Pairs in 5 shards of which 2 are open at a time, text in one shard, questions by image, a source with a cap."""
    tars = [
        str(
            write_tar(
                tmp_path / f"{shard}.tar",
                [m for i in range(9) for m in [(f"{i}.jpg", JPEG), (f"{i}.txt", f"caption {shard} {i}".encode())]],
            )
        )
        for shard in range(5)
    ]
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "b.jpg").write_bytes(JPEG)
    asked = [{"image": f"{'ab'[i % 2]}.jpg", "question": f"number {i}?", "answer": "no"} for i in range(21)]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    tasks = [{"task": "chat" if i % 3 else "text", "question": f"{i}?", "answer": f"answer {i}"} for i in range(60)]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    return {
        "web": {"kind": "image_text", "path": tars, "shuffle_shards": 2, "weight": 2},
        "text": {"kind": "text", "path": text_shards(tmp_path, "text", [40])},
        "asked": {"kind": "instructions", "path": str(tmp_path / "asked.json"), "questions_per_sample": 3},
        "tasks": {"kind": "instructions", "path": str(tmp_path / "tasks.json"), "modality": "text"},
    }


RECORDS = 5 * 9 + 40 + 21 + 60


def datamodule(processor: Processor, sources: Sources, rows: int = 4, **mixing: Any) -> DataModule:
    packing = {"row_length": 96, "micro_batch_rows": rows}
    return DataModule(processor, copy.deepcopy(sources), {}, packing, max_skipped=1.0, mixing=mixing, seed=5)


def train(loader: TrainLoader, steps: int | None) -> list[str]:
    """Keys of so many steps, consumed as a run consumes them; None: to the end."""
    keys = []
    for batch in itertools.islice(loader, steps):
        keys += batch.keys
        loader.planner.consumed(batch.step)
    return keys


def loaders(
    data: DataModule, workers: int, ranks: int, partitions: int, state: dict[str, Any] | None = None
) -> list[TrainLoader]:
    """Those of all ranks, in this process."""
    made = []
    for rank in range(ranks):
        planner = data.planner(1, rank, ranks, partitions)
        if state is not None:
            planner.load_state_dict(json.loads(json.dumps(state)))  # as a checkpoint has it
        made.append(TrainLoader(planner, data.collator, workers, 1.0, False))
    return made


def merged(loaders: Sequence[TrainLoader]) -> dict[str, Any]:
    return merge_states([loader.planner.state_dict() for loader in loaders])


def drained(planners: Sequence[Planner]) -> list[str]:
    """Keys of all that planners have left, in step as ranks are: until none has a row."""
    keys = []
    while any(plans := [plan for planner in planners for plan in planner.plan()]):
        keys += [
            f"{sample.source}/{question.key}"
            for plan in plans
            for row in plan.rows
            for sample in row
            for question in sample.questions
        ]
    return keys


@pytest.mark.parametrize("partitions", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_finite_mixture_has_every_record_once_and_ends(
    processor: Processor, sources: Sources, partitions: int, workers: int
) -> None:
    [loader] = loaders(datamodule(processor, sources, epochs=1), workers, 1, partitions)
    keys = Counter(train(loader, None))
    assert len(keys) == RECORDS
    assert set(keys.values()) == {1}
    assert sum(value for key, value in loader.counters.items() if key.endswith("/seen")) == RECORDS


@pytest.mark.parametrize("partitions", [1, 2, 3])
def test_stopped_and_continued_with_other_numbers_of_workers(
    processor: Processor, sources: Sources, partitions: int
) -> None:
    data = datamodule(processor, sources, epochs=1)
    straight = train(loaders(data, 0, 1, partitions)[0], None)
    items: list[str] = []
    state = None
    for workers, steps in ((1, 3), (2, 4), (3, None)):
        part = loaders(data, workers, 1, partitions, state)
        items += train(part[0], steps)
        state = merged(part)
    assert items == straight  # not only the same, but in the same order
    assert len(items) == len(set(items)) == RECORDS


def step(parts: Sequence[TrainLoader], steps: int) -> list[str]:
    """Ranks in step: so many steps of each."""
    keys = []
    for part in parts:
        for _ in range(steps):
            plans = part.planner.plan()
            batches = [part.collator(plan.rows) for plan in plans]
            keys += [key for batch in batches for key in batch.keys]
        part.planner.plan()  # loaders run ahead
        part.planner.consumed(part.planner.number - 1)
    return keys


@pytest.mark.parametrize("partitions", [1, 2, 4])
@pytest.mark.parametrize("ranks", [(2, 1), (1, 2), (2, 1, 2), (4, 2, 1)])
def test_stopped_and_continued_on_another_number_of_ranks(
    processor: Processor, sources: Sources, partitions: int, ranks: tuple[int, ...]
) -> None:
    data = datamodule(processor, sources, epochs=1)
    items: list[str] = []
    state = None
    for world in ranks:
        parts = loaders(data, 0, world, partitions, state)
        items += step(parts, 1)
        state = merged(parts)
    parts = loaders(data, 0, ranks[0], partitions, state)
    items += drained([part.planner for part in parts])
    assert len(items) == len(set(items)) == RECORDS


@pytest.mark.parametrize("questions", [1, 3])
def test_several_blocks_epochs_and_caps_go_on_as_if_nothing_had_been(
    processor: Processor, sources: Sources, questions: int
) -> None:
    sources["web"] |= {"epochs": 3}
    sources["tasks"] |= {"caps": {"chat": 7}, "questions_per_sample": questions}
    data = datamodule(processor, sources, epochs=2)
    [loader] = loaders(data, 0, 1, 2)
    straight = train(loader, None)
    expected = Counter(straight)
    assert {key: n for key, n in expected.items() if key.startswith("web/")} == {
        f"web/{shard}.tar/{i}": 3 for shard in range(5) for i in range(9)
    }
    assert sum(n for key, n in expected.items() if key.startswith("tasks/")) == 2 * (20 + 7)
    assert loader.planner.counts()["tasks/capped/chat"] == 2 * (40 - 7)
    for every in (1, 4):
        items: list[str] = []
        state, part = None, loader
        while (part := loaders(data, 0, 1, 2, state)[0]) and (keys := train(part, every)):
            items += keys
            state = merged([part])
        assert items == straight
        assert part.planner.counts() == loader.planner.counts()


@pytest.mark.parametrize("partitions", [1, 2])
@pytest.mark.parametrize("many", [4, 30])
def test_shards_are_shared_by_partitions_or_dealt_to_them(
    processor: Processor, tmp_path: Path, partitions: int, many: int
) -> None:
    """Shards of very different lengths, some empty, some shorter than the number of partitions."""
    lengths = [(0, 1, 7, 30)[i % 4] for i in range(many)]
    sources = {"text": {"kind": "text", "path": text_shards(tmp_path, "t", lengths), "shuffle_shards": 3}}
    data = datamodule(processor, sources, epochs=2)
    straight = train(loaders(data, 0, 1, partitions)[0], None)
    assert set(Counter(straight).values()) == {2}
    assert len(straight) == 2 * sum(lengths)
    items: list[str] = []
    state = None
    for steps in (1, 2, 3, None):
        part = loaders(data, 0, 1, partitions, state)
        items += train(part[0], steps)
        state = merged(part)
    assert items == straight


def test_fewer_records_than_partitions(processor: Processor, tmp_path: Path) -> None:
    sources = {
        "few": {"kind": "text", "path": text_shards(tmp_path, "few", [2])},
        "many": {"kind": "text", "path": text_shards(tmp_path, "many", [50])},
    }
    for epochs in (1, 2, 5):
        keys = Counter(train(loaders(datamodule(processor, sources, epochs=epochs), 0, 1, 4)[0], None))
        assert len(keys) == 52
        assert set(keys.values()) == {epochs}
    with pytest.raises(
        UserError, match=r"'few': nothing to read .* for partition 2 of 4 \(fewer records than partitions\)"
    ):
        datamodule(processor, sources).planner(partitions=4)
    (tmp_path / "few-0.jsonl").write_text("\n")
    for mixing in ({"epochs": 1}, {"epochs": 2}, {}):
        with pytest.raises(UserError, match=r"'few': nothing to read .* \(nothing in it\)"):
            datamodule(processor, sources, **mixing).planner(partitions=1)


def test_a_shard_that_grew_or_shrank_in_between(processor: Processor, tmp_path: Path) -> None:
    paths = text_shards(tmp_path, "t", [30, 30, 30])
    data = datamodule(processor, {"text": {"kind": "text", "path": paths}}, rows=2, epochs=2)
    [loader] = loaders(data, 0, 1, 1)
    result = train(loader, 1)
    state = merged([loader])
    assert state["partitions"]["0"]["mixture"]["streams"]["text"]["lengths"] == [30, 30, 30]
    assert state["partitions"]["0"]["mixture"]["streams"]["text"]["epoch"] == 0
    text_shards(tmp_path, "t", [30, 20, 45])
    [loader] = loaders(data, 0, 1, 1, state)
    keys = Counter(result + train(loader, None))
    shrunk = {f"text/t-1.jsonl:{i}" for i in range(20, 30)}
    grown = {f"text/t-2.jsonl:{i}" for i in range(30, 45)}
    both = {f"text/t-{n}.jsonl:{i}" for n, length in enumerate((30, 20, 30)) for i in range(length)}
    # In the epoch that was begun the order is that of the old lengths; the next one has what there is.
    assert all(keys[key] == 2 for key in both)
    assert all(keys[key] == 1 for key in grown)
    assert all(keys[key] <= 1 for key in shrunk)
    lost = sum(keys[key] == 0 for key in shrunk)
    assert loader.counters["skipped/text/shard_missing"] == lost > 0


def test_a_state_of_other_files_is_refused(processor: Processor, tmp_path: Path) -> None:
    paths = text_shards(tmp_path, "t", [9, 9, 9])
    [loader] = loaders(datamodule(processor, {"text": {"kind": "text", "path": paths}}, rows=1), 0, 1, 1)
    train(loader, 1)
    fewer = datamodule(processor, {"text": {"kind": "text", "path": paths[:2]}}, rows=1)
    with pytest.raises(UserError, match=r"'text': the checkpoint was made with 3 files, there are 2"):
        loaders(fewer, 0, 1, 1, merged([loader]))


def test_a_group_of_questions_that_became_smaller_in_between(processor: Processor, sources: Sources) -> None:
    """Which records share an image decides how many units a block has: the place may be behind the last one."""
    asked = {"asked": sources["asked"] | {"questions_per_sample": 1}}
    [loader] = loaders(datamodule(processor, asked, rows=1), 0, 1, 1)
    train(loader, 2)
    state = merged([loader])
    assert state["partitions"]["0"]["mixture"]["streams"]["asked"]["position"] > 8
    [loader] = loaders(
        datamodule(processor, {"asked": sources["asked"] | {"questions_per_sample": 9}}, rows=1), 0, 1, 1, state
    )
    assert train(loader, 3)


# --- what may not change


def test_another_seed_is_refused_since_records_would_repeat(processor: Processor, sources: Sources) -> None:
    data = datamodule(processor, sources)
    [loader] = loaders(data, 0, 1, 2)
    train(loader, 2)
    state = merged([loader])
    data.check_resume({"planner": state})
    other = datamodule(processor, sources)
    other.seed = data.seed + 1
    for refuse in (lambda: other.check_resume({"planner": state}), lambda: loaders(other, 0, 1, 2, state)):
        with pytest.raises(UserError, match=rf"seed={other.seed}: .*set seed={data.seed}"):
            refuse()


def test_what_changes_the_order_is_told_before_anything_is_read(
    processor: Processor, sources: Sources, caplog: pytest.LogCaptureFixture
) -> None:
    data = datamodule(processor, sources)
    [loader] = loaders(data, 0, 1, 1)
    train(loader, 2)
    state = {"planner": merged([loader])}
    name = next(iter(sources))
    datamodule(processor, sources | {name: {**sources[name], "shuffle_shards": 3}}).check_resume(state)
    assert f"data.sources.{name}.shuffle_shards=3: the checkpoint was made with 2" in caplog.text
    fewer = {key: value for key, value in sources.items() if key != name}
    with pytest.raises(UserError, match=r"data\.sources: the checkpoint was made with"):
        datamodule(processor, fewer).check_resume(state)
    other = datamodule(processor, sources)
    other.mixing.partitions = 3
    with pytest.raises(UserError, match=r"data\.mixing\.partitions=3: the checkpoint was made with 1"):
        other.check_resume(state)


def test_samples_that_wait_and_no_longer_fit_a_row_are_counted(processor: Processor, sources: Sources) -> None:
    data = datamodule(processor, sources)
    [loader] = loaders(data, 0, 1, 1)
    train(loader, 2)
    state = merged([loader])
    lengths = [len(s["prefix"]) + sum(len(b[0]) for b in s["questions"]) for s in state["partitions"]["0"]["pending"]]
    shorter = datamodule(processor, sources)
    shorter.packing.row_length = max(lengths) - 1
    planner = shorter.planner(1, 0, 1, 1)
    planner.load_state_dict(state)
    partition = planner.partitions[0]
    assert all(sample.length <= shorter.packing.row_length for sample in partition.pending)
    assert len(partition.pending) < len(lengths)
    assert sum(n for key, n in partition.mixture.counts.items() if key.endswith("longer_than_row")) >= 1


def test_a_file_with_other_contents_is_named_wherever_the_data_lie(
    processor: Processor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = text_shards(tmp_path, "t", [9, 9000])
    [loader] = loaders(datamodule(processor, {"text": {"kind": "text", "path": paths}}), 0, 1, 1)
    train(loader, 2)
    state = json.loads(json.dumps({"planner": merged([loader])}))
    copies = [shutil.copy(path, tmp_path / f"copy-{number}.jsonl") for number, path in enumerate(paths)]
    datamodule(processor, {"text": {"kind": "text", "path": [str(copy) for copy in copies]}}).check_resume(state)
    assert "has changed" not in caplog.text
    Path(paths[0]).write_text(Path(paths[0]).read_text().replace("text", "word"))  # as many bytes and records
    datamodule(processor, {"text": {"kind": "text", "path": paths}}).check_resume(state)
    assert f"source 'text': {paths[0]} has changed since the checkpoint was made" in caplog.text
    assert paths[1] not in caplog.text


def test_a_position_is_the_end_of_the_data_only_for_the_epochs_that_were_read(
    processor: Processor, sources: Sources
) -> None:
    [loader] = loaders(datamodule(processor, sources, epochs=1), 0, 1, 2)
    train(loader, 1)
    begun = {"planner": merged([loader])}
    train(loader, None)
    ended = json.loads(json.dumps({"planner": merged([loader])}))
    once = datamodule(processor, sources, epochs=1)
    assert (once.ends_at({}), once.ends_at(begun), once.ends_at(ended)) == (False, False, True)
    assert not datamodule(processor, sources, epochs=2).ends_at(ended)
    assert not datamodule(processor, sources).ends_at(ended)
