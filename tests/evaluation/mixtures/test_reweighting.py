"""Reweighted mixtures: weights worked out by hand, trees of groups whose shares follow, and a file for train.py."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import sphinx_pl.runtime.hydra_app
from sphinx_pl.data.sampling.config import Group
from sphinx_pl.evaluation.mixtures.reweighting import (
    Reweighting,
    TrainingMixture,
    check_out,
    failure_rates,
    how_to_train,
    write_mixture,
)
from sphinx_pl.evaluation.runner import Prediction
from sphinx_pl.runtime.hydra_app import CONFIG_FOLDER
from sphinx_pl.utils.errors import UserError

sphinx_pl.runtime.hydra_app.register_resolvers()
REGION = {"box": [5, 5, 15, 20], "label": "it"}


def asked(task: str, *scores: float, topic: str = "") -> list[Prediction]:
    return [Prediction(f"{task}{i}", task, "", topic, "m", "", "", "", score, True) for i, score in enumerate(scores)]


def source(folder: Path, name: str, *tasks: tuple[str, str], **more: Any) -> dict[str, Any]:
    """A source's configuration, with a record of each (task, topic)."""
    entries = []
    for i, (task, topic) in enumerate(tasks):
        entry = {"id": f"{name}{i}", "task": task, "question": "the digit", "answer": "7", "meta": {"topic": topic}}
        if task != "chat":
            entry |= {"image": "0.png", "width": 40, "height": 30, "regions": [REGION]}
        entries.append(entry)
    (folder / f"{name}.json").write_text(json.dumps(entries))
    return {"kind": "instructions", "path": str(folder / f"{name}.json")} | more


@pytest.fixture
def flat(tmp_path: Path) -> dict[str, Any]:
    return {
        "answers": source(tmp_path, "answers", ("short_vqa", ""), weight=0.6),
        "places": source(tmp_path, "places", ("rec", ""), weight=0.2),
        "language": source(tmp_path, "language", ("chat", ""), weight=0.2, modality="text"),
    }


# Failures 1/4 and 4/4, 5/8 of all: with a prior of four, 3.5/8 and 6.5/8.
ANSWERS = [*asked("short_vqa", 1, 1, 1, 0), *asked("rec", 0, 0, 0, 0)]


def new_weights(reweighting: Reweighting) -> dict[str, float]:
    return {source.name: source.new_weight for source in reweighting.sources}


def test_failures_are_drawn_towards_the_task_and_all_questions() -> None:
    predictions = [*ANSWERS, *asked("ocr", 0.5, 0.5, topic="word"), *asked("ocr", 1.0, topic="number")]
    rates = {(rate.task, rate.topic): rate for rate in failure_rates(predictions, prior=4)}
    overall = 6 / 11
    assert rates["rec", ""].failure == 1
    assert rates["rec", ""].shrunk == pytest.approx((4 + 4 * overall) / 8)
    ocr = (1 + 4 * overall) / 7
    assert rates["ocr", ""].shrunk == pytest.approx(ocr)
    assert rates["ocr", "word"].shrunk == pytest.approx((1 + 4 * ocr) / 6)
    assert rates["ocr", "number"].shrunk == pytest.approx(4 * ocr / 5)
    assert ("rec", "") in rates
    assert len([key for key in rates if key[0] == "rec"]) == 1  # no topics, no rows of them


def test_weights_by_hand(flat: dict[str, Any]) -> None:
    training = TrainingMixture(flat)
    whole = training.reweight(ANSWERS, strength=1, prior=4)
    assert whole.mean == pytest.approx((0.6 * 0.4375 + 0.2 * 0.8125) / 0.8)  # 0.53125
    assert new_weights(whole) == pytest.approx({"answers": 0.494118, "places": 0.305882, "language": 0.2}, abs=1e-6)
    half = training.reweight(ANSWERS, strength=0.5, prior=4)
    assert new_weights(half) == pytest.approx({"answers": 0.547059, "places": 0.252941, "language": 0.2}, abs=1e-6)
    bounded = training.reweight(ANSWERS, strength=1, prior=4, bound=1.1)
    assert new_weights(bounded) == pytest.approx({"answers": 0.58, "places": 0.22, "language": 0.2}, abs=1e-6)
    nothing = training.reweight(ANSWERS, strength=0, prior=4)
    assert new_weights(nothing) == pytest.approx({"answers": 0.6, "places": 0.2, "language": 0.2}, abs=1e-6)


