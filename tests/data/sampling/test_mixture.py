"""Which record comes next: shares, epochs, bad records, and the state that a run resumes from."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from sphinx_pl.data.processor import Processor
from sphinx_pl.data.sampling.config import Group, MixingConfig, SourceConfig
from sphinx_pl.data.sampling.mixture import Mixture
from sphinx_pl.data.schema import Sample
from sphinx_pl.utils.config import build
from sphinx_pl.utils.errors import UserError


def write_text(path: Path, *lines: bytes) -> str:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


@pytest.fixture
def sources(sample_data: Path, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Three sources, of 5 and 7 documents and of tar shards, with weights 2 : 1 : 2."""
    five, seven = ([json.dumps({"text": f"{n} and {i}"}).encode() for i in range(n)] for n in (5, 7))
    return {
        "five": {"kind": "text", "path": write_text(tmp_path / "five.jsonl", *five), "weight": 2},
        "seven": {"kind": "text", "path": write_text(tmp_path / "seven.jsonl", *seven), "weight": 1},
        "real": {"kind": "image_text", "path": str(sample_data / "real/train-*.tar"), "weight": 2},
    }


def draw(mixture: Mixture, n: int) -> list[Sample]:
    return [sample for _ in range(n) for sample in mixture.draw()]


def keys(samples: list[Sample]) -> list[str]:
    return [f"{sample.source}/{question.key}" for sample in samples for question in sample.questions]


def test_shares_are_kept_after_every_draw(processor: Processor, sources: dict[str, Any]) -> None:
    mixture = Mixture(sources, processor, seed=0)
    assert mixture.shares == pytest.approx({"five": 0.4, "seven": 0.2, "real": 0.4})
    drawn: Counter[str] = Counter()
    for n in range(1, 61):
        drawn.update(sample.source for sample in mixture.draw())
        assert all(abs(drawn[name] - share * n) < 1 for name, share in mixture.shares.items()), (n, drawn)
        if n % 5 == 0:
            assert drawn == {"five": 2 * n / 5, "seven": n / 5, "real": 2 * n / 5}


def test_what_is_asked_for_by_modality_counts_towards_the_shares(processor: Processor, sources: dict[str, Any]) -> None:
    mixture = Mixture(sources, processor, seed=0)
    assert mixture.modalities == ["image", "text"]
    forced = [sample.source for _ in range(6) for sample in mixture.draw("text")]
    assert Counter(forced) == {"five": 4, "seven": 2}
    # Six of ten are the text's whole share, so what is missing are four images.
    assert [sample.source for sample in draw(mixture, 4)] == ["real"] * 4


def test_an_epoch_has_every_record_once_and_the_next_one_another_order(
    processor: Processor, sources: dict[str, Any]
) -> None:
    def epochs(seed: int) -> list[list[str]]:
        mixture = Mixture({"seven": sources["seven"]}, processor, seed)
        return [keys(draw(mixture, 7)) for _ in range(3)]

    orders = epochs(seed=0)
    assert all(sorted(order) == [f"seven/seven.jsonl:{i}" for i in range(7)] for order in orders)
    assert len({tuple(order) for order in [*orders, *epochs(seed=1)]}) == 6
    assert epochs(seed=0) == orders


