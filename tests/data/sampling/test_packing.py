"""Packing changes where samples lie, not what they cost."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sphinx_pl.data.processor import Processor, merge_questions
from sphinx_pl.data.readers import build_reader
from sphinx_pl.data.sampling.collator import Collator
from sphinx_pl.data.sampling.mixture import Mixture
from sphinx_pl.data.sampling.packing import PackingConfig, Row, deal, first_fit_decreasing, fullest_rows
from sphinx_pl.data.sampling.partition import MAX_WAITING, Partition
from sphinx_pl.data.sampling.planner import MicroPlan, Planner
from sphinx_pl.data.sampling.resume_state import merge_states
from sphinx_pl.data.schema import IGNORE, Batch, Sample, SampleQuestion
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError
from tests.conftest import tiny_model


def text_sample(length: int, number: int = 0) -> Sample:
    return Sample([], [SampleQuestion([1] * length, [False] + [True] * (length - 1), "text", f"k{number}")], (), "text")


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 12))
@settings(deadline=None)
def test_first_fit_decreasing_loses_nothing_and_overfills_nothing(lengths: list[int], rows: int) -> None:
    samples = [text_sample(n, i) for i, n in enumerate(lengths)]
    packed, left = first_fit_decreasing(samples, rows, row_length=32)
    placed = [sample for row in packed for sample in row]
    assert sorted(id(s) for s in [*placed, *left]) == sorted(id(s) for s in samples)
    assert len(packed) <= rows
    assert all(sum(s.length for s in row) <= 32 for row in packed)
    # Whatever is left would not have fitted: it is longer than every row's rest and no row was unused.
    for sample in left:
        assert sample.length > 32 or (
            len(packed) == rows and all(sum(s.length for s in row) + sample.length > 32 for row in packed)
        )


def image_sample(length: int, images: int) -> Sample:
    return Sample([], [SampleQuestion([1] * length, [True] * length, "chat", "k")], ("ref",) * images, "s")  # type: ignore[arg-type]


@given(
    st.lists(st.tuples(st.integers(1, 32), st.integers(0, 2)), max_size=40),
    st.integers(1, 8),
    st.sampled_from([0, 2, 3]),
)
@settings(deadline=None)
def test_fullest_rows_lose_nothing_and_keep_the_bounds(
    lengths: list[tuple[int, int]], rows: int, images_per_row: int
) -> None:
    samples = [image_sample(*one) for one in lengths]
    packed, left = fullest_rows(samples, rows, 32, images_per_row)
    placed = [sample for row in packed for sample in row]
    assert sorted(id(s) for s in [*placed, *left]) == sorted(id(s) for s in samples)
    assert all(sum(s.length for s in row) <= 32 for row in packed)
    assert not images_per_row or all(sum(len(s.images) for s in row) <= images_per_row for row in packed)
    # What is left keeps its order, and rows begin with what stands first: nothing waits for ever.
    assert [id(s) for s in left] == [id(s) for s in samples if any(s is other for other in left)]
    assert not samples or packed[0][0] is samples[0]
    assert len(packed) == rows or not left


@given(st.lists(st.tuples(st.integers(1, 32), st.integers(0, 2)), min_size=1, max_size=9), st.sampled_from([0, 2, 3]))
@settings(deadline=None)
def test_no_choice_would_fill_a_row_better(lengths: list[tuple[int, int]], images_per_row: int) -> None:
    first, *others = (image_sample(*one) for one in lengths)
    [[row], _] = fullest_rows([first, *others], 1, 32, images_per_row)
    fillings = [
        sum(s.length for s in chosen)
        for count in range(len(others) + 1)
        for chosen in itertools.combinations(others, count)
        if not images_per_row or sum(len(s.images) for s in [first, *chosen]) <= images_per_row
    ]
    best = max(first.length + filling for filling in fillings if first.length + filling <= 32)
    assert sum(s.length for s in row) == best


def test_nothing_waits_longer_than_its_turn() -> None:
    """A stream of lengths that fill rows without it does not keep one out that fits nowhere well."""
    waiting = [text_sample(17, -1)]
    for step in range(3):
        drawn = [text_sample(16, number) for number in range(2 * 4)]
        packed, waiting = fullest_rows([*drawn, *waiting] if step == 0 else [*waiting, *drawn], 4, 32)
        if any(sample.questions[0].key == "k-1" for row in packed for sample in row):
            return
    raise AssertionError("it was never placed")


def test_deal_gives_equal_numbers_of_rows_and_spreads_images() -> None:
    def row(images: int) -> Row:
        return [Sample([], [SampleQuestion([1], [True], "text", "k")], ("ref",) * images, "s")]  # type: ignore[arg-type]

    bins = deal([row(n) for n in (9, 1, 5, 5, 1, 9, 3, 3)], 4)
    assert [len(b) for b in bins] == [2, 2, 2, 2]
    assert [sum(len(s.images) for r in b for s in r) for b in bins] == [10, 10, 8, 8]


def collate(processor: Processor, rows: list[Row], row_length: int = 256) -> Batch:
    return Collator(row_length, processor.image_size)(rows)


def losses_by_key(model: Sphinx, batch: Batch) -> dict[str, list[float]]:
    """Every sample's token losses, in the order of `batch.keys`."""
    losses = model.token_losses(batch)
    items: dict[tuple[int, int, int], list[float]] = {}
    length = batch.input_ids.shape[1]
    for nll, index in zip(losses.nll.tolist(), losses.index.tolist(), strict=True):
        b, t = divmod(index, length)
        place = (b, int(batch.segment_ids[b, t]), int(batch.question_ids[b, t]))
        items.setdefault(place, []).append(nll)
    return dict(zip(batch.keys, [items[place] for place in sorted(items)], strict=True))