def test_a_model_that_fails_only_rec_gets_more_of_it(flat: dict[str, Any]) -> None:
    reweighting = TrainingMixture(flat).reweight([*asked("short_vqa", *[1.0] * 200), *asked("rec", *[0.0] * 200)])
    shares = {source.name: (source.share, source.new_share) for source in reweighting.sources}
    assert shares["places"][1] > 1.5 * shares["places"][0]
    assert shares["answers"][1] < shares["answers"][0]
    assert shares["language"] == pytest.approx((0.2, 0.2))
    kept = {source.name: source.kept for source in reweighting.sources}
    assert kept == {"answers": "", "places": "", "language": "text only"}


def test_a_model_without_a_mistake_changes_nothing(flat: dict[str, Any]) -> None:
    reweighting = TrainingMixture(flat).reweight([*asked("short_vqa", 1, 1), *asked("rec", 1, 1)], strength=1)
    assert new_weights(reweighting) == pytest.approx({"answers": 0.6, "places": 0.2, "language": 0.2}, abs=1e-6)


def test_topics_and_what_was_not_asked(tmp_path: Path) -> None:
    sources = {
        "red": source(tmp_path, "red", ("short_vqa", "colour"), weight=1.0),
        "four": source(tmp_path, "four", ("short_vqa", "count"), weight=1.0),
        "half": source(tmp_path, "half", ("short_vqa", "count"), ("caption", ""), weight=1.0),
        "captions": source(tmp_path, "captions", ("caption", ""), weight=1.0),
    }
    easy, hard = asked("short_vqa", *[1] * 6, topic="colour"), asked("short_vqa", *[0] * 6, topic="count")
    reweighting = TrainingMixture(sources).reweight([*easy, *hard], strength=1, prior=6)
    # The task 0.5, its topics 0.25 and 0.75. Known records: one of colour, one and a half of count.
    mean = (0.25 + 0.75 + 0.375) / 2.5
    failures = {source.name: source.failure for source in reweighting.sources}
    assert failures == {
        "red": pytest.approx(0.25),
        "four": pytest.approx(0.75),
        "half": pytest.approx(0.375 + 0.5 * mean),
        "captions": None,
    }
    assert new_weights(reweighting)["captions"] == pytest.approx(1.0)
    assert sum(new_weights(reweighting).values()) == pytest.approx(4.0, abs=1e-5)
    assert [source.kept for source in reweighting.sources][-1] == "none of its tasks was asked"


def shares_of(
    sources: Mapping[str, Any], sizes: Mapping[str, int], temperature: float | None = None
) -> dict[str, float]:
    return Group.from_dict({"sources": sources, "temperature": temperature}).shares(sizes)


def test_groups_and_temperatures(tmp_path: Path) -> None:
    meta = tmp_path / "data.yaml"
    listed = [{"path": source(tmp_path, f"m{i}", ("rec", ""))["path"], "type": f"t{i}"} for i in range(2)]
    meta.write_text(yaml.safe_dump({"META": listed}))
    inner = {
        "many": source(tmp_path, "many", *[("short_vqa", "")] * 9, weight=0.5),
        "few": source(tmp_path, "few", ("rec", ""), ("rec", "")),
        "off": None,
    }
    sources = {
        "mixed": {"weight": 0.7, "temperature": 2, "sources": inner},
        "lone": source(tmp_path, "lone", ("short_vqa", ""), weight=0.2),
        "listed": {"kind": "meta", "path": str(meta), "weight": 0.1},
        "unused": source(tmp_path, "unused", ("rec", ""), weight=0.0),
    }
    training = TrainingMixture(sources)
    reweighting = training.reweight(ANSWERS, strength=1, prior=4)
    assert [source.name for source in reweighting.sources] == ["mixed.many", "mixed.few", "lone", "listed", "unused"]
    text = reweighting.yaml([], None, {"sources": sources})
    written = yaml.safe_load(text)["sources"]
    assert written["mixed"]["sources"]["off"] is None
    assert "sources" not in written["listed"]
    sizes = {"mixed.many": 9, "mixed.few": 2, "lone": 1, "unused": 1, "listed.t0-m0": 1, "listed.t1-m1": 1}
    result = shares_of(written, sizes)
    result["listed"] = result.pop("listed.t0-m0") + result.pop("listed.t1-m1")
    wanted = {source.name: source.new_share for source in reweighting.sources if source.name != "unused"}
    assert result == pytest.approx(wanted, abs=1e-5)
    by_name = {source.name: source for source in reweighting.sources}
    growth = {name: source.new_share / source.share for name, source in by_name.items() if source.share}
    assert growth["mixed.few"] == pytest.approx(growth["listed"])
    assert growth["mixed.few"] > 1 > growth["mixed.many"]
    assert by_name["unused"].new_weight == 0


