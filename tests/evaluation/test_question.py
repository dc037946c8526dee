"""What is asked does not follow from the truth: of every task and every benchmark, and of all that is made of it."""

from __future__ import annotations

import base64
import dataclasses
import inspect
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sphinx_pl.data.converters.common import choice_record, question_record
from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.schema import ImageRef, Record, Region, Turn
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.evaluation.answer_log import AnswerLog
from sphinx_pl.evaluation.baselines import constant_predictions, fit_constants
from sphinx_pl.evaluation.benchmarks import BENCHMARKS, Questions, load
from sphinx_pl.evaluation.benchmarks.mme import SUBTASKS
from sphinx_pl.evaluation.question import Question, asks_yes_no, question_of
from sphinx_pl.evaluation.runner import ask, evaluate, score_answer, select, shuffle_images
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from tests.examples import EXAMPLES, LEFT, LOW, PERSON, RIGHT

from .benchmarks.vqa_files import FILES, write

GEOMETRY = Coordinates(2)
HANDS = Region(PERSON.box, "person", (*[(0, 0, 0)] * 9, (30, 20, 2), *[(0, 0, 0)] * 7))
OTHER_TRUTHS: dict[str, dict[str, Any]] = {
    "multiple_choice": {"answer": "9"},
    "rec": {"regions": (RIGHT,)},
    "reg": {"regions": (dataclasses.replace(LEFT, label="a dog"),)},
    "grounded_caption": {"answer": "{0,1}", "regions": (LOW, RIGHT)},
    "detection": {"regions": ()},
    "ocr": {"regions": (LOW,)},
    "pose": {"regions": (HANDS,)},
    "layout": {"regions": (LOW,)},
    "yes_no": {"answer": "no"},
    "grounded_vqa": {"answer": "{0}", "regions": (RIGHT,)},
    "detection_all": {"regions": (RIGHT,)},
    "ocr_text": {"regions": (LEFT,)},
    "question_generation": {"question": "Why?"},
}
"""By task, what is another truth of the same question; by default another answer."""


def other(record: Record) -> Record:
    meta = {"answers": ["<image>"] * 10, "letter": "Z"}
    return dataclasses.replace(
        record, meta=meta, **OTHER_TRUTHS.get(record.task, {"answer": "a long <image> answer of another kind"})
    )


def test_a_question_holds_no_answer() -> None:
    assert {field.name for field in dataclasses.fields(Question)} == {
        "key",
        "images",
        "earlier",
        "text",
        "limit",
        "candidates",
    }
    # What asks gets questions: no record can be among its arguments.
    assert "Record" not in str(inspect.signature(ask))


@pytest.mark.parametrize("task", [task for task in TASKS if task != "text"])
def test_a_tasks_question_is_the_same_for_every_truth(task: str) -> None:
    record = EXAMPLES[task]
    changed = other(record)
    assert TASKS[task].turns(record, GEOMETRY)[-1].answer != TASKS[task].turns(changed, GEOMETRY)[-1].answer
    assert question_of(record, GEOMETRY) == question_of(changed, GEOMETRY)


def test_the_task_of_a_short_answer_tells_nothing() -> None:
    """Converters call a question yes_no where its answer is yes or no."""
    for text, candidates in (("Is it red?", ("yes", "no")), ("Is it red or blue?", ()), ("What is it?", ())):
        records = [
            dataclasses.replace(EXAMPLES[task], question=text, answer=answer)
            for task, answer in (("yes_no", "yes"), ("yes_no", "no"), ("short_vqa", "red"), ("short_vqa", "2"))
        ]
        questions = {question_of(record, GEOMETRY) for record in records}
        assert {question.candidates for question in questions} == {candidates}
        assert len(questions) == 1
    assert question_of(EXAMPLES["chat"], GEOMETRY).candidates == ()
    assert question_of(EXAMPLES["multiple_choice"], GEOMETRY).candidates == ("A", "B", "C")
    assert asks_yes_no("Doesn't it fly?")
    assert not asks_yes_no("Island or sea?")


def short_answers(truths: Sequence[str]) -> list[Record]:
    """Questions of one source, as converters write them: the task follows from the answer."""
    texts = ("Is it red?", "What is it?", "Is there a dot?", "Who?", "Does it fly?", "Is it a cat or a dog?")
    return [
        question_record(str(n), f"{n}.png", texts[n % len(texts)], truth, {"topic": "t"})
        for n, truth in enumerate(truths)
    ]


