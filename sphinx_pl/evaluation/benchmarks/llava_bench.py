"""LLaVA-Bench (In-the-Wild): 60 open questions on 24 images (Liu et al. 2023, arXiv 2304.08485).

Files (https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild): `questions.jsonl` of
{"question_id", "image": "001.jpg", "text", "category": "conv", "detail" or "complex"},
`answers_gpt4.jsonl` of {"question_id", "text", "answer_id", ...}, what the judge compares with,
`context.jsonl`, which the judge reads, and the folder `images`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sphinx_pl.data.converters.common import asked, text
from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.evaluation.benchmarks.base import JudgedBenchmark, command
from sphinx_pl.evaluation.runner import Prediction
from sphinx_pl.utils.files import write_whole


class LLaVABenchBenchmark(JudgedBenchmark):
    """A judge compares the answers with GPT-4's, which stand for the true ones."""

    name = "llava_bench"
    title = "LLaVA-Bench (In-the-Wild)"
    url = "https://github.com/haotian-liu/LLaVA/blob/main/docs/LLaVA_Bench.md"
    licence = "see the page"
    family = "mllm"
    splits = ("in_the_wild",)
    max_new_tokens = 1024

    def entries(self) -> Iterator[tuple[str, Any]]:
        lines = self.json_lines("answers_gpt4.jsonl")
        references = {line["question_id"]: line["text"] for _, line in lines if isinstance(line, dict)}
        for number, question in self.json_lines("questions.jsonl"):
            yield str(number), (question, references)

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        question, references = entry
        number = question["question_id"]
        image = (ImageRef(f"images/{text(question['image'])}"),)
        meta = {"category": text(question["category"]), "question_id": number}
        yield Record(key, "chat", image, question=asked(question["text"]), answer=text(references[number]), meta=meta)

    def submit(self, predictions: Sequence[Prediction], folder: Path) -> list[str]:
        """Write a line for every question, in order: the judge reads the files line by line."""
        given = {prediction.record["meta"].get("question_id"): prediction for prediction in predictions}
        questions = (line for _, line in self.json_lines("questions.jsonl"))
        asked_for = [line.get("question_id") if isinstance(line, dict) else None for line in questions]
        lines = []
        for number in asked_for:
            prediction = given.get(number)
            answer, prompt = (prediction.prediction, prediction.question) if prediction else ("", "")
            name = hashlib.sha256(f"{number} {answer}".encode("utf-8", "surrogateescape")).hexdigest()[:22]
            line = {"question_id": number, "prompt": prompt, "text": answer, "answer_id": name}
            lines.append(json.dumps(line | {"model_id": "sphinx", "metadata": {}}, ensure_ascii=False))
        file = folder / f"answers_{self.name}_{self.split}.jsonl"
        write_whole(file, "\n".join(lines) + "\n")
        blank = sum(number not in given for number in asked_for)
        reviews = file.with_name("llava_bench-reviews.jsonl")
        review = command(
            "python",
            "llava/eval/eval_gpt_review_bench.py",
            *("--question", self.src / "questions.jsonl", "--context", self.src / "context.jsonl"),
            *("--rule", "llava/eval/table/rule.json"),
            *("--answer-list", self.src / "answers_gpt4.jsonl", file, "--output", reviews),
        )
        summary = command("python", "llava/eval/summarize_gpt_review.py", "-f", reviews)
        return [
            f"LLaVA-Bench: answers for the official judge: {file} ({review}, then {summary}; the first asks GPT-4)"
            + (f"; {blank} of {len(asked_for)} questions have no answer" if blank else "")
        ]