@pytest.fixture
def samples(processor: Processor, sample_data) -> list[Sample]:  # type: ignore[no-untyped-def]
    tasks = build_reader("instructions", "tasks", str(sample_data / "instructions/train-scenes.json"))
    text = build_reader("text", "text", str(sample_data / "text/train.jsonl"))
    rng = random.Random(0)
    made = [processor.sample(tasks.record(i), "tasks", rng) for i in range(0, 40, 5)]
    made += [processor.sample(text.record(i), "text", rng) for i in range(4)]
    return [sample for sample in made if sample.length <= 256]


def test_packed_rows_give_the_losses_and_gradients_of_samples_alone(
    processor: Processor, samples: list[Sample]
) -> None:
    torch.manual_seed(0)
    model = Sphinx(tiny_model()).eval()
    alone: dict[str, list[float]] = {}
    for sample in samples:
        batch = collate(processor, [[sample]])
        alone |= losses_by_key(model, batch)
        model.token_losses(batch).nll.sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    rows, left = first_fit_decreasing(samples, 16, 256)
    assert not left
    assert max(len(row) for row in rows) > 1
    batch = collate(processor, rows)
    packed = losses_by_key(model, batch)
    model.token_losses(batch).nll.sum().backward()

    assert packed.keys() == alone.keys()
    for key, losses in alone.items():
        assert packed[key] == pytest.approx(losses, abs=2e-5)
    for name, parameter in model.named_parameters():
        if name.endswith("key.bias"):  # shifts all scores of a query alike: no gradient but rounding
            assert max(parameter.grad.abs().max(), expected[name].abs().max()) < 1e-6, name
        elif name in expected:
            scale = expected[name].abs().max().clamp(min=1e-3)
            assert (parameter.grad - expected[name]).abs().max() < 1e-4 * scale, name


