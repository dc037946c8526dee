"""MM-Vet and LLaVA-Bench, which a language model judges. Structure: what `mm-vet_evaluator.py` of
https://github.com/yuweihao/MM-Vet and `eval_gpt_review_bench.py` of https://github.com/haotian-liu/LLaVA read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sphinx_pl.data.schema import ImageRef
from sphinx_pl.evaluation.benchmarks.llava_bench import LLaVABenchBenchmark
from sphinx_pl.evaluation.benchmarks.mm_vet import MMVetBenchmark

from .conftest import Ask, Say

Write = Callable[..., Path]

MM_VET: dict[str, Any] = {
    f"v1_{number}": {
        "imagename": f"v1_{number}.png",
        "question": "What is x in the equation?",
        "answer": "-1<AND>-5",
        "capability": ["ocr", "math"],
        "imagesource": "web",
    }
    for number in (0, 1)
}


def test_mm_vet_writes_the_judges_file_and_no_number(ask: Ask, write: Write, question: Say, tmp_path: Path) -> None:
    odd = {"v1_2": {"imagename": "x.png"}, "v1_3": MM_VET["v1_0"] | {"question": " "}, "v1_4": None}
    src = write({"mm-vet.json": MM_VET | odd})
    benchmark = MMVetBenchmark(src)
    asked = ask(benchmark, lambda record: f"x = {record.key}")
    first = asked.questions.records[0]
    assert question(first) == "What is x in the equation?"
    assert first.images == (ImageRef(str(src / "images/v1_0.png")),)
    assert asked.result["values"] == []
    assert asked.result["lost"] == {"entry_malformed": 2, "question_empty": 1}
    (sentence,) = benchmark.submit(asked.predictions, tmp_path)
    # The evaluator joins these: --result_path, and --model with .json.
    assert f"--mmvet_path {src} --result_path {tmp_path} --model answers_mm_vet_v1; " in sentence
    assert sentence.endswith("3 of 5 questions have no answer")
    assert json.loads((tmp_path / "answers_mm_vet_v1.json").read_text()) == {
        "v1_0": "x = it/v1_0",
        "v1_1": "x = it/v1_1",
        "v1_2": "",
        "v1_3": "",
        "v1_4": "",
    }


def test_the_judges_commands_can_be_run_in_its_own_folder(
    ask: Ask, write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    write({"mm-vet.json": MM_VET, "questions.jsonl": "", "answers_gpt4.jsonl": ""}).rename("my files")
    Path("my results").mkdir()
    (of_mm_vet,) = MMVetBenchmark(Path("my files")).submit([], Path("my results"))
    assert f"--mmvet_path '{tmp_path}/my files' --result_path '{tmp_path}/my results' --model" in of_mm_vet
    (of_llava,) = LLaVABenchBenchmark(Path("my files")).submit([], Path("my results"))
    assert f"--context '{tmp_path}/my files/context.jsonl' --rule llava/eval/table/rule.json" in of_llava
    reviews = f"'{tmp_path}/my results/llava_bench-reviews.jsonl'"
    assert f"--output {reviews}, then python llava/eval/summarize_gpt_review.py -f {reviews};" in of_llava


def lines(*entries: Any) -> str:
    return "".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries)


def test_llava_bench_writes_a_line_for_every_question(ask: Ask, write: Write, question: Say, tmp_path: Path) -> None:
    questions = [
        {"question_id": n, "image": "001.jpg", "text": f"What is thing {n}?", "category": "conv"} for n in range(4)
    ]
    del questions[1]["image"]
    references = [{"question_id": n, "text": "A hill.", "answer_id": "x"} for n in (0, 1, 2)]
    files = {"questions.jsonl": lines(*questions, "{broken"), "answers_gpt4.jsonl": lines(*references)}
    src = write(files)
    benchmark = LLaVABenchBenchmark(src)
    asked = ask(benchmark, lambda record: f"It is\n{record.key}.")
    assert [record.key for record in asked.questions.records] == ["it/0", "it/2"]
    assert question(asked.questions.records[0]) == "What is thing 0?"
    assert asked.predictions[0].answer == "A hill."
    assert asked.result["lost"] == {"entry_malformed": 3}
    (sentence,) = benchmark.submit(asked.predictions, tmp_path)
    assert sentence.endswith("3 of 5 questions have no answer")
    file = tmp_path / "answers_llava_bench_in_the_wild.jsonl"
    written = [json.loads(line) for line in file.read_text().splitlines()]
    # The judge reads the files together, line by line: what was not asked has a line as well.
    assert [(line["question_id"], line["text"]) for line in written] == [
        (0, "It is\nit/0."),
        (1, ""),
        (2, "It is\nit/2."),
        (3, ""),
        (None, ""),
    ]
    assert all(line["answer_id"] for line in written)
