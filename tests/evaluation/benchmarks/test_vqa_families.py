"""What holds of every VQA and document benchmark, and of every entry of conf/benchmark/paper.yaml that asks one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.readers.instruction_json import to_record
from sphinx_pl.data.schema import Record
from sphinx_pl.evaluation.benchmarks import BENCHMARKS, FAMILIES, Questions, choose, load
from sphinx_pl.evaluation.benchmarks.base import HIDDEN
from sphinx_pl.evaluation.runner import Prediction
from sphinx_pl.evaluation.scorers.tasks import last_turn
from sphinx_pl.runtime.hydra_app import CONFIG_FOLDER
from sphinx_pl.utils.errors import UserError
from tests.fuzzing import replaced

from .vqa_files import CASES, FILES, VQA, write

JUNK = (None, True, -1, 1.5, float("nan"), "", "\ud800", [], [[]], {}, {"a": 1})
ANSWERS = ("", "\ud800", "A", "yes", "1e999", "\n\t.,;%", "nan", "(B) " * 50)


def opened(tmp_path: Path, kind: str, split: str, files: dict[str, Any] | None = None) -> Questions:
    write(tmp_path, FILES[kind][split] if files is None else files)
    return load("it", BENCHMARKS[kind](tmp_path, split))


def truth(record: Record) -> str:
    return last_turn(record, Coordinates()).answer


@pytest.mark.parametrize(("kind", "split"), CASES)
def test_true_answers_score_1_and_others_0(tmp_path: Path, kind: str, split: str) -> None:
    asked = opened(tmp_path, kind, split)
    benchmark = asked.benchmark
    assert benchmark.family in FAMILIES
    assert all(record.images[0].path.startswith(str(tmp_path)) for record in asked.records)
    assert len({record.key for record in asked.records}) == len(asked.records)
    for answer, score in ((truth, 1.0), (lambda record: "zebra crossing", 0.0), (lambda record: "", 0.0)):
        predictions = [
            benchmark.score_answer(record, answer(record), Coordinates(), record.images) for record in asked.records
        ]
        result = asked.result(predictions, {})
        if benchmark.is_hidden:
            assert result["values"] == []
        else:
            assert [prediction.score for prediction in predictions] == [score] * len(predictions)
            assert {value["value"] for value in result["values"]} == {score}
            assert result["values"][0]["measure"] in result["descriptions"]
        # Scored anew, without the files.
        empty = tmp_path / "empty"
        empty.mkdir(exist_ok=True)
        bare = BENCHMARKS[kind](empty, split)
        for old in predictions:
            kept = Prediction.from_dict(json.loads(json.dumps(old.to_dict())))
            record = to_record(kept.record, kept.key, Path(), kept.task)
            assert bare.score_answer(record, kept.prediction, Coordinates(), kept.images) == kept
            assert bare.groups(kept) == benchmark.groups(old)


@pytest.mark.parametrize(("kind", "split"), [case for case in CASES if case[1] in BENCHMARKS[case[0]].hidden])
def test_what_is_hidden_is_asked_in_the_same_words_and_written_for_the_server(
    tmp_path: Path, kind: str, split: str
) -> None:
    asked = opened(tmp_path, kind, split)
    assert {truth(record) for record in asked.records} == {HIDDEN}
    assert all(record.answer == "" and "answers" not in record.meta for record in asked.records)
    open_split = BENCHMARKS[kind].splits[0]
    told = opened(tmp_path / "open", kind, open_split)
    words = [[last_turn(record, Coordinates()).question for record in each.records] for each in (asked, told)]
    assert words[0] == words[1]
    assert "single word or phrase" in words[0][0]
    predictions = [
        asked.benchmark.score_answer(record, " Some Answer.\n", Coordinates()) for record in asked.records[:1]
    ]
    assert predictions[0].metric == ""
    (sentence,) = asked.benchmark.submit(predictions, tmp_path)
    path = tmp_path / f"submission_{kind}_{split}.json"
    assert sentence.startswith(f"{path}: 1 answers")
    rows = json.loads(path.read_text())
    name = asked.benchmark.server_id
    assert [set(row) for row in rows] == [{name, "answer"}] * len(asked.records)
    answer = "some answer" if kind in ("vqav2", "vizwiz") else "Some Answer."
    assert [row["answer"] for row in rows] == [answer] + [""] * (len(rows) - 1)
    assert ("blank" in sentence) == (len(rows) > 1)
    assert told.benchmark.submit(predictions, tmp_path / "none") == []


def test_a_submission_of_test_dev_has_all_questions_of_test(tmp_path: Path) -> None:
    more = {"v2_OpenEnded_mscoco_test2015_questions.json": {"questions": [{"question_id": 1}, VQA, {"question_id": 2}]}}
    asked = opened(tmp_path, "vqav2", "test-dev", FILES["vqav2"]["test-dev"] | more)
    predictions = [asked.benchmark.score_answer(record, "Two", Coordinates()) for record in asked.records]
    asked.benchmark.submit(predictions, tmp_path)
    rows = json.loads((tmp_path / "submission_vqav2_test-dev.json").read_text())
    assert rows == [
        {"question_id": 1, "answer": ""},
        {"question_id": 9000, "answer": "two"},
        {"question_id": 2, "answer": ""},
    ]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of lists the first two elements: the others are alike."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*path, key))


@pytest.mark.parametrize(("kind", "split"), CASES)
def test_no_value_and_no_answer_breaks_a_benchmark(tmp_path: Path, kind: str, split: str) -> None:
    lost = 0
    for place, content in FILES[kind][split].items():
        for path in places(content):
            for junk in JUNK:
                if not path and (isinstance(junk, str) or place.endswith(".jsonl")):
                    continue  # `write` writes these as they are
                files = FILES[kind][split] | {place: replaced(content, path, junk)}
                try:
                    asked = opened(tmp_path, kind, split, files)
                except UserError as error:
                    assert kind in str(error) or "no question" in str(error)  # noqa: PT017 - it may be of use as it is
                    lost += 1
                    continue
                lost += asked.lost.get("entry_malformed", 0)
                predictions = [
                    asked.benchmark.score_answer(asked.records[0], answer, Coordinates()) for answer in ANSWERS
                ]
                assert all(0 <= prediction.score <= 1 for prediction in predictions)
                assert all(isinstance(part, str) for part in asked.benchmark.groups(predictions[0]))
                asked.benchmark.submit(predictions[:1], tmp_path)
    assert lost


@pytest.mark.parametrize(("kind", "split"), CASES)
def test_missing_files_are_named(tmp_path: Path, kind: str, split: str) -> None:
    with pytest.raises(UserError, match=kind):
        load("it", BENCHMARKS[kind](tmp_path, split))


UNIFIED = {
    "image_path": "./data/a.jpg",
    "question": "What is it?",
    "question_id": -1,
    "dataset_name": "x",
    "gt_answers": "Cat",
}
SCIENCE = (
    "Context:\n\nQuestion:\nWhat is the capital?\nChoices:\nA. Boulder\nB. Denver\n"
    'Answer with the option"s letter from the given choices directly.'
)


@pytest.mark.parametrize(("kind", "split"), CASES)
def test_the_originals_unified_annotation(tmp_path: Path, kind: str, split: str) -> None:
    good = UNIFIED
    if kind == "scienceqa":
        good = UNIFIED | {"question": SCIENCE, "gt_answers": "B"}
    elif kind == "vsr":
        good = UNIFIED | {"question": 'Is the following statement "A." true or false?', "gt_answers": "true"}
    other = good | {"question_id": 5}
    entries = [good, other, good | {"gt_answers": 3, "question_id": None}, good | {"question": None}, 7]
    annotation = tmp_path / "unified.json"
    write(tmp_path, {"unified.json": entries[:-1]})
    asked = load("it", BENCHMARKS[kind](annotation, split))
    hidden = asked.benchmark.is_hidden
    # Of hidden truth "gt_answers" is not read, but an id is needed; that of VizWiz is the image's name.
    named = hidden and kind == "vizwiz"
    without = {} if named else {"question_id_missing": 1} if hidden else {"entry_malformed": 2}
    assert asked.lost == {"entry_malformed": 1} | without
    assert [r.images[0].path for r in asked.records] == [str(tmp_path / "data/a.jpg")] * (3 if named else 2)
    scores = [asked.benchmark.score_answer(r, truth(r), Coordinates()).score for r in asked.records]
    assert scores == [0.0 if hidden else 1.0] * len(scores)
    question = last_turn(asked.records[0], Coordinates()).question
    assert question.startswith(good["question"])
    assert ("insufficient" in question) == (kind == "vizwiz")
    if kind in ("scienceqa", "vsr"):
        assert question == good["question"]
    write(tmp_path, {"unified.json": entries})
    with pytest.raises(UserError, match=kind):
        load("it", BENCHMARKS[kind](annotation, split))


def test_every_benchmark_that_the_docs_name_is_configured() -> None:
    names = OmegaConf.load(CONFIG_FOLDER / "benchmark" / "paper.yaml")
    root = CONFIG_FOLDER.parent.parent
    files = [root / "README.md", root / "conf" / "evaluate.yaml", *(root / "docs").glob("*.md")]
    files.remove(root / "docs" / "extending.md")  # it makes the benchmark that it names
    named = [
        (file.name, pattern.strip("\"' "))
        for file in files
        for result in re.findall(r"benchmarks=\[([^\]]*)\]", file.read_text())
        for pattern in result.split(",")
    ]
    assert len(named) > 5
    for file, pattern in named:
        assert any(fnmatchcase(str(name), pattern) for name in names if name != "root"), (file, pattern)


def test_every_entry_of_the_paper_opens(tmp_path: Path) -> None:
    configured: Any = OmegaConf.to_container(OmegaConf.load(CONFIG_FOLDER / "benchmark" / "paper.yaml"), resolve=False)
    entries = {name: entry for name, entry in configured.items() if name != "root" and entry["kind"] in FILES}
    assert {(entry["kind"], entry["split"]) for entry in entries.values()} == set(CASES)
    for entry in entries.values():
        for key in ("src", "images"):
            if key in entry:
                entry[key] = entry[key].replace("${benchmark.root}", str(tmp_path))
                Path(entry[key]).mkdir(parents=True, exist_ok=True)
        write(Path(entry["src"]), FILES[entry["kind"]][entry["split"]])
    with_root = entries | {"root": str(tmp_path), "missing": {"kind": "vqav2", "src": str(tmp_path / "nowhere")}}
    chosen, left_out = choose(["*"], with_root)
    assert {asked.name for asked in chosen} == set(entries)
    assert left_out.keys() == {"missing"}
    for asked in chosen:
        assert all(record.key.startswith(f"{asked.name}/") for record in asked.records)
        assert all(Path(record.images[0].path).is_relative_to(asked.benchmark.images) for record in asked.records)
    with pytest.raises(UserError, match=r"benchmark\.x=3 must be a mapping"):
        choose(["x"], {"x": 3})
    # Named, it is an error beside others too; by a pattern it is said.
    with pytest.raises(UserError, match=r"benchmark\.off is null"):
        choose(["vqav2_val", "off"], with_root | {"off": None})
    with pytest.raises(UserError, match=r"benchmark\.mine\.splitt"):
        choose(["mine"], {"mine": {"kind": "gqa", "src": str(tmp_path), "splitt": "testdev"}})
