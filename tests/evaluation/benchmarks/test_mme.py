"""Structure: the release's folders and the lines of `calculation.py` in its eval_tool."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.evaluation.benchmarks.mme import COGNITION, PERCEPTION, SUBTASKS, MMEBenchmark
from sphinx_pl.utils.errors import UserError
from tests.evaluation.official import mme_scores

from .conftest import Ask, Say

Write = Callable[..., Path]


def pair(what: str = "cat") -> str:
    return (
        f"Is there a {what} in the image? Please answer yes or no.\tYes\n"
        f"Is there a lamp beside the {what}? Please answer yes or no.\tNo\n"
    )


def release(images: int = 2) -> dict[str, str | bytes]:
    """All subtasks, those of odd places with folders of their own for images and questions."""
    files: dict[str, str | bytes] = {}
    for place, subtask in enumerate(SUBTASKS):
        for number in range(images):
            text, image = ("questions_answers_YN/", "images/") if place % 2 else ("", "")
            files[f"{subtask}/{text}{number}.txt"] = pair(f"thing {number}")
            files[f"{subtask}/{image}{number}.{'png' if number else 'jpg'}"] = b"image"
    return files


def right(record: Record) -> str:
    return record.answer.capitalize() + "."


def test_both_layouts_are_read_and_asked_in_the_training_wording(ask: Ask, write: Write, question: Say) -> None:
    src = write(release())
    asked = ask(MMEBenchmark(src), right)
    assert len(asked.predictions) == 2 * 2 * 14
    by_key = {record.key: record for record in asked.questions.records}
    flat, split = by_key["it/existence/0-0"], by_key["it/count/1-1"]
    assert flat.images == (ImageRef(str(src / "existence/0.jpg")),)
    assert split.images == (ImageRef(str(src / "count/images/1.png")),)
    assert question(flat) == ("Is there a thing 0 in the image?\nAnswer the question using a single word or phrase.")
    assert (flat.answer, split.answer) == ("yes", "no")


def test_all_right_all_wrong_and_always_yes(ask: Ask, write: Write) -> None:
    src = write(release())
    perfect = ask(MMEBenchmark(src), right)
    assert perfect.values["perception", ""] == 2000
    assert perfect.values["cognition", ""] == 800
    assert perfect.values["accuracy+", ""] == 1
    assert perfect.values["points", "OCR"] == 200
    assert {v["percent"] for v in perfect.result["values"] if v["measure"] in ("perception", "points")} == {False}
    wrong = ask(MMEBenchmark(src), lambda record: "no" if record.answer == "yes" else "yes")
    assert wrong.values["perception", ""] == wrong.values["accuracy", ""] == 0
    # Half of the questions, and no image with both.
    yes = ask(MMEBenchmark(src), lambda record: "Yes, it is.")
    assert (yes.values["perception", ""], yes.values["cognition", ""]) == (500, 200)
    assert (yes.values["accuracy", "scene"], yes.values["accuracy+", "scene"]) == (0.5, 0)


def test_what_says_neither_is_wrong_and_counted(ask: Ask, write: Write) -> None:
    src = write(release())
    asked = ask(MMEBenchmark(src), lambda record: "I cannot tell" if "OCR" in record.key else right(record))
    assert asked.result["unparsed"] == 4
    assert asked.values["points", "OCR"] == 0
    assert asked.values["perception", ""] == 1800


def test_sums_agree_with_the_official_ones(ask: Ask, write: Write) -> None:
    src = write(release(images=5))

    def say(record: Record) -> str:
        return "yes" if zlib.crc32(record.key.encode()) % 3 else "no"

    asked = ask(MMEBenchmark(src), say)
    expected = mme_scores(
        (prediction.topic, prediction.key.rpartition("-")[0], prediction.score == 1) for prediction in asked.predictions
    )
    assert asked.values["perception", ""] == pytest.approx(expected.perception)
    assert asked.values["cognition", ""] == pytest.approx(expected.cognition)
    for subtask in PERCEPTION + COGNITION:
        assert asked.values["points", subtask] == pytest.approx(expected.points(subtask))
        assert asked.values["accuracy+", subtask] == pytest.approx(expected.accuracy_plus[subtask])


def test_a_limit_keeps_an_images_questions_together(ask: Ask, write: Write) -> None:
    asked = ask(MMEBenchmark(write(release(images=4))), right, limit=1)
    assert len(asked.predictions) == 2 * 14
    assert asked.values["perception", ""] == 2000


def test_sums_of_some_subtasks_are_not_given(ask: Ask, write: Write) -> None:
    files = {place: content for place, content in release().items() if not place.startswith(("OCR", "code"))}
    asked = ask(MMEBenchmark(write(files)), right)
    assert asked.values["perception", ""] is None
    assert asked.values["cognition", ""] is None
    assert asked.values["points", "scene"] == 200


def test_odd_entries_are_counted(ask: Ask, write: Write) -> None:
    odd: dict[str, str | bytes] = {
        "existence/a.txt": pair() + "Is it? Please answer yes or no.\tYes\n",
        "existence/a.jpg": b"",
        "existence/b.txt": "Is it?\tYes\nIs it not?\tMaybe\n",
        "existence/b.jpg": b"",
        "existence/c.txt": pair(),
        "existence/d.txt": "no tab\nnone here\n",
        "existence/d.jpg": b"",
        "existence/e.txt": b"\xff\xfe\tYes\n\xff\tNo\n",
        "existence/e.jpg": b"",
        "existence/f.txt": b"",
        "existence/f.jpg": b"",
    }
    asked = ask(MMEBenchmark(write(release() | odd)), right)
    assert asked.result["lost"] == {
        "questions_count": 2,
        "answer_not_yes_no": 1,
        "image_missing": 1,
        "entry_malformed": 2,
    }
    assert asked.values["perception", ""] == 2000


@pytest.mark.parametrize(
    "folder", ["MME_Benchmark_release_version", "MME_Benchmark_release_version/MME_Benchmark", "MME_Benchmark"]
)
def test_the_archive_as_it_unpacks(ask: Ask, write: Write, folder: str) -> None:
    src = write({f"{folder}/{place}": content for place, content in release().items()})
    asked = ask(MMEBenchmark(src), right)
    assert (asked.values["perception", ""], len(asked.predictions)) == (2000, 56)
    assert asked.questions.records[0].images == (ImageRef(str(src / folder / "existence/0.jpg")),)


def test_the_eval_tool_beside_the_archives_images(ask: Ask, write: Write) -> None:
    images = {place: content for place, content in release().items() if not place.endswith(".txt")}
    files = {f"MME_Benchmark_release_version/{place}": content for place, content in images.items()}
    for subtask in SUBTASKS:
        lines = [f"{name}\t{line}" for name in ("0.jpg", "1.png") for line in pair(name).splitlines()]
        files[f"eval_tool/Your_Results/{subtask}.txt"] = "\n".join(lines)
    asked = ask(MMEBenchmark(write(files)), right)
    assert (asked.values["cognition", ""], len(asked.predictions)) == (800, 56)


def test_the_eval_tools_files(ask: Ask, write: Write) -> None:
    files: dict[str, str | bytes] = {}
    for subtask in SUBTASKS:
        lines = [f"{n}.png\t{line}" for n in (0, 1) for line in pair(str(n)).splitlines()]
        files[f"{subtask}.txt"] = "\n".join(lines)
        files |= {f"images/{subtask}/{n}.png": b"" for n in (0, 1)}
    src = write(files)
    asked = ask(MMEBenchmark(src, images=src / "images"), right)
    assert (asked.values["perception", ""], len(asked.predictions)) == (2000, 56)
    assert asked.questions.records[0].images == (ImageRef(str(src / "images/existence/0.png")),)


def test_the_unified_annotation(ask: Ask, write: Write) -> None:
    entries = [
        {"image_path": f"MME/{subtask}/0.jpg", "question": text, "question_id": n, "gt_answers": answer}
        for n, (text, answer) in enumerate((("Is it? Please answer yes or no.", "Yes"), ("Is it not?", "No")))
        for subtask in SUBTASKS
    ]
    src = write({"mme.json": [*entries, {"image_path": "x/y.jpg", "question": "?", "gt_answers": "Yes"}]})
    asked = ask(MMEBenchmark(src / "mme.json"), right)
    assert (asked.values["perception", ""], asked.values["cognition", ""]) == (2000, 800)
    assert asked.result["lost"] == {"subtask_unknown": 1}


def test_the_files_for_the_official_script(ask: Ask, write: Write, tmp_path: Path) -> None:
    benchmark = MMEBenchmark(write(release()))
    asked = ask(benchmark, lambda record: "Yes,\tcertainly\nso")
    (sentence,) = benchmark.submit(asked.predictions, tmp_path)
    assert "calculation.py" in sentence
    lines = (tmp_path / "mme" / "count.txt").read_text().splitlines()
    # As the script takes a line apart, two of an image after each other.
    name, asked_for, truth, answer = lines[0].split("\t")
    assert (name, truth, answer) == ("0.jpg", "Yes", "Yes, certainly so")
    assert asked_for == "Is there a thing 0 in the image? Please answer yes or no."
    assert [line.split("\t")[0] for line in lines] == ["0.jpg", "0.jpg", "1.png", "1.png"]
    assert len(list((tmp_path / "mme").iterdir())) == 14


def test_a_folder_without_questions(write: Write) -> None:
    with pytest.raises(UserError, match="has no folder of questions, such as existence"):
        list(MMEBenchmark(write({"other.txt": "x"})).read())
