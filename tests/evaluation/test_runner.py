"""Selection, shuffling, intervals and summaries; the constant baseline on a set whose best constant is known."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.schema import ImageRef, Record, Region
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.evaluation.baselines import constant_predictions, fit_constants, mean_geometry
from sphinx_pl.evaluation.metrics import bootstrap
from sphinx_pl.evaluation.report.summary import summarise
from sphinx_pl.evaluation.runner import Prediction, derangement, evaluate, score_answer, select, shuffle_images
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from tests.examples import EXAMPLES

GEOMETRY = Coordinates(decimals=2)


def question(key: str, answer: str, image: str = "a.png", **meta: str) -> Record:
    images = (ImageRef(image),)
    return Record(key, "short_vqa", images, ((10, 10),), question="How many?", answer=answer, meta=meta)


def test_bootstrap_agrees_with_scipy() -> None:
    scores = np.random.default_rng(1).beta(2, 1, size=60)
    expected = scipy.stats.bootstrap((scores,), np.mean, n_resamples=20000, method="percentile", rng=2)
    low, high = bootstrap(scores.tolist(), resamples=20000)
    assert low == pytest.approx(expected.confidence_interval.low, abs=3e-3)
    assert high == pytest.approx(expected.confidence_interval.high, abs=3e-3)


def test_bootstrap_of_a_proportion_is_the_binomial_interval() -> None:
    # The resampled mean of 400 zeros and ones, 300 of them ones, is Binomial(400, 0.75) / 400.
    low, high = bootstrap([1.0] * 300 + [0.0] * 100, resamples=20000)
    exact = scipy.stats.binom(400, 0.75).ppf([0.025, 0.975]) / 400
    assert (low, high) == pytest.approx(tuple(exact), abs=1 / 400)


def test_bootstrap_without_spread_is_no_point_and_the_seed_decides() -> None:
    low, high = bootstrap([0.3] * 5)
    assert low < 0.3 < high
    assert bootstrap([1.0]) == pytest.approx((0.025, 1.0))  # all right: Clopper and Pearson
    scores = [0.0, 1.0] * 10 + [0.37]
    assert bootstrap(scores, seed=4) == bootstrap(scores, seed=4)


@pytest.mark.parametrize("count", [2, 3, 17])
def test_derangement_moves_everything(count: int) -> None:
    order = derangement(count, random.Random(count))
    assert sorted(order) == list(range(count))
    assert all(place != moved for place, moved in enumerate(order))


def test_shuffled_images_come_from_another_image_of_the_same_task() -> None:
    # Two questions share a.png: neither may see it, and both see the same one instead.
    vqa = [
        question("0", "1", "a.png"),
        question("1", "2", "a.png"),
        question("2", "3", "b.png"),
        question("3", "1", "c.png"),
    ]
    chat = Record("4", "chat", question="Hello?", answer="hello")
    rec = Record("5", "rec", (ImageRef("d.png"),), ((10, 10),), question="it", regions=(Region((0, 0, 5, 5), "it"),))
    items = shuffle_images([*vqa, chat, rec], seed=3)
    assert {ref.path for record in vqa for ref in items[record.key]} == {"a.png", "b.png", "c.png"}
    assert all(items[record.key] != record.images for record in vqa)
    assert items["0"] == items["1"]
    assert set(items) == {"0", "1", "2", "3"}  # without an image, or alone in its task, there is nothing to shuffle
    assert items == shuffle_images([*vqa, chat, rec], seed=3)


def test_select_limits_each_group_and_leaves_out_what_has_no_score() -> None:
    records = [question(str(i), "1", topic="count" if i % 3 else "colour", domain="real") for i in range(12)]
    records.append(Record("text", "text", answer="A document."))
    chosen = select(records, 3)
    assert [sum(r.meta["topic"] == topic for r in chosen) for topic in ("count", "colour")] == [3, 3]
    assert [int(r.key) for r in chosen] == sorted(int(r.key) for r in chosen)
    assert len(select(records, None)) == 12
    # A cycle of answers goes through every group: the same places of each would have the same answer.
    groups = [question(f"{topic}{i}", str(i % 4), topic=topic) for topic in "abcdef" for i in range(100)]
    assert len({tuple(int(r.key[1:]) for r in select(groups, 4) if r.meta["topic"] == topic) for topic in "abcdef"}) > 1


def test_summary_worked_by_hand() -> None:
    records = [
        question("0", "red", topic="colour", domain="real"),
        question("1", "blue", topic="colour", domain="synthetic"),
        question("2", "3", topic="count", domain="real"),
    ]
    predictions = [
        score_answer(record, text, GEOMETRY) for record, text in zip(records, ["red", "red", "3"], strict=True)
    ]
    constant = [score_answer(record, "red", GEOMETRY) for record in records[:2]]
    shuffled = [score_answer(record, "3", GEOMETRY) for record in records]
    rows = summarise(predictions, {"constant": constant, "shuffled": shuffled})
    assert [(row.topic, row.domain, row.score, row.n) for row in rows] == [
        ("", "", pytest.approx(2 / 3), 3),
        ("colour", "real", 1, 1),
        ("colour", "synthetic", 0, 1),
        ("count", "real", 1, 1),
    ]
    # Of all: constant 1 of the 2 it answered, shuffled 1 of 3; of the count question only the shuffled one exists.
    assert [(row.baseline_kind, row.baseline) for row in rows] == [
        ("constant", 0.5),
        ("constant", 1),
        ("constant", 0),
        ("shuffled", 1),
    ]
    assert [row.above for row in rows] == [False, False, False, False]
    assert summarise(predictions)[0].baseline is None


def test_above_means_the_whole_interval() -> None:
    records = [question(str(i), "red") for i in range(20)]
    right = [score_answer(record, "red", GEOMETRY) for record in records]
    half = [score_answer(record, "red" if i % 2 else "blue", GEOMETRY) for i, record in enumerate(records)]
    wrong = [score_answer(record, "blue", GEOMETRY) for record in records]
    assert summarise(right, {"constant": half})[0].above
    assert summarise(half, {"constant": wrong})[0].above
    assert not summarise(half, {"constant": half})[0].above


def test_unparsed_answers_are_counted() -> None:
    record = Record("0", "rec", (ImageRef("a"),), ((10, 10),), question="it", regions=(Region((0, 0, 5, 5), "it"),))
    predictions = [score_answer(record, text, GEOMETRY) for text in ("[0,0,0.5,0.5]", "over there")]
    row = summarise(predictions)[0]
    assert (row.score, row.n, row.unparsed) == (0.5, 2, 1)


def test_constants_are_the_best_of_each_topic() -> None:
    records = [question(f"c{i}", answer, topic="count") for i, answer in enumerate("1222")]
    records += [question(f"d{i}", answer, topic="colour") for i, answer in enumerate(["red", "red", "red", "blue"])]
    constants = fit_constants(records, GEOMETRY)
    assert constants["short_vqa", "count"] == "2"
    assert constants["short_vqa", "colour"] == "red"
    assert constants["short_vqa", ""] in ("2", "red")  # 3 of 8 each
    tests = [
        question("t0", "2", topic="count"),
        question("t1", "blue", topic="colour"),
        question("t2", "2", topic="new"),
    ]
    asked = [score_answer(record, "", GEOMETRY) for record in tests]
    answered = constant_predictions(asked, {r.key: r for r in tests}, constants, GEOMETRY)
    assert [(p.prediction, p.score) for p in answered[:2]] == [("2", 1), ("red", 0)]
    assert answered[2].prediction == constants["short_vqa", ""]  # a topic that training lacks
    assert constant_predictions(asked, {r.key: r for r in tests}, {}, GEOMETRY) == []


def test_a_topic_that_names_the_answer_is_no_help_to_guessing() -> None:
    records = [question(f"{answer}{i}", answer, topic=answer) for answer in ("left", "right") for i in range(4)]
    constants = fit_constants([*records, question("9", "left", topic="left")], GEOMETRY)
    assert constants == {("short_vqa", ""): "left"}


def test_the_best_constant_is_not_always_the_most_frequent_answer() -> None:
    # Token F1: "a dot" is most frequent (3 of 7), but "a red cube" shares two or three words with the other four.
    answers = ["a dot"] * 3 + ["a red cube", "a blue cube", "a green cube", "the old cube is red"]
    records = [Record(str(i), "caption", (ImageRef("a"),), answer=answer) for i, answer in enumerate(answers)]
    # "a red cube": .4 * 3 + 1 + 2/3 + 2/3 + .5 = 4.033; "a dot": 3 + .4 * 3 + 0 = 4.2. One dot fewer turns it round:
    # 3.633 against 3.2.
    assert fit_constants(records, GEOMETRY)["caption", ""] == "a dot"
    assert fit_constants(records[1:], GEOMETRY)["caption", ""] == "a red cube"


def test_mean_boxes_beat_every_single_one() -> None:
    # Columns 0-70 and 30-100 of 100 overlap by 40 / 100; each reaches their mean, 15-85, with 55 / 85.
    def rec(key: str, left: float) -> Record:
        regions = (Region((left, 0, left + 70, 100), "it"),)
        return Record(key, "rec", (ImageRef("a"),), ((100, 100),), question="it", regions=regions)

    records = [rec("0", 0), rec("1", 30)]
    assert fit_constants(records, GEOMETRY)["rec", ""] == "[0.15,0.00,0.85,1.00]"


def test_mean_of_grounded_answers() -> None:
    answers = [
        "<p>title</p>[0,0,1,0.2]<p>figure</p>[0,0.5,1,1]",
        "<p>title</p>[0,0.2,1,0.4]",
        "<p>title</p>[0,0.1,1,0.3]",
    ]
    assert mean_geometry(answers, GEOMETRY) == "<p>title</p>[0.00,0.10,1.00,0.30]"  # "figure": 1 of 3
    assert mean_geometry(["<p>nose</p>[0.2,0.4]", "<p>nose</p>[0.4,0.4]"], GEOMETRY) == "<p>nose</p>[0.30,0.40]"
    assert mean_geometry(["red", "blue"], GEOMETRY) == ""


def test_every_task_is_asked_guessed_and_summed_up() -> None:
    records = [dataclasses.replace(record, key=f"{task}{i}") for task, record in EXAMPLES.items() for i in range(2)]
    constants = fit_constants(records, GEOMETRY)
    # All records of a task are the same here, so whoever guesses is right.
    assert {task for task, _ in constants} == set(TASKS) - {"text"}
    asked = select(records, 1)
    assert [record.task for record in asked] == [task for task in TASKS if task != "text"]
    answers = [score_answer(record, "", GEOMETRY) for record in asked]
    guessed = constant_predictions(answers, {record.key: record for record in records}, constants, GEOMETRY)
    assert [prediction.score for prediction in guessed] == [1] * len(asked)
    rows = summarise(answers, {"constant": guessed})
    assert [(row.task, row.score, row.baseline) for row in rows] == [(record.task, 0, 1) for record in asked]


def test_an_image_of_another_shape_than_its_boxes_are_about_is_not_asked(
    processor: Processor, model_config: SphinxConfig, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (20, 10)).save(path)
    fits = dataclasses.replace(EXAMPLES["rec"], key="fits", images=(ImageRef(str(path)),))
    swapped = dataclasses.replace(fits, key="swapped", sizes=((50, 100),))
    skipped: dict[str, int] = {}
    model = Sphinx(model_config)
    result = evaluate(model, processor, [fits, swapped], max_new_tokens=1, skipped=skipped, progress=False)
    assert [prediction.key for prediction in result] == ["fits"]
    assert skipped == {"size_mismatch": 1}
    repeat = Prediction.from_dict(json.loads(json.dumps(result[0].to_dict())))
    assert repeat.images[0].annotated == result[0].images[0].annotated == (100, 50)
    # Another record's image has nothing to do with these boxes.
    other = evaluate(
        model, processor, [swapped], max_new_tokens=1, images={"swapped": (ImageRef(str(path)),)}, progress=False
    )
    assert [prediction.key for prediction in other] == ["swapped"]