@pytest.fixture
def _conf() -> Any:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


@pytest.mark.usefixtures("_conf")
def test_train_composes_with_the_file(sample_data: Path, tmp_path: Path) -> None:
    train = ["experiment=none", "stage=finetune", "data=sample", f"data.root={sample_data}", "output_dir=x"]
    base: Any = OmegaConf.to_container(
        compose("train", overrides=[*train, "data/mixture=sample_finetune"]).data.sources, resolve=True
    )
    predictions = [*asked("short_vqa", *[1.0] * 50, topic="color"), *asked("rec", *[0.0] * 50)]
    predictions += [*asked("relation", *[0.5] * 50), *asked("ocr", *[1.0] * 50)]
    reweighting = TrainingMixture(base, at_most=300).reweight(predictions)
    file = tmp_path / "search" / "data" / "mixture" / "leaned.yaml"
    write_mixture(file, reweighting.yaml(["checkpoint: x"], "sample_finetune"), "sample_finetune")
    answer = how_to_train(file)
    assert f"hydra.searchpath=[file://{tmp_path / 'search'}]" in answer
    arguments = [f"hydra.searchpath=[file://{tmp_path / 'search'}]", "data/mixture=leaned"]
    result: Any = OmegaConf.to_container(compose("train", overrides=[*train, *arguments]).data, resolve=True)
    assert list(result["sources"]) == list(base)
    assert result["sources"]["real"] is None
    assert "val_sources" in result
    assert {k: v for k, v in result["sources"]["answers"].items() if k != "weight"} == {
        k: v for k, v in base["answers"].items() if k != "weight"
    }
    before, after = shares_of(base, {}), shares_of(result["sources"], {})
    assert after == pytest.approx({source.name: source.new_share for source in reweighting.sources}, abs=1e-5)
    assert before == pytest.approx({source.name: source.share for source in reweighting.sources})
    assert after["answers"] > before["answers"]  # it holds rec
    assert after["ocr"] < before["ocr"]
    assert (after["text"], after["chat"]) == pytest.approx((before["text"], before["chat"]), abs=1e-5)
    rows = [line.split() for line in file.read_text().splitlines() if line.startswith("#   answers ")]
    assert rows[0][-2:] == [f"{before['answers']:.1%}", f"{after['answers']:.1%}"]


def test_a_hostile_topic_stays_in_its_comment(flat: dict[str, Any]) -> None:
    topic = "x\nsources: {evil: {kind: text}}\u2028y: 1\x85z: 2 [/]"
    reweighting = TrainingMixture(flat).reweight([*ANSWERS, *asked("rec", 0, topic=topic)])
    content = yaml.safe_load(reweighting.yaml(["checkpoint: a\nb: 1"], "sample_finetune"))
    assert set(content) == {"defaults", "sources"}
    assert set(content["sources"]) == set(flat)
    assert len(reweighting.tables()) == 2


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({}, "data.sources is empty"),
        ({"a": None}, "data.sources is empty"),
        ({"a": {"kind": "instructions"}}, "data.sources.a.path is missing"),
    ],
)
def test_sources_are_needed(sources: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainingMixture(sources)


def test_a_source_must_hold_what_is_asked(flat: dict[str, Any]) -> None:
    training = TrainingMixture(flat)
    training.check({"rec", "ocr"})
    for tasks in ({"ocr"}, {"chat"}):
        with pytest.raises(UserError, match=r"hold rec, short_vqa, the test sources ask \w+: no weight can change"):
            training.check(tasks)


def test_files_that_are_not_ours_stay(tmp_path: Path) -> None:
    theirs = tmp_path / "mixture.yaml"
    theirs.write_text("# @package data\nsources: {}\n")
    texts: Sequence[tuple[Path, str]] = [
        (theirs, "evaluate.py did not write it"),
        (tmp_path / "sample_finetune.yaml", "the name of the mixture"),
        (tmp_path / "mixture", "must end in .yaml"),
    ]
    for path, message in texts:
        with pytest.raises(UserError, match=message):
            check_out(path, "sample_finetune")
    assert "sources: {}" in theirs.read_text()