def test_questions_about_one_image_give_the_losses_of_samples_alone(processor: Processor, sample_data) -> None:  # type: ignore[no-untyped-def]
    source = build_reader("instructions", "tasks", str(sample_data / "instructions/train-scenes.json"))
    by_image: dict[object, list[Sample]] = {}
    for i in range(len(source)):
        record = source.record(i)
        if record.images:
            by_image.setdefault(record.images, []).append(processor.sample(record, "tasks"))
    group = next(g for g in by_image.values() if len(g) >= 3)[:3]
    [merged] = merge_questions(group, 512)
    assert len(merged.prefix) >= 1 + processor.tokens_per_image
    assert merged.length < sum(sample.length for sample in group)

    # A bound on the length splits the questions over as few samples as it allows.
    pair = merge_questions(group[:2], 512)[0].length
    assert [len(s.questions) for s in merge_questions(group, pair)] == [2, 1]

    torch.manual_seed(0)
    model = Sphinx(tiny_model()).eval()
    alone: dict[str, list[float]] = {}
    for sample in group:
        alone |= losses_by_key(model, collate(processor, [[sample]]))
    together = losses_by_key(model, collate(processor, [[merged]], row_length=512))
    assert together.keys() == alone.keys()
    for key, losses in alone.items():
        assert together[key] == pytest.approx(losses, abs=2e-5)


def test_supervised_positions_are_the_answers(processor: Processor, samples: list[Sample]) -> None:
    for sample in samples:
        batch = collate(processor, [[sample]])
        kept = batch.labels[batch.labels != IGNORE].tolist()
        text = processor.tokenizer.decode(kept)
        question = sample.questions[0]
        assert kept == [i for i, flag in zip(question.ids, question.supervised, strict=True) if flag]
        if question.task != "text":
            assert text.endswith("\n###")
            assert "Assistant" not in text


def mixture(processor: Processor, folder: Path, text_weight: float, partition: int = 0, partitions: int = 1) -> Mixture:
    return Mixture(
        {
            "real": {"kind": "image_text", "path": f"{folder}/real/train-*.tar", "weight": 1.0},
            "text": {"kind": "text", "path": f"{folder}/text/train.jsonl", "weight": text_weight},
        },
        processor,
        seed=3,
        partition=partition,
        partitions=partitions,
    )


def planner(make: Callable[[int, int], Mixture], config: PackingConfig, partitions: int = 1, **ranks: int) -> Planner:
    """Of partitions with mixtures made from (partition, partitions)."""
    return Planner(lambda partition: Partition(make(partition, partitions), config), partitions, config, **ranks)


def questions(plans: Iterable[MicroPlan], images: bool | None = None) -> list[str]:
    """Keys of all placed questions, of samples with images or without where asked for."""
    samples = [sample for plan in plans for row in plan.rows for sample in row]
    return [
        f"{s.source}/{question.key}" for s in samples if images in (None, bool(s.images)) for question in s.questions
    ]