def test_a_null_source_and_one_without_weight_are_left_out(processor: Processor, sources: dict[str, Any]) -> None:
    mixture = Mixture(sources | {"real": None, "five": sources["five"] | {"weight": 0}}, processor, seed=0)
    assert mixture.shares == {"seven": 1.0}
    assert mixture.modalities == ["text"]
    with pytest.raises(UserError, match=r"data\.sources is empty"):
        Mixture({"real": None}, processor, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "image_txt"}, r"unknown source kind 'image_txt': did you mean 'image_text'\?"),
        ({"kind": ""}, r"data\.sources\.real\.kind is missing"),
        ({"path": None}, r"data\.sources\.real\.path is missing"),
        ({"path": "nowhere/*.tar"}, r"source 'real': there is no file 'nowhere/\*\.tar'"),
        ({"weight": -0.5}, r"data\.sources\.real\.weight=-0\.5 must be a number of at least 0"),
        ({"modality": "video"}, r"data\.sources\.real\.modality='video' must be one of image, text"),
        ({"tsk": "caption"}, r"data\.sources\.real of kind image_text has no option 'tsk': did you mean 'task'\?"),
        ({"task": "captoin"}, r"unknown task 'captoin': did you mean 'caption'\?"),
    ],
)
def test_wrong_sources_are_answered_in_one_line(
    processor: Processor, sources: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Mixture(sources | {"real": sources["real"] | change}, processor, seed=0)
    assert "\n" not in str(caught.value)


def test_the_modality_is_that_of_the_kind_unless_said_otherwise() -> None:
    modality = {
        name: SourceConfig.from_dict(name, {"path": "p", **values}).modality
        for name, values in {
            "a": {"kind": "text"},
            "b": {"kind": "image_text"},
            "c": {"kind": "instructions"},
            "d": {"kind": "instructions", "modality": "text"},
        }.items()
    }
    assert modality == {"a": "text", "b": "image", "c": "image", "d": "text"}


def test_bad_records_are_counted_and_not_raised(processor: Processor, tmp_path: Path) -> None:
    good = [json.dumps({"text": f"text {i}"}).encode() for i in range(6)]
    bad = [b'{"text": ""}', b'{"text": "caf\xe9"}', b"{", b"[]", json.dumps({"text": "\n"}).encode()]
    path = write_text(tmp_path / "mixed.jsonl", *good, *bad)
    mixture = Mixture({"mixed": {"kind": "text", "path": path}}, processor, seed=0)
    samples = draw(mixture, 22)
    assert Counter(keys(samples)) == {f"mixed/mixed.jsonl:{i}": 2 for i in range(6)}
    assert mixture.counts == {
        "mixed/seen": 22,
        "mixed/samples": 12,
        "mixed/images": 0,
        "mixed/tokens": sum(sample.length for sample in samples),
        "mixed/targets": sum(sample.length - 1 for sample in samples),
        "skipped/mixed/text_empty": 4,
        "skipped/mixed/json_not_utf8": 2,
        "skipped/mixed/json_unreadable": 2,
        "skipped/mixed/entry_malformed": 2,
    }


def test_records_about_one_image_share_a_sample(processor: Processor, sample_data: Path) -> None:
    source = {
        "kind": "instructions",
        "path": str(sample_data / "instructions/train-scenes.json"),
        "questions_per_sample": 3,
    }
    mixture = Mixture({"tasks": source}, processor, seed=0)
    stream = mixture.streams["tasks"]
    records = [stream.source.record(i) for i in range(len(stream.source))]
    image_of = {record.key: record.images for record in records}
    epoch: list[Sample] = []
    while len(result := keys(epoch)) < len(records):
        epoch += mixture.draw()
        assert stream.epoch == 0 or len(keys(epoch)) == len(records)
    assert sorted(result) == sorted(f"tasks/{key}" for key in image_of)
    assert max(len(sample.questions) for sample in epoch) == 3
    for sample in epoch:
        assert all(image_of[question.key] == sample.images for question in sample.questions)


def test_joined_samples_stay_within_the_bound(processor: Processor, sample_data: Path) -> None:
    source = {
        "kind": "instructions",
        "path": str(sample_data / "instructions/train-scenes.json"),
        "questions_per_sample": 9,
    }
    free, bounded = ([*draw(Mixture({"t": source}, processor, 0, bound), 20)] for bound in (1 << 30, 128))
    assert any(sample.length > 128 for sample in free)
    assert all(sample.length <= 128 or len(sample.questions) == 1 for sample in bounded)
    assert sorted(keys(free)) == sorted(keys(bounded))


def test_the_state_is_plain_and_a_mixture_goes_on_from_it(
    processor: Processor, sources: dict[str, Any], tmp_path: Path
) -> None:
    straight = Mixture(sources, processor, seed=3)
    draw(straight, 31)  # "five" is in its third epoch
    state = straight.state_dict()
    assert json.loads(json.dumps(state)) == state
    torch.save(state, tmp_path / "state.pt")
    expected = draw(straight, 40)

    resumed = Mixture(sources, processor, seed=3)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw(resumed, 40) == expected  # ids and wordings too
    assert resumed.counts == straight.counts
    assert resumed.state_dict() == straight.state_dict() != state


def test_a_state_of_other_sources_is_refused(processor: Processor, sources: dict[str, Any]) -> None:
    state = Mixture(sources, processor, seed=3).state_dict()
    with pytest.raises(UserError, match=r"was made with \['five', 'real', 'seven'\], this run has \['five', 'seven'\]"):
        Mixture(sources | {"real": None}, processor, seed=3).load_state_dict(state)


# --- trees of sources


def text_source(path: Path, count: int, **values: Any) -> dict[str, Any]:
    lines = [json.dumps({"text": f"{path.stem} {i}"}).encode() for i in range(count)]
    return {"kind": "text", "path": write_text(path, *lines), **values}


def test_shares_of_nested_groups(processor: Processor, tmp_path: Path) -> None:
    sources = {
        "a": text_source(tmp_path / "a.jsonl", 3, weight=1),
        "g": {
            "weight": 3,
            "sources": {
                "b": text_source(tmp_path / "b.jsonl", 3, weight=1),
                "h": {"weight": 2, "sources": {"c": text_source(tmp_path / "c.jsonl", 3), "none": None}},
                "off": text_source(tmp_path / "d.jsonl", 3, weight=0),
            },
        },
        "empty": {"sources": {"e": None}},
    }
    mixture = Mixture(sources, processor, seed=0)
    assert mixture.shares == pytest.approx({"a": 0.25, "g.b": 0.25, "g.h.c": 0.5})
    drawn = Counter(sample.source for sample in draw(mixture, 40))
    assert drawn == {"a": 10, "g.b": 10, "g.h.c": 20}


@pytest.mark.parametrize(("temperature", "ratio"), [(1, 100), (2, 10), (1e9, 1)])
def test_a_temperature_is_between_sizes_and_equal_shares(
    processor: Processor, tmp_path: Path, temperature: float, ratio: float
) -> None:
    members = {"small": text_source(tmp_path / "s.jsonl", 3), "large": text_source(tmp_path / "l.jsonl", 300)}
    group = {"temperature": temperature, "sources": members}
    mixture = Mixture({"group": group, "other": text_source(tmp_path / "o.jsonl", 5)}, processor, seed=0)
    assert mixture.shares["other"] == pytest.approx(0.5)
    assert mixture.shares["group.large"] / mixture.shares["group.small"] == pytest.approx(ratio)


def test_shares_of_supervised_tokens(processor: Processor, tmp_path: Path) -> None:
    short = write_text(tmp_path / "s.jsonl", *[b'{"text": "a b"}'] * 5)
    long = write_text(tmp_path / "l.jsonl", *[json.dumps({"text": "a b c d e f g h " * 4}).encode()] * 5)
    sources = {"short": {"kind": "text", "path": short}, "long": {"kind": "text", "path": long, "weight": 3}}
    mixture = Mixture(sources, processor, seed=0, mixing=MixingConfig(unit="token"))
    targets: Counter[str] = Counter()
    for sample in draw(mixture, 400):
        targets[sample.source] += sample.targets
    assert targets["long"] / targets.total() == pytest.approx(0.75, abs=0.01)


def test_epochs_bound_how_often_a_source_is_read(processor: Processor, tmp_path: Path) -> None:
    sources = {
        "once": text_source(tmp_path / "once.jsonl", 4, epochs=1),
        "twice": text_source(tmp_path / "twice.jsonl", 3, epochs=2),
    }
    mixture = Mixture(sources, processor, seed=0)
    assert mixture.finite
    drawn = Counter(keys(draw(mixture, 50)))
    assert set(drawn.values()) == {1, 2}
    assert all(count == (1 if key.startswith("once") else 2) for key, count in drawn.items())
    assert len(drawn) == 7
    assert mixture.exhausted
    # A bound on some of them: the others take their share.
    mixture = Mixture(sources | {"ever": text_source(tmp_path / "ever.jsonl", 2)}, processor, seed=0)
    assert not mixture.finite
    assert Counter(sample.source for sample in draw(mixture, 60)) == {"once": 4, "twice": 6, "ever": 50}
    # One bound for all, and a source's own goes before it.
    mixture = Mixture(sources, processor, seed=0, mixing=MixingConfig(epochs=3))
    assert len(draw(mixture, 60)) == 10


def test_what_has_ended_leaves_its_share_to_the_others_in_proportion(processor: Processor, tmp_path: Path) -> None:
    sources = {
        "ends": text_source(tmp_path / "ends.jsonl", 50, epochs=1, weight=0.98),
        "much": text_source(tmp_path / "much.jsonl", 5, weight=0.019),
        "little": text_source(tmp_path / "little.jsonl", 5, weight=0.001),
    }
    mixture = Mixture(sources, processor, seed=0)
    draw(mixture, 60)
    assert mixture.streams["ends"].exhausted
    drawn = Counter(sample.source for sample in draw(mixture, 2000))
    assert drawn == pytest.approx({"much": 1900, "little": 100}, abs=2)


@pytest.mark.parametrize("partitions", [1, 3])
def test_caps_bound_a_task_in_an_epoch(processor: Processor, tmp_path: Path, partitions: int) -> None:
    entries = [
        {"id": i, "task": "chat" if i % 2 else "text", "question": f"q {i}" if i % 2 else "", "answer": f"answer {i}"}
        for i in range(40)
    ]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    source = {"kind": "instructions", "path": str(tmp_path / "a.json"), "modality": "text", "caps": {"chat": 7}}
    drawn: list[Sample] = []
    for partition in range(partitions):
        mixture = Mixture(
            {"a": source}, processor, seed=0, mixing=MixingConfig(epochs=2), partition=partition, partitions=partitions
        )
        drawn += draw(mixture, 100)
        assert mixture.counts["a/seen"] == mixture.counts["a/samples"] + mixture.counts["a/capped/chat"]
    tasks = Counter(sample.questions[0].task for sample in drawn)
    assert tasks == {"text": 40, "chat": 14}
    # Other ones in another epoch.
    assert len({key for key in keys(drawn) if int(key.split(":")[-1]) % 2}) > 7


def test_the_originals_list_of_files(processor: Processor, sample_data: Path, tmp_path: Path) -> None:
    instructions = sample_data / "instructions"
    chat = [{"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": "a"}]} for i in range(30)]
    (tmp_path / "chat.json").write_text(json.dumps(chat))
    (tmp_path / "data.yaml").write_text(
        f"META:\n"
        f"  - path: {instructions}/val.json\n    type: 'image_text'\n    root: {instructions}\n"
        f"  - path: chat.json\n    type: 'text'\n    ratio: 0.5\n"
        f"  - path: chat.json\n    type: 'text'\n"
    )
    mixture = Mixture({"all": {"kind": "meta", "path": str(tmp_path / "data.yaml"), "weight": 2}}, processor, seed=0)
    sizes = {name: len(stream.source) for name, stream in mixture.streams.items()}
    assert list(sizes) == ["all.image_text-val", "all.text-chat", "all.text-chat-2"]
    assert (sizes["all.text-chat"], sizes["all.text-chat-2"]) == (15, 30)
    total = sum(sizes.values())
    assert mixture.shares == pytest.approx({name: size / total for name, size in sizes.items()})
    assert mixture.modalities == ["image", "text"]
    # A ratio takes the same entries at every start.
    repeat = Mixture({"all": {"kind": "meta", "path": str(tmp_path / "data.yaml")}}, processor, seed=1)
    for name, stream in mixture.streams.items():
        other = repeat.streams[name].source
        assert [stream.source.record(i).key for i in range(10)] == [other.record(i).key for i in range(10)]