def test_what_is_drawn_shuffled_and_guessed_is_the_same_for_every_truth() -> None:
    truths = [("yes", "no", "red", "2")[n % 4] for n in range(24)]
    several = [short_answers(truths), short_answers(truths[::-1]), short_answers(["no"] * 24)]
    assert len({tuple(record.task for record in records) for records in several}) == 3
    drawn = [[record.key for record in select(records, 3, seed=1)] for records in several]
    assert len(drawn[0]) == 6  # of those that ask for yes or no, and of the others
    items = [shuffle_images(records, seed=1) for records in several]
    training = [question_record(str(n), "a.png", "Is it?", "yes", {}) for n in range(3)]
    constants = fit_constants([*training, *short_answers(["blue"] * 24)], GEOMETRY)
    assert constants["yes_no", ""] == "blue"
    guessed = []
    for records in several:
        answers = [score_answer(record, "", GEOMETRY) for record in records]
        guesses = constant_predictions(answers, {r.key: r for r in records}, constants, GEOMETRY)
        guessed.append([guess.prediction for guess in guesses])
    for result in (drawn, items, guessed):
        assert result[0] == result[1] == result[2]


def test_repeated_options_are_refused_whichever_is_right() -> None:
    for choices in (["cat", "dog", "cat "], ["cat", "dog", "bird"]):
        answer = set()
        for right in range(3):
            try:
                answer.add(choice_record("k", "a.png", "Which?", choices, right, {}).choices)
            except SkipSample as error:
                answer.add((error.reason,))
        assert answer == {("choices_repeated",) if choices[2] == "cat " else tuple(choices)}


def test_a_conversation_keeps_its_earlier_answers_alone(processor: Processor) -> None:
    turns = Turn("What is it?", "A dot."), Turn("Which colour?", "red")
    record = dataclasses.replace(EXAMPLES["chat"], images=(), turns=turns)
    question = question_of(record, GEOMETRY)
    assert (question.earlier, question.text) == (turns[:1], "Which colour?")
    assert question.prompt(processor).ids == processor.prompt(record).ids


def picture() -> str:
    file = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def unified(*questions: str, ids: Callable[[int], Any] = lambda n: n, **truth: list[Any]) -> dict[str, Any]:
    entries = [
        {"image_path": f"{n}.jpg", "question": text, "question_id": ids(n), "gt_answers": truth["answers"][n]}
        for n, text in enumerate(questions)
    ]
    return {"unified.json": json.dumps(entries)}


def short(kind: str, split: str, truth: int) -> dict[str, Any]:
    """The files of `vqa_files` with other truths."""
    answers = ("yes", "no", "red", "2")[truth]

    def changed(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: changed(part, name) for name, part in value.items()}
        if key == "answers" and isinstance(value, list):
            return [answer | {"answer": answers} if isinstance(answer, dict) else answers for answer in value]
        if key in ("question_types", "answer_type") and isinstance(value, list):
            return ["Yes/No"] if truth < 2 else ["form"]
        if isinstance(value, list):
            return [changed(part, key) for part in value]
        if key in ("answer", "label") and isinstance(value, int):
            return truth % 2
        if key == "answer_type":
            return ("yes/no", "yes/no", "other", "number")[truth]
        return answers if key in ("answer", "multiple_choice_answer", "label", "fullAnswer") else value

    files: dict[str, Any] = changed(FILES[kind][split])
    return files


def letters(truth: int) -> str:
    return "ABCD"[truth]


def mmbench(name: str) -> Callable[[int], dict[str, Any]]:
    def files(truth: int) -> dict[str, Any]:
        columns = ["index", "question", "A", "B", "C", "D", "answer", "category", "l2-category", "image"]
        rows = [
            [str(n), f"Which {n}?", "cat", "dog", "None", "NA", letters(truth), "c", "l", picture()] for n in (1, 2)
        ]
        return {name: "".join("\t".join(row) + "\n" for row in (columns, *rows))}

    return files


def suite(task: str) -> Callable[[int], dict[str, Any]]:
    def files(truth: int) -> dict[str, Any]:
        record = EXAMPLES[task] if truth % 2 else other(EXAMPLES[task])
        regions = [
            {"box": region.box, "label": region.label} | ({"keypoints": region.keypoints} if region.keypoints else {})
            for region in record.regions
        ]
        about = {"image": "a.png", "width": 100, "height": 50, "task": task, "question": record.question}
        return {"unified.json": json.dumps([about | {"id": str(n), "regions": regions} for n in range(3)])}

    return files