@pytest.mark.parametrize(("partitions", "ranks"), [(1, 1), (1, 2), (2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("text", [0.01, 30.0])
def test_every_step_holds_text_and_images(
    processor: Processor, sample_data: Path, partitions: int, ranks: int, text: float
) -> None:
    """Of all ranks together, however rare one of them is."""
    config = PackingConfig(row_length=96, micro_batch_rows=4 // ranks)
    make = partial(mixture, processor, sample_data, text)
    planners = [planner(make, config, partitions, rank=rank, world_size=ranks) for rank in range(ranks)]
    rare = []
    for _ in range(40):
        plans = [plan for one in planners for plan in one.plan()]
        images, texts = questions(plans, images=True), questions(plans, images=False)
        assert images
        assert texts
        rare.append(min(len(images), len(texts)))
    # And hardly more of what is rare than that: the partitions take turns.
    assert sum(rare) / len(rare) < 2


@pytest.mark.parametrize("partitions", [1, 2, 4])
def test_the_order_does_not_depend_on_the_ranks(processor: Processor, sample_data: Path, partitions: int) -> None:
    def planned(world_size: int, accumulate: int = 1, count: int = 12) -> list[list[str]]:
        config = PackingConfig(row_length=96, micro_batch_rows=8 // world_size // accumulate)
        make = partial(mixture, processor, sample_data, 0.05)
        planners = [
            planner(make, config, partitions, accumulate=accumulate, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        items = [[planner.plan() for planner in planners] for _ in range(count)]
        assert all(len(plans) == accumulate for ranks in items for plans in ranks)
        assert all(len(plan.rows) == config.micro_batch_rows for ranks in items for plans in ranks for plan in plans)
        return [sorted(questions(plan for plans in ranks for plan in plans)) for ranks in items]

    one = planned(1)
    assert planned(2) == one
    assert planned(4) == one
    assert planned(2, accumulate=2) == one


@pytest.mark.parametrize("partitions", [1, 3])
def test_an_epoch_is_planned_without_loss_or_repeat(processor: Processor, sample_data: Path, partitions: int) -> None:
    config = PackingConfig(row_length=96, micro_batch_rows=6)
    plans = planner(partial(mixture, processor, sample_data, 0.05), config, partitions)
    epoch = len(plans.mixture.streams["real"].source)
    full: list[str] = []
    while len(full) <= epoch + 40:
        full += questions(plans.plan(), images=True)
    drawn_once = full[: epoch - 40]  # the packer's look-ahead reorders only near the seam
    assert len(set(drawn_once)) == len(drawn_once) > 0


def test_a_planner_continues_from_its_state(processor: Processor, sample_data: Path) -> None:
    config = PackingConfig(row_length=96, micro_batch_rows=4)
    make = partial(mixture, processor, sample_data, 0.05)

    def planned(planner: Planner, count: int) -> list[list[str]]:
        return [questions(planner.plan()) for _ in range(count)]

    whole = planner(make, config, 2)
    first = planned(whole, 7)
    whole.consumed(7)
    planned(whole, 3)  # a loader that ran ahead does not move the place
    state = whole.state_dict()
    assert json.loads(json.dumps(state)) == state
    resumed = planner(make, config, 2)
    resumed.load_state_dict(state)
    assert first + planned(resumed, 8) == planned(planner(make, config, 2), 15)


def test_the_states_of_all_ranks_together_serve_any_number_of_ranks(processor: Processor, sample_data: Path) -> None:
    make = partial(mixture, processor, sample_data, 0.05)

    def planners(world_size: int) -> list[Planner]:
        config = PackingConfig(row_length=96, micro_batch_rows=8 // world_size)
        return [planner(make, config, 4, rank=rank, world_size=world_size) for rank in range(world_size)]

    def planned(planners: list[Planner], count: int) -> list[list[str]]:
        return [sorted(questions(plan for p in planners for plan in p.plan())) for _ in range(count)]

    straight = planned(planners(1), 9)
    four = planners(4)
    assert planned(four, 3) == straight[:3]
    for one in four:
        one.consumed(3)
    two = planners(2)
    state = merge_states([one.state_dict() for one in four])
    for one in two:
        one.load_state_dict(state)
    assert planned(two, 3) == straight[3:6]
    for one in two:
        one.consumed(6)
    [single] = planners(1)
    single.load_state_dict(merge_states([one.state_dict() for one in two]))
    assert planned([single], 3) == straight[6:]
    with pytest.raises(UserError, match=r"data\.mixing\.partitions=2: the checkpoint was made with 4"):
        planner(make, PackingConfig(row_length=96, micro_batch_rows=8), 2).load_state_dict(state)


def test_rows_that_do_not_go_into_the_ranks_are_refused(processor: Processor, sample_data: Path) -> None:
    make = partial(mixture, processor, sample_data, 0.05)
    with pytest.raises(UserError, match=r"data\.mixing\.partitions=3 is more than the 2 rows"):
        planner(make, PackingConfig(row_length=96, micro_batch_rows=2), 3)
    with pytest.raises(UserError, match=r"partitions=4: the 6 rows .* 2 ranks"):
        planner(make, PackingConfig(row_length=96, micro_batch_rows=3), 4, rank=0, world_size=2)


def test_an_unreadable_image_leaves_a_masked_slot(processor: Processor, samples: list[Sample], tmp_path) -> None:  # type: ignore[no-untyped-def]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not an image")
    good, bad = (
        (s for s in samples if s.images)
        if sum(bool(s.images) for s in samples) == 2
        else [s for s in samples if s.images][:2]
    )
    ref = type(bad.images[0])(str(broken))
    bad = Sample(bad.prefix, bad.questions, (ref,), bad.source)
    batch = collate(processor, [[good], [bad]])
    assert (batch.labels[0] != IGNORE).any()
    assert (batch.labels[1] == IGNORE).all()
    assert batch.weights[1].sum() == 0
    assert len(batch.pixels) == 2
    assert batch.counters["skipped/tasks/image_unreadable"] == 1


def test_every_position_of_a_sample_knows_its_source(processor: Processor, samples: list[Sample]) -> None:
    rows, _ = first_fit_decreasing(samples, 16, 256)
    assert Collator(256, processor.image_size)(rows).source_ids is None
    batch = Collator(256, processor.image_size, sources=["unused", "text", "tasks"])(rows)
    assert batch.source_ids is not None
    assert batch.sources == ["unused", "text", "tasks"]
    for b, row in enumerate(rows):
        for segment, sample in enumerate(row, start=1):
            ids = batch.source_ids[b][batch.segment_ids[b] == segment]
            assert set(ids.tolist()) == {batch.sources.index(sample.source)}


# --- what waits for its turn


def few_pictures(processor: Processor, folder: Path, pictures: int, others: int) -> Planner:
    """Of a source with so many records with and without an image, in steps of two short rows."""
    from sphinx_pl.data.datamodule import DataModule

    Image.new("RGB", (8, 8)).save(folder / "a.png")
    entries = [{"question": f"How are you, {i}?", "answer": "Fine."} for i in range(others)]
    entries += [{"question": "What?", "answer": "red", "image": "a.png"} for _ in range(pictures)]
    (folder / "x.json").write_text(json.dumps(entries))
    source = {"kind": "instructions", "path": str(folder / "x.json")}
    return DataModule(processor, {"x": source}, {}, {"row_length": 64, "micro_batch_rows": 2}).planner()


def test_a_rare_modality_does_not_make_the_others_wait_for_ever(
    processor: Processor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    planner = few_pictures(processor, tmp_path, pictures=2, others=98)
    [partition] = planner.partitions.values()
    trained: list[Sample] = []
    for _ in range(300):
        trained += [sample for plan in planner.plan() for row in plan.rows for sample in row]
        planner.consumed(planner.number)
        assert sum(sample.length for sample in partition.pending) <= MAX_WAITING * 2 * 64 + 64
    shares = sum(bool(sample.images) for sample in trained) / len(trained)
    assert shares == pytest.approx(0.02, abs=0.01)
    # The counters are of what was trained on, and say what waits.
    counts = planner.counts()
    assert counts["x/samples"] == len(trained)
    assert counts["x/tokens"] == sum(sample.length for sample in trained)
    assert counts["x/waiting"] == len(partition.pending)
    assert counts["x/seen"] == counts["x/samples"] + counts["x/waiting"]
    told = r"data: \d+ of the first 100 steps have no image sample \([12]\.\d % of all samples are\)"
    assert re.search(told, caplog.text)


def test_a_modality_that_never_comes_is_an_error(processor: Processor, tmp_path: Path) -> None:
    planner = few_pictures(processor, tmp_path, pictures=0, others=98)
    with pytest.raises(UserError, match=r"1000 draws in a row gave no image sample \(is data\.sources\.\*\.modality"):
        list(itertools.islice(planner, 2000))


def test_shares_that_the_guarantee_changes_are_told(
    processor: Processor, sample_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from sphinx_pl.data.datamodule import DataModule

    sources = {
        "real": {"kind": "image_text", "path": str(sample_data / "real/train-*.tar"), "weight": 0.99},
        "text": {"kind": "text", "path": str(sample_data / "text/train.jsonl"), "weight": 0.01},
    }
    planner = DataModule(processor, sources, {}, {"row_length": 256, "micro_batch_rows": 2}).planner()
    for _ in range(100):
        planner.plan()
        planner.consumed(planner.number)
    assert re.search(
        r"shares so far differ.*text \d+\.\d% instead of 1\.0%; raise data\.packing\.micro_batch_rows", caplog.text
    )
