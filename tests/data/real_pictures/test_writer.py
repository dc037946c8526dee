"""Data of real pictures: splits, repetitions, tasks, and what is skipped."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sphinx_pl.cli.data import main
from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.readers import ImageTextReader, InstructionReader, TextReader
from sphinx_pl.data.real_pictures.names import singular
from sphinx_pl.data.real_pictures.pictures import DOMAINS, split_of
from sphinx_pl.data.real_pictures.writer import REPORT, build
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.utils.errors import UserError

SCALE = 0.02
TRAINING = ("train-objects", "train-scenes", "train-words", "train-chat")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, given: dict[str, str]) -> Path:
    out = tmp_path_factory.mktemp("data") / "real"
    build(out, scale=SCALE, given=given)
    return out


def counts(real: Path) -> dict[str, int]:
    manifest: dict[str, Any] = json.loads((real / "manifest.json").read_text())
    return dict(manifest["counts"])


def entries(real: Path, name: str) -> list[dict[str, Any]]:
    return list(json.loads((real / f"instructions/{name}.json").read_text()))


def test_the_same_packages_give_the_same_bytes(tmp_path: Path, real: Path, given: dict[str, str]) -> None:
    again, other = (build(tmp_path / name, seed, SCALE, given) for name, seed in (("again", 0), ("other", 1)))
    manifest = json.loads((real / "manifest.json").read_text())
    assert again == manifest
    assert other["counts"].keys() == manifest["counts"].keys()
    assert other["files"] != manifest["files"]
    # The splits do not depend on the seed.
    assert other["files"]["photographs/train-00000.tar"] == manifest["files"]["photographs/train-00000.tar"]


def test_the_projects_readers_and_tasks_read_everything(real: Path) -> None:
    for folder in ("photographs", "clip_art"):
        for split in ("train", "val"):
            reader = ImageTextReader(folder, str(real / f"{folder}/{split}-*.tar"))
            assert all(reader.record(index).answer for index in range(len(reader)))
    for split in ("train", "val"):
        texts = TextReader("text", str(real / f"text/{split}.jsonl"))
        assert len(texts) == counts(real)[f"text/{split}"] > 0
    tasks: set[str] = set()
    for name in (*TRAINING, "val", "test", "questions"):
        instructions = InstructionReader(name, str(real / f"instructions/{name}.json"))
        for index in range(len(instructions)):
            record = instructions.record(index)
            tasks.add(record.task)
            assert TASKS[record.task].turns(record, Coordinates(2))
            for image, size in zip(record.images, record.sizes, strict=True):
                assert Image.open(image.path).size == size
    assert tasks == {"caption", "short_vqa", "multiple_choice", "yes_no", "rec", "reg", "ocr_text", "chat"}


def test_no_object_is_in_two_splits_or_packages_of_two_splits(real: Path) -> None:
    names: dict[str, set[str]] = {}
    for name in ("train-objects", "train-scenes", "val", "test"):
        for entry in entries(real, name):
            words = [entry["answer"]] if entry.get("meta", {}).get("topic") == "name" else []
            words += [region["label"] for region in entry.get("regions", []) if entry["task"] in ("rec", "reg")]
            if "known" not in entry["meta"]["domain"]:
                names.setdefault(name.split("-")[0], set()).update(singular(word.split()[-1]) for word in words)
    assert all(split_of(noun) == split for split, nouns in names.items() for noun in nouns)
    assert not names["train"] & names["test"]
    assert not names["train"] & names["val"]
    for domain, folder in zip(DOMAINS, ("photographs", "clip_art"), strict=True):
        reader = ImageTextReader(domain, str(real / f"{folder}/train-*.tar"))
        captions = {reader.record(index).answer for index in range(len(reader))}
        assert not any(noun in caption for caption in captions for noun in names["test"] | names["val"])


def test_wrong_choices_and_absent_objects_are_of_the_same_split(real: Path) -> None:
    for name, splits in (("train-objects", {"train"}), ("val", {"val"}), ("test", {"test"})):
        for entry in entries(real, name):
            if entry["task"] == "multiple_choice" and "known" not in entry["meta"]["domain"]:
                assert {split_of(singular(choice.split()[-1])) for choice in entry["choices"]} == splits
    answers = Counter(entry["answer"] for entry in entries(real, "train-objects") if entry["task"] == "yes_no")
    assert answers["yes"] == answers["no"] > 0


def test_duplicates_and_unusable_pictures_are_counted(real: Path) -> None:
    skipped = {name: count for name, count in counts(real).items() if name.startswith("skipped/")}
    stamps, drawings = "skipped/tuxpaint-stamps-default", "skipped/openclipart-png"
    assert skipped[f"{drawings}/duplicate"] == 1  # the mole of both packages
    assert skipped[f"{stamps}/picture_unreadable"] == 1
    assert skipped[f"{stamps}/description_missing"] == 1
    assert skipped[f"{stamps}/picture_too_small"] == 1
    assert skipped[f"{stamps}/name_not_printable"] == 1
    assert skipped[f"{stamps}/no_object"] == 1
    assert skipped[f"{drawings}/annotation_missing"] == 1
    assert skipped[f"{drawings}/title_no_name"] == 1
    assert skipped[f"{drawings}/annotation_unreadable"] == 1  # entities are not expanded
    assert counts(real)["objects/in both packages"] > 20


def test_captions_are_the_packages_words_and_those_of_titles(real: Path) -> None:
    photographs = ImageTextReader("p", str(real / "photographs/train-*.tar"))
    assert all(" big " in photographs.record(index).answer for index in range(len(photographs)))
    drawings = ImageTextReader("c", str(real / "clip_art/train-*.tar"))
    captions = {drawings.record(index).answer for index in range(len(drawings))}
    assert any(caption.endswith("(zoo).") for caption in captions)
    assert all(caption.startswith("A drawing of ") for caption in captions)


def test_counted_copies_and_boxes_are_in_the_scene(real: Path) -> None:
    copies = Counter(e["answer"] for e in entries(real, "train-scenes") if e["meta"].get("topic") == "count")
    assert set(copies) == {"1", "2", "3", "4"}
    for entry in entries(real, "train-scenes"):
        for region in entry.get("regions", []):
            x1, y1, x2, y2 = region["box"]
            assert 0 <= x1 < x2 <= entry["width"]
            assert 0 <= y1 < y2 <= entry["height"]


def test_the_report_names_packages_licences_and_counts(real: Path) -> None:
    text = (real / REPORT).read_text()
    assert "| tuxpaint-stamps-default | stamps | GPL-2 |" in text
    assert "| skipped/openclipart-png/duplicate | 1 |" in text


def test_the_command_prints_the_report_and_names_mistakes(
    tmp_path: Path, given: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--package={name}={place}" for name, place in given.items()]
    assert main(["real", f"--out={tmp_path / 'out'}", "--scale=0.01", *options]) == 0
    assert "| what | number |" in capsys.readouterr().out
    assert main(["real", "--scale=0"]) == 2
    assert "--scale=0.0 must be positive" in capsys.readouterr().err
    assert main(["real", "--package=wamerican"]) == 2
    assert "NAME=PLACE" in capsys.readouterr().err


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path, given: dict[str, str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not data of `sphinx-data real`"):
        build(tmp_path, scale=SCALE, given=given)