SEED = {"question_id": "1", "question": "Which?", "question_type_id": 1, "data_type": "image", "data_id": "a"}
MATH: dict[str, Any] = {
    "pid": "1",
    "question": "Which?",
    "image": "1.jpg",
    "choices": ["0", "1", "None", "3"],
    "unit": "cm",
}
MATH |= {"precision": 1.0, "question_type": "multi_choice", "answer_type": "text", "metadata": {"task": "t"}}
KIND_OF_OTHERS: dict[str, Callable[[int], dict[str, Any]]] = {
    "pope": lambda t: unified("Is it red?", "Is it a cat?", answers=[("yes", "no")[(t + n) % 2] for n in range(2)]),
    "mme": lambda t: {
        f"{subtask}/{name}": f"Is it a cat?\t{('Yes', 'No')[t % 2]}\nIs it a dog?\t{('No', 'Yes')[t % 2]}\n"
        for subtask in SUBTASKS
        for name in ("a.txt", "a.jpg")
    },
    "seed_bench": lambda t: {
        "SEED-Bench.json": {
            "question_type": {"Scene": 1},
            "questions": [SEED | {f"choice_{x}": x * 2 for x in "abcd"} | {"answer": letters(t)}],
        }
    },
    "mmbench": mmbench("MMBench_DEV_EN.tsv"),
    "ccbench": mmbench("CCBench.tsv"),
    "mathvista": lambda t: {
        "testmini.json": {
            "1": MATH | {"answer": MATH["choices"][t]},
            "2": MATH | {"question_type": "free_form", "choices": None, "answer": str(t), "answer_type": "integer"},
        }
    },
    "mm_vet": lambda t: {
        "mm-vet.json": {
            "v1_0": {
                "imagename": "a.jpg",
                "question": "Is it?",
                "answer": ["yes", "no", "2", "red"][t],
                "capability": [],
            }
        }
    },
    "llava_bench": lambda t: {
        "questions.jsonl": [{"question_id": 0, "image": "a.jpg", "text": "Is it?", "category": "conv"}],
        "answers_gpt4.jsonl": [{"question_id": 0, "text": ["yes", "no", "2", "red"][t]}],
    },
    "coco_caption": lambda t: unified("", "", answers=[["a cat"], [f"{t} dogs"]]),
    **dict.fromkeys(
        ("refcoco", "refcoco+", "refcocog"),
        lambda t: unified("a cat", ids=lambda n: "height427_width640", answers=[[10 * t, 20, 100, 200]]),
    ),
    **{kind: suite(task) for kind, task in (("layout", "layout"), ("detection", "detection"), ("pose", "pose"))},
    "ocr": suite("ocr_text"),
}


def cases() -> Iterator[tuple[str, str, Callable[[int], dict[str, Any]]]]:
    for kind, splits in FILES.items():
        for split in splits:
            yield kind, split, lambda truth, kind=kind, split=split: short(kind, split, truth)  # type: ignore[misc]
    for kind, files in KIND_OF_OTHERS.items():
        yield kind, BENCHMARKS[kind].splits[0], files


def asked(questions: Questions) -> list[Question]:
    benchmark = questions.benchmark
    return [question_of(record, GEOMETRY, benchmark.max_new_tokens, benchmark.closed) for record in questions.records]


@pytest.mark.parametrize(("kind", "split", "files"), cases(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_benchmarks_questions_are_the_same_for_every_truth(
    kind: str, split: str, files: Callable[[int], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPHINX_CACHE", str(tmp_path / "cache"))
    src = tmp_path / "src"
    items = []
    for truth in range(4):
        write(src, files(truth))
        where = src / "unified.json" if (src / "unified.json").is_file() else src
        benchmark = BENCHMARKS[kind](where, split)
        items.append((asked(load("it", benchmark)), asked(load("it", benchmark, limit=1))))
    whole, drawn = items[0]
    assert whole
    assert drawn
    for repeat in items[1:]:
        # A table's images lie in a file that is named after its contents.
        for questions, first in zip(repeat, (whole, drawn), strict=True):
            plain = [
                [dataclasses.replace(q, images=() if "cache" in q.images[0].path else q.images) for q in part]
                for part in (questions, first)
            ]
            assert plain[0] == plain[1]


def test_every_benchmark_is_looked_at() -> None:
    assert {kind for kind, *_ in cases()} == set(BENCHMARKS)


@pytest.mark.parametrize("ranking", [False, True])
def test_answers_and_the_answer_log_are_the_same_for_every_truth(
    ranking: bool, model_config: SphinxConfig, processor: Processor, tmp_path: Path
) -> None:
    Image.new("RGB", (100, 50), (200, 30, 30)).save(tmp_path / "a.png")
    images = (ImageRef(str(tmp_path / "a.png")),)
    names = ("short_vqa", "yes_no", "multiple_choice", "rec", "reg", "detection", "relation_detection", "chat")
    records = [dataclasses.replace(EXAMPLES[task], key=task, images=images) for task in names]
    torch.manual_seed(0)
    model = Sphinx(model_config).eval()
    answer, logs, scores = [], [], []
    for name, asked_of in (("a", records), ("b", [other(record) for record in records])):
        answer_log = AnswerLog(tmp_path / name, "q", {})
        result = evaluate(
            model,
            processor,
            asked_of,
            ranking=ranking,
            max_new_tokens=4,
            batch_size=3,
            answer_log=answer_log,
            progress=False,
        )
        answer.append([(prediction.key, prediction.prediction) for prediction in result])
        logs.append((tmp_path / name / "q.rank0.jsonl").read_bytes())
        scores.append([prediction.answer for prediction in result])
    assert answer[0] == answer[1]
    assert logs[0] == logs[1]
    assert all(a != b for a, b in zip(*scores, strict=True))  # the truths did differ
