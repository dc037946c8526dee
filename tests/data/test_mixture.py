"""Which record comes next: shares, epochs, bad records, and the state that a run resumes from."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from sphinx_pl.data.mixture import Mixture, SourceConfig
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.record import Sample
from sphinx_pl.errors import UserError


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
    return [f"{sample.source}/{branch.key}" for sample in samples for branch in sample.branches]


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
        ({"weight": -0.5}, r"data\.sources\.real\.weight=-0\.5 must not be negative"),
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
        "mixed/skipped/text_empty": 4,
        "mixed/skipped/json_not_utf8": 2,
        "mixed/skipped/json_unreadable": 2,
        "mixed/skipped/entry_malformed": 2,
    }


def test_records_about_one_image_share_a_sample(processor: Processor, sample_data: Path) -> None:
    source = {"kind": "instructions", "path": str(sample_data / "instructions/train-scenes.json"), "branches": 3}
    mixture = Mixture({"tasks": source}, processor, seed=0)
    stream = mixture.streams["tasks"]
    records = [stream.source.record(i) for i in range(len(stream.source))]
    image_of = {record.key: record.images for record in records}
    epoch: list[Sample] = []
    while len(found := keys(epoch)) < len(records):
        epoch += mixture.draw()
        assert stream.epoch == 0 or len(keys(epoch)) == len(records)
    assert sorted(found) == sorted(f"tasks/{key}" for key in image_of)
    assert max(len(sample.branches) for sample in epoch) == 3
    for sample in epoch:
        assert all(image_of[branch.key] == sample.images for branch in sample.branches)


def test_joined_samples_stay_within_the_bound(processor: Processor, sample_data: Path) -> None:
    source = {"kind": "instructions", "path": str(sample_data / "instructions/train-scenes.json"), "branches": 9}
    free, bounded = ([*draw(Mixture({"t": source}, processor, 0, bound), 20)] for bound in (1 << 30, 128))
    assert any(sample.length > 128 for sample in free)
    assert all(sample.length <= 128 or len(sample.branches) == 1 for sample in bounded)
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
