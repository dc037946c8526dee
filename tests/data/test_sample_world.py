"""The sample world: its formats, its splits and that what it says about its pictures is true."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sphinx_pl.cli.sample import main
from sphinx_pl.data.coordinates import Coordinates, iou, to_pixels
from sphinx_pl.data.readers import ImageTextReader, InstructionReader, TextReader
from sphinx_pl.data.sample_world import language
from sphinx_pl.data.sample_world.assets import HELD_OUT_PHOTOS, TRAIN_PHOTOS, Origin, load_assets
from sphinx_pl.data.sample_world.drawing import COLORS, scan_mask
from sphinx_pl.data.sample_world.records import relation_entry, relations_to_middle, scene_entries
from sphinx_pl.data.sample_world.scenes import MAX_OBJECTS, Scene, draw_scene
from sphinx_pl.data.sample_world.writer import build
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.data.tokenizers import load_tokenizer
from sphinx_pl.utils.errors import UserError
from tests.examples import NOT_IN_SAMPLE

SPLITS = ("train", "val", "test")
SCALE = 0.07


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "sample"
    build(out, seed=3, scale=SCALE)
    return out


def entries(sample: Path, split: str) -> list[dict[str, Any]]:
    files = sorted((sample / "instructions").glob(f"{split}*.json"))
    return [entry for file in files for entry in json.loads(file.read_text())]


def origins(sample: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (sample / "origins.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def scene(index: int, domain: str) -> Scene:
    assets = load_assets(train=True) if domain == "real" else None
    return draw_scene(random.Random(f"scene {index}"), domain, assets, index % MAX_OBJECTS + 1)


def test_same_seed_same_bytes_and_another_seed_other_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build(tmp_path / name, seed=seed, scale=0.01)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    for name in ("real/train-00000.tar", "text/train.jsonl", "instructions/images/test-real-rec-00000.jpg"):
        assert a[name] != c[name]


def test_second_call_keeps_whole_data_and_repairs_broken_data(tmp_path: Path) -> None:
    out = tmp_path / "sample"
    build(out, scale=0.01)
    before = contents(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    build(out, scale=0.01)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times

    (out / "text" / "val.jsonl").write_text("{}\n")
    build(out, scale=0.01)
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["sample"]  # nothing temporary is left


def test_does_not_write_over_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("three years of work")
    with pytest.raises(UserError, match="not sample data"):
        build(tmp_path)
    assert main(["--out", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert (tmp_path / "thesis.txt").read_text() == "three years of work"
    (tmp_path / "manifest.json").write_text('{"name": "a web extension", "version": 4}')
    with pytest.raises(UserError, match="not sample data"):
        build(tmp_path)
    with pytest.raises(UserError, match="not sample data"):
        build(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "three years of work"


def test_no_scan_or_photograph_is_in_training_and_held_out_pictures(sample: Path) -> None:
    used: dict[bool, tuple[set[int], set[str]]] = {True: (set(), set()), False: (set(), set())}
    for origin in origins(sample):
        scans, photos = used[origin["split"] == "train"]
        scans.update(origin["scans"])
        photos.add(origin["photo"])
        assert bool(origin["photo"]) == (origin["domain"] == "real")
    assert not used[True][0] & used[False][0]
    assert used[True][1] & used[False][1] == {""}  # the synthetic domain's
    assert len(used[True][0]) > 300
    assert len(used[False][0]) > 50
    assert not set(TRAIN_PHOTOS) & set(HELD_OUT_PHOTOS)


def test_splits_differ_in_pixels_not_only_in_name() -> None:
    train, held_out = load_assets(train=True), load_assets(train=False)
    assert len(train.scans) + len(held_out.scans) == 1797
    assert not {scan.tobytes() for scan in train.scans.values()} & {scan.tobytes() for scan in held_out.scans.values()}
    for digit in "0123456789":
        origin = Origin()
        mask = scan_mask(digit, 20, random.Random(0), train, origin)
        assert origin.scans[0] in train.by_digit[digit]
        assert mask.max() == 1


def test_every_picture_is_named_once_and_has_its_size(sample: Path) -> None:
    named = [origin["image"] for origin in origins(sample)]
    assert len(named) == len(set(named))
    shapes: Counter[bool] = Counter()
    for split in SPLITS:
        for entry in entries(sample, split):
            if "image" in entry:
                with Image.open(sample / "instructions" / entry["image"]) as image:
                    assert image.size == (entry["width"], entry["height"])
                    assert 64 <= min(image.size) <= max(image.size) <= 96
                    shapes[image.width == image.height] += 1
    assert shapes[True] > shapes[False] > 0


def test_boxes_and_keypoints_lie_inside_their_image(sample: Path) -> None:
    keypoints = 0
    for split in SPLITS:
        for entry in entries(sample, split):
            for region in entry.get("regions", ()):
                x1, y1, x2, y2 = region["box"]
                assert 0 <= x1 < x2 <= entry["width"]
                assert 0 <= y1 < y2 <= entry["height"]
                for x, y, visible in region.get("keypoints", ()):
                    assert not visible or (x1 - 2 <= x <= x2 + 2 and y1 - 2 <= y <= y2 + 2)
                    keypoints += visible > 0
    assert keypoints > 0


@pytest.mark.parametrize("domain", ["real", "synthetic"])
def test_boxes_hold_the_colour_that_they_are_said_to_hold(domain: str) -> None:
    """Measured on the decoded picture: the mean hue of the most colourful pixels in a box is nearest to its colour."""
    right, total = 0, 0
    for index in range(60):
        drawn = scene(index, domain)
        pixels = np.asarray(Image.open(io.BytesIO(drawn.jpeg)), dtype=np.float64)
        for thing in drawn.things:
            x1, y1, x2, y2 = thing.box
            part = pixels[y1:y2, x1:x2].reshape(-1, 3)
            chroma = part - part.mean(axis=1, keepdims=True)
            strongest = chroma[np.argsort(-np.linalg.norm(chroma, axis=1))[: len(part) // 4]].mean(axis=0)
            named = {name: np.subtract(rgb, np.mean(rgb)) for name, rgb in COLORS.items()}
            scores = {name: strongest @ v / np.linalg.norm(v) for name, v in named.items()}
            right += max(scores, key=lambda name: scores[name]) == thing.color
            total += 1
    assert right / total > 0.95


def test_scenes_have_distinct_phrases_and_separate_boxes() -> None:
    for index in range(100):
        things = scene(index, "synthetic").things
        assert len({thing.phrase for thing in things}) == len(things) == index % MAX_OBJECTS + 1
        assert all(iou(a.box, b.box) == 0 for a in things for b in things if a is not b)
        assert [thing.center[0] for thing in things] == sorted(thing.center[0] for thing in things)


def test_questions_of_a_scene_have_one_right_answer() -> None:
    for index in range(150):
        drawn = scene(index, "synthetic")
        phrases = {thing.phrase: thing for thing in drawn.things}
        for entry in scene_entries(drawn, random.Random(index)):
            question, answer, topic = entry.get("question", ""), entry.get("answer"), entry.get("meta", {}).get("topic")
            if topic == "color":
                kind = question.removeprefix("What color is the ").removesuffix("?")
                assert [thing.color for thing in drawn.things if thing.kind == kind] == [answer]
            elif topic == "shape":
                color = question.removeprefix("What is the ").removesuffix(" object?")
                [kind] = [thing.kind for thing in drawn.things if thing.color == color]
                assert answer == ("digit" if kind.isdigit() else kind)
            elif topic == "digit":
                color = question.removeprefix("Which digit is ").removesuffix("?")
                assert [thing.kind for thing in drawn.things if thing.color == color] == [answer]
            elif topic == "count":
                assert int(answer) == len(drawn.things)
            elif topic == "object":
                assert [choice for choice in entry["choices"] if choice in phrases] == [answer]
                # Two colours times two kinds: no choice stands out without the picture.
                assert [len({choice.split()[part] for choice in entry["choices"]}) for part in (0, 1)] == [2, 2]
            elif entry["task"] == "rec":
                assert tuple(entry["regions"][0]["box"]) == phrases[question].box
            elif entry["task"] == "detection":
                boxes = {thing.box for thing in drawn.things if thing.group == question}
                assert {tuple(region["box"]) for region in entry["regions"]} == boxes


def test_relation_is_said_only_where_it_is_clear() -> None:
    def place(x: int, y: int) -> str | None:
        return language.relation((40 + x, 40 + y), (40, 40))

    assert [place(-20, 10), place(20, -10), place(10, -20), place(0, 20)] == ["left", "right", "above", "below"]
    assert place(20, 11) is None  # too much of both
    assert place(0, 0) is None
    assert place(8, 0) is None  # too close
    assert relation_entry("blue 3", "red circle", "left")["question"] == (
        "Where is the blue 3 relative to the red circle?"
    )


def test_training_also_asks_for_one_thing_relative_to_the_middle(sample: Path) -> None:
    def asked(split: str) -> dict[bool, Counter[str]]:
        counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
        for entry in entries(sample, split):
            if entry.get("task") == "relation":
                counts[entry["question"].endswith("relative to the middle?")][entry["answer"]] += 1
        return counts

    training, held_out = asked("train"), asked("test")
    assert set(training[True]) == set(training[False]) == set(language.RELATIONS)
    assert not held_out[True]
    for drawn in (scene(index, "synthetic") for index in range(20)):
        for phrase, _, place in relations_to_middle(drawn):
            x, y = next(thing.center for thing in drawn.things if thing.phrase == phrase)
            dx, dy = x - drawn.width / 2, y - drawn.height / 2
            assert place == (("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below"))


def test_captions_are_as_noisy_as_said() -> None:
    drawn = [scene(index, "synthetic") for index in range(600)]
    noise: Counter[str] = Counter()
    for index, one in enumerate(drawn):
        caption, kind = language.real_caption(one, random.Random(index))
        noise[kind] += 1
        named = [thing.phrase for thing in one.things if thing.phrase in caption.lower()]
        if kind == "wrong":
            assert not named
        elif kind == "partial":
            assert len(named) < len(one.things)
        else:
            assert len(named) == len(one.things)
        clean = language.synthetic_caption(one, random.Random(index))
        assert all(thing.phrase in clean for thing in one.things)
    # 15 % each; three standard deviations of 600 draws are 4.4 %.
    assert abs(noise["wrong"] / 600 - 0.15) < 0.045
    assert abs(noise["partial"] / 600 - 0.15) < 0.045


def test_shards_are_read_by_webdataset_and_by_our_source(sample: Path) -> None:
    import webdataset

    shard = sample / "real" / "train-00000.tar"
    pairs = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode("pil"))
    assert len(pairs) == round(3000 * SCALE)
    for pair in pairs:
        meta = pair["json"]
        assert pair["jpg"].size == (meta["width"], meta["height"])
        assert meta["key"] == pair["__key__"]
        assert meta["status"] == "success"
        assert pair["txt"] == meta["caption"]
    with tarfile.open(shard) as tar:
        assert {(member.mtime, member.uid) for member in tar} == {(0, 0)}

    source = ImageTextReader("pairs", str(sample / "real" / "train-*.tar"))
    assert [source.record(i).answer for i in range(len(source))] == [pair["txt"].strip() for pair in pairs]


def test_all_tasks_write_their_text_from_the_sample(sample: Path) -> None:
    coordinates = Coordinates(2)
    expected = set(TASKS) - NOT_IN_SAMPLE - {"caption", "text"}
    for split in SPLITS:
        source = InstructionReader("sample", str(sample / "instructions" / f"{split}*.json"))
        records = [source.record(i) for i in range(len(source))]
        assert not source.skipped
        assert {record.task for record in records} == expected
        for record in records:
            turns = TASKS[record.task].turns(record, coordinates)
            assert all(turn.answer for turn in turns)
            if record.task == "rec":
                box = to_pixels(coordinates.parse_boxes(turns[0].answer)[0], record.sizes[0])
                assert iou(box, record.regions[0].box) > 0.85


def test_llava_form_has_no_keys_of_ours(sample: Path) -> None:
    plain = [entry for entry in entries(sample, "train") if "conversations" in entry]
    assert plain
    for entry in plain:
        assert set(entry) == {"id", "image", "conversations", "width", "height", "meta"}
        assert entry["conversations"][0]["value"].startswith("<image>\n")


def test_answers_of_the_test_are_balanced(sample: Path) -> None:
    answers: dict[str, Counter[str]] = {"count": Counter(), "relation": Counter()}
    for entry in entries(sample, "test"):
        if entry["meta"].get("topic") == "count":
            answers["count"][entry["answer"]] += 1
        elif entry.get("task") == "relation":
            answers["relation"][entry["answer"]] += 1
    assert set(answers["count"]) == {"1", "2", "3"}
    assert set(answers["relation"]) == {"left", "right", "above", "below"}
    for counted in answers.values():
        assert max(counted.values()) - min(counted.values()) <= 2


def test_test_chats_ask_only_for_facts_that_the_corpus_states_and_no_training_chat_asks(tmp_path: Path) -> None:
    train, val, test = language.split_facts(random.Random(0))
    asked = [{fact.question for fact in facts} for facts in (train, val, test)]
    assert not asked[0] & asked[1]
    assert not asked[2] & (asked[0] | asked[1])
    assert {fact.family for fact in test} == {fact.family for fact in train}
    assert len(test) > 90

    rng = random.Random(0)
    names = language.facts()
    corpus = " ".join(language.document(rng, names) for _ in range(4000)).lower()
    stated = [any(statement.lower() in corpus for statement in fact.statements) for fact in test]
    assert all(stated)
    assert not any(fact.question in corpus for fact in test)
    facts = {fact.question: fact.answer for fact in names}
    assert facts["What comes after 41?"] == "42"
    assert facts["What comes before March?"] == "February"
    assert facts["What is 7 plus 8?"] == "15"
    assert facts["What is the opposite of cold?"] == "hot"


def test_documents_are_short_and_held_out(sample: Path) -> None:
    texts = {}
    for split in ("train", "val"):
        source = TextReader("text", str(sample / "text" / f"{split}.jsonl"))
        texts[split] = [source.record(i).answer for i in range(len(source))]
        assert max(len(text.split()) for text in texts[split]) <= 60
    assert not set(texts["train"]) & set(texts["val"])


def test_tokenizer_follows_llama_and_keeps_turns_and_boxes_short(sample: Path) -> None:
    tokenizer = load_tokenizer(sample / "tokenizer.model")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (512, 1, 2)
    answer = "<p>red circle</p>[0.12,0.34,0.56,0.78;0.11,0.22,1.00,0.44]"
    text = f"### Human: Ünïcode 漢 stays,  two spaces too?\n### Assistant: {answer}\n###"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("\n###")) == 2  # the dummy prefix, then one piece
    before = len(tokenizer.encode("a"))
    assert len(tokenizer.encode("a [0.12,0.34,0.56,0.78]")) - before == 13
    assert len(tokenizer.encode("a <p>red circle</p>[0.12,0.34,0.56,0.78]")) - before == 16
    numbers = tokenizer.encode("42 41")
    assert len(numbers) == 6  # each digit is a piece: "_", 4, 2, "_", 4, 1
    assert numbers[1] == numbers[4]