@pytest.mark.parametrize(
    "entry",
    [
        "path: 'pipe:touch {mark}; echo []'",
        "path: https://example.org/a.json",
        "path: a.json\n    root: 's3://bucket/a'",
    ],
)
def test_a_list_of_files_that_was_downloaded_runs_and_fetches_nothing(
    processor: Processor, tmp_path: Path, entry: str
) -> None:
    mark = tmp_path / "was_here"
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "data.yaml").write_text("META:\n  - type: t\n    " + entry.format(mark=mark) + "\n")
    with pytest.raises(UserError, match=r"entry 1 of META: (path|root)=.* must be a local path"):
        Mixture({"all": {"kind": "meta", "path": str(tmp_path / "data.yaml")}}, processor, seed=0)
    assert not mark.exists()


def test_a_cap_that_not_every_partition_could_have_a_part_of(processor: Processor, tmp_path: Path) -> None:
    source = text_source(tmp_path / "a.jsonl", 20, caps={"text": 2})
    with pytest.raises(UserError, match=r"data\.sources\.a\.caps\.text=2 is less than data\.mixing\.partitions=3"):
        Mixture({"a": source}, processor, seed=0, partitions=3)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"g": {"sources": {}, "weigth": 1}}, r"data\.sources\.g\.weigth: .* did you mean 'weight'"),
        ({"g": {"sources": {}, "temperature": 0}}, r"data\.sources\.g\.temperature=0 must be positive"),
        ({"g": {"sources": {"a": {"kind": "text"}}}}, r"data\.sources\.g\.sources\.a\.path is missing"),
        ({"a.b": {"kind": "text", "path": "x"}}, "'a.b' must have no dot"),
        ({"a": {"kind": "text", "path": "x", "weight": float("nan")}}, r"weight=nan must be a number of at least 0"),
        (
            {"a": {"kind": "text", "path": "x", "epochs": 0}},
            r"sources\.a\.epochs=0 must be a whole number",
        ),
        ({"a": {"kind": "text", "path": "x", "caps": {"txt": 3}}}, "unknown task 'txt': did you mean 'text'"),
        ({"a": {"kind": "text", "path": "x", "caps": {"text": -3}}}, r"caps=\{'text': -3\} must be"),
        ({"a": 5}, r"data\.sources\.a must be a mapping"),
        ({"g": {"sources": ["a"]}}, r"data\.sources\.g\.sources must be a mapping"),
        ({"g": {"sources": {}, "temperature": "hot"}}, r"temperature=hot must be positive"),
        ({"a": {"kind": "text", "path": 5}}, r"path=5 must be a path, a pattern, or a list"),
        ({"a": {"kind": "meta", "path": "nowhere.yaml"}}, r"data\.sources\.a\.path: nowhere\.yaml cannot be read"),
        ({"a": {"kind": "meta", "path": "setup.cfg"}}, r"setup\.cfg is not a list under META"),
        ({"g": {"sources": {"a": {"kind": "text", "path": "x", "weight": 0}}}}, r"data\.sources is empty"),
    ],
)
def test_trees_that_cannot_be(processor: Processor, sources: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mixture(sources, processor, seed=0)


def test_mixing_that_cannot_be() -> None:
    for values, message in (
        ({"unit": "word"}, "sample, token"),
        ({"epochs": 0}, "epochs=0"),
        ({"partitions": 0}, "partitions=0"),
    ):
        with pytest.raises(UserError, match=message):
            build(MixingConfig, values, "data.mixing")  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [1e-3, 1e-320])
def test_shares_that_are_no_numbers_are_refused(temperature: float) -> None:
    members = {name: {"kind": "text", "path": f"{name}.txt"} for name in ("a", "b")}
    group = Group.from_dict({"sources": members, "temperature": temperature})
    with pytest.raises(UserError, match="raise the temperature"):
        group.shares({"a": 10, "b": 100_000})
