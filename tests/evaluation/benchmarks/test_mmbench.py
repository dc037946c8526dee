"""Structure: the tables of https://github.com/open-compass/MMBench, as its README and LLaVA's script read them."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from PIL import Image

from sphinx_pl.data.images import load_image
from sphinx_pl.data.schema import Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.evaluation.benchmarks.mmbench import COLUMNS, CCBenchBenchmark, MMBenchBenchmark
from sphinx_pl.evaluation.scorers.choices import circular
from sphinx_pl.utils.errors import UserError

from .conftest import Ask, Say

Write = Callable[..., Path]
FIELDS = (
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "image",
    "source",
    "l2-category",
    "split",
)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPHINX_CACHE", str(tmp_path / "cache"))


def picture(shade: int) -> str:
    file = io.BytesIO()
    Image.new("RGB", (9, 6), (shade, 0, 0)).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def row(index: int, answer: str = "A", choices: str = "red green blue", **more: Any) -> dict[str, Any]:
    result = dict(zip("ABCD", choices.split(), strict=False))
    return {
        "index": index,
        "question": "Which colour\nis it?",
        "answer": answer,
        "category": "image_style",
        "l2-category": "coarse_perception",
        "image": picture(index % 1_000_000),
        "split": "dev",
    } | (result | more)


def rotations(index: int, choices: str = "red green blue", answer: str = "A", **more: Any) -> list[dict[str, Any]]:
    """All rows of a question, as the released tables have them."""
    names, letters = choices.split(), "ABCD"
    rows = []
    for turn in range(len(names)):
        moved = names[turn:] + names[:turn]
        letter = letters[moved.index(names[letters.index(answer)])]
        rows.append(row(index + turn * 1_000_000, letter, " ".join(moved), **more))
    return rows


def table(rows: list[dict[str, Any]], fields: tuple[str, ...] = FIELDS) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, fields, delimiter="\t", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def dev(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"mmbench_dev_en_20231003.tsv": table(list(rows))}


def right(record: Record) -> str:
    return str(record.meta["letter"])


def test_a_question_in_rotations_of_the_file(ask: Ask, write: Write, question: Say) -> None:
    src = write(dev(*rotations(241, hint="Look at it.")))
    asked = ask(MMBenchBenchmark(src), right)
    records = asked.questions.records
    assert [(record.key, record.choices) for record in records] == [
        ("it/241-241", ("red", "green", "blue")),
        ("it/241-1000241", ("green", "blue", "red")),
        ("it/241-2000241", ("blue", "red", "green")),
    ]
    assert question(records[1]) == (
        "Look at it.\nWhich colour\nis it?\nA. green\nB. blue\nC. red\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert asked.values == {("circular", ""): 1, ("accuracy", ""): 1}
    # The image is what the table holds, stored once for all rotations.
    assert len({record.images for record in records}) == 1
    assert load_image(records[0].images[0], 9)[0, 4, 4] == 241


def test_rotations_are_made_where_the_file_has_none(ask: Ask, write: Write) -> None:
    made = ask(MMBenchBenchmark(write(dev(row(7, "C")))), right)
    given = ask(MMBenchBenchmark(write(dev(*rotations(7, answer="C")))), right)
    assert [(r.choices, r.meta, r.turns) for r in made.questions.records] == [
        (r.choices, r.meta, r.turns) for r in given.questions.records
    ]


def test_one_wrong_rotation_makes_a_question_wrong(ask: Ask, write: Write) -> None:
    rows = [*rotations(1), *rotations(2, "red green", answer="B", **{"l2-category": "logic_reasoning"}), *rotations(3)]
    src = write(dev(*rows))

    # To question 1 always "A", which is right once; one of question 3's rotations gets no answer.
    def say(record: Record) -> str:
        index = record.meta["question_id"]
        if index % 1_000_000 == 1:
            return "A"
        return "I do not know" if index == 2_000_003 else right(record)

    asked = ask(MMBenchBenchmark(src), say)
    results = [(p.key.rpartition("-")[0], p.score == 1) for p in asked.predictions]
    assert sum(circular(results).values()) == 1
    assert asked.values == {
        ("circular", ""): pytest.approx(1 / 3),
        ("accuracy", ""): 1,
        ("circular", "coarse_perception"): 0,
        ("circular", "logic_reasoning"): 1,
    }
    assert asked.result["unparsed"] == 1


def test_a_rotation_that_was_not_answered_is_wrong(ask: Ask, write: Write) -> None:
    asked = ask(MMBenchBenchmark(write(dev(*rotations(1)))), right)
    assert asked.questions.result(asked.predictions[:-1], {})["values"][0]["value"] == 0


def test_a_limit_draws_questions(ask: Ask, write: Write) -> None:
    asked = ask(MMBenchBenchmark(write(dev(*rotations(1), *rotations(2), *rotations(3)))), right, limit=1)
    assert len(asked.predictions) == 3
    assert asked.values["circular", ""] == 1


def test_odd_and_hostile_rows_are_counted(ask: Ask, write: Write) -> None:
    good = rotations(1)
    file = table(
        [
            *good,
            row(2, "E"),
            row(3, "", hint="nan"),
            row(4, choices="only"),
            row(5, image="not base64 at all, but longer than the index of another row would be"),
            row(6, image=""),
            row(7, image="99"),  # a row that is not there
            row(8, image="1"),
            row(9, question=" "),
            row(10),
            row(10),
        ]
    )
    hostile = file.encode() + b"x\t?\n" + b"11\t\xff\xfe\t\tred\tgreen\tblue\t\tA\tc\t1\n"
    src = write({"mmbench_dev_20230712.tsv": hostile})
    asked = ask(MMBenchBenchmark(src), right)
    assert {record.key.split("-")[0] for record in asked.questions.records} == {"it/1", "it/8"}
    assert asked.questions.records[-1].images == asked.questions.records[0].images
    assert asked.result["lost"] == {
        "choice_missing": 2,
        "choices_count": 1,
        "image_unreadable": 3,
        "question_empty": 1,
        "duplicate_key": 1,
        "entry_malformed": 2,
    }


WORDS = (
    "None",
    "NA",
    "N/A",
    "nan",
    "null",
    "inf",
    "TRUE",
    "1.0",
    "01",
    "1e3",
    "1/2",
    "Jan-02",
    "0",
    "-",
    "#N/A",
    "<NA>",
)


def test_an_option_is_missing_where_its_cell_is_blank_and_only_there(ask: Ask, write: Write) -> None:
    """pandas takes many words for blank cells, and spreadsheets take numbers and dates for something else."""
    rows = [row(number, "b ", f"one {word} three") for number, word in enumerate(WORDS, 1)]
    rows.append(row(101, "C", A="Two ", B=" One", C="None"))
    rows.append(row(102, "F", A="1", B="2", C="3", D="4", E="5", F="None"))
    rows.append(row(103, "A", A="1", B="2", C=" ", D=""))  # what is blank behind them is no option
    rows.append(row(104, "A", A="1", B="", C="3"))  # C's letter is in doubt
    rows.append(row(105, "G", A="1", B="2"))
    src = write(dev(*rows) | {"mmbench_dev_en_20231003.tsv": table(rows, (*FIELDS, "E", "F"))})
    asked = ask(MMBenchBenchmark(src), right)
    first = {record.key.split("-")[0]: record for record in reversed(asked.questions.records)}
    for number, word in enumerate(WORDS, 1):
        assert first[f"it/{number}"].choices == ("one", word, "three")
        assert first[f"it/{number}"].answer == word
    assert first["it/101"].choices == ("Two", "One", "None")
    assert first["it/102"].choices == ("1", "2", "3", "4", "5", "None")
    assert first["it/102"].meta["letter"] == "F"
    assert first["it/103"].choices == ("1", "2")
    assert asked.result["lost"] == {"choice_blank": 1, "choice_missing": 1}
    assert asked.values["circular", ""] == 1


def test_a_mark_of_the_byte_order_and_too_many_cells(ask: Ask, write: Write) -> None:
    text = dev(row(1), row(2))["mmbench_dev_en_20231003.tsv"]
    longer = text + "3\t?" + "\tx" * len(FIELDS) + "\n"
    asked = ask(MMBenchBenchmark(write({"mmbench_dev_en_20231003.tsv": ("\ufeff" + longer).encode()})), right)
    assert {record.key.split("-")[0] for record in asked.questions.records} == {"it/1", "it/2"}
    assert asked.result["lost"] == {"entry_malformed": 1}


def test_base64_that_is_no_image_is_counted_when_it_is_asked(ask: Ask, write: Write) -> None:
    data = base64.b64encode(b"not an image" * 9).decode()
    asked = ask(MMBenchBenchmark(write(dev(row(1, image=data)))), right)
    with pytest.raises(SkipSample, match="image_unreadable"):
        load_image(asked.questions.records[0].images[0], 9)


def test_images_are_written_once(ask: Ask, write: Write, tmp_path: Path) -> None:
    src = write(dev(*rotations(1)))
    first = ask(MMBenchBenchmark(src), right)
    (copy,) = (path for path in (tmp_path / "cache/files").iterdir() if path.name.endswith("-images"))
    copy.chmod(0o400)
    before = copy.stat().st_mtime_ns, copy.stat().st_ino
    repeat = ask(MMBenchBenchmark(src), right)
    assert repeat.questions.records == first.questions.records
    assert copy.stat().st_ino == before[1]


def test_ccbench(ask: Ask, write: Write) -> None:
    fields = tuple(field for field in FIELDS if field not in ("hint", "source", "l2-category", "split"))
    rows = [row(1, category="a", question="图中所示建筑名称为？"), row(2, category="b")]
    asked = ask(CCBenchBenchmark(write({"CCBench.tsv": table(rows, fields)})), right)
    assert asked.values == {
        ("circular", ""): 1,
        ("accuracy", ""): 1,
        ("circular", "a"): 1,
        ("circular", "b"): 1,
    }


def test_a_table_for_the_server(ask: Ask, write: Write, question: Say, tmp_path: Path) -> None:
    rows = [{**one, "answer": None} for one in [*rotations(1), *rotations(2)]]
    fields = tuple(field for field in FIELDS if field != "answer")
    benchmark = MMBenchBenchmark(write({"mmbench_test_en_20231003.tsv": table(rows, fields)}), "test_en")
    asked = ask(benchmark, lambda record: "=1+1\x00 <b>A")
    assert question(asked.questions.records[0]).endswith("directly.")
    assert asked.result["values"] == []
    (sentence,) = benchmark.submit(asked.predictions[:-1], tmp_path)
    assert sentence.endswith("; 1 rows have a blank prediction: they were not asked")
    sheet = openpyxl.load_workbook(tmp_path / "submission_mmbench_test_en.xlsx").active
    header, *lines = sheet.iter_rows(values_only=True)
    assert header == COLUMNS
    assert lines[1] == (
        1_000_001,
        "Which colour\nis it?",
        "green",
        "blue",
        "red",
        None,
        "=1+1  <b>A",
        "image_style",
        "coarse_perception",
    )
    assert sheet["G2"].data_type == "s"
    assert (len(lines), lines[-1][6]) == (6, None)
    assert benchmark.submit([], tmp_path)


def test_dev_has_no_table(ask: Ask, write: Write, tmp_path: Path) -> None:
    benchmark = MMBenchBenchmark(write(dev(row(1))))
    assert benchmark.submit(ask(benchmark, right).predictions, tmp_path) == []


def test_files_that_are_wrong_as_a_whole(write: Write) -> None:
    with pytest.raises(UserError, match=r"has no mmbench_dev_cn_20231003.tsv or MMBench_DEV_CN.tsv"):
        list(MMBenchBenchmark(write({"x": ""}), "dev_cn").read())
    with pytest.raises(UserError, match="KeyError: 'index'"):
        list(MMBenchBenchmark(write({"MMBench_DEV_EN.tsv": "a\tb\n1\t2\n"})).read())


def test_the_unified_annotation(ask: Ask, write: Write) -> None:
    """Rotations of a question count together; entries whose question is unknown are not asked."""
    entry = {"image_path": "a.jpg", "question": "Which?", "gt_answers": "B", "hint": "N/A", "choices": ["x", "y"]}
    rows = [entry | {"question_id": index} for index in (1, 1_000_001, "2", "1000002")]
    broken = [entry | {"question_id": 3, "choices": "xy"}, entry, entry | {"question_id": "q"}]
    benchmark = MMBenchBenchmark(write({"all.json": rows + broken}) / "all.json")
    asked = ask(benchmark, right)
    assert asked.values == {("circular", ""): 1, ("accuracy", ""): 1}
    assert asked.result["lost"] == {"entry_malformed": 1, "question_id_missing": 2}
    once = ask(benchmark, lambda record: "A" if record.meta["question_id"] > 1_000_000 else "B")
    assert once.values == {("circular", ""): 0, ("accuracy", ""): 1}
