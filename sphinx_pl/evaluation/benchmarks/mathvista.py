"""MathVista: mathematics on figures, charts and photographs (Lu et al. 2023, arXiv 2310.02255).

Files (https://github.com/lupantech/MathVista, data): `testmini.json`, {pid: {"pid", "question",
"image": "images/1.jpg", "choices": list or null, "unit", "precision", "answer", "question_type":
"multi_choice" or "free_form", "answer_type": "text", "integer", "float" or "list", "metadata":
{"task", ...}}}, and the folder `images`. The answers of the other split, test, are not public.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sphinx_pl.data.converters.common import asked, text
from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.evaluation.benchmarks.base import Benchmark, command
from sphinx_pl.evaluation.benchmarks.multiple_choice import letter_record
from sphinx_pl.evaluation.metrics import Metric, mean
from sphinx_pl.evaluation.runner import Prediction
from sphinx_pl.evaluation.scorers.base import Score
from sphinx_pl.evaluation.scorers.mathvista import mathvista_match, read_answer
from sphinx_pl.utils.files import write_whole

ANSWER_TYPES = ("text", "integer", "float", "list")


class MathVistaBenchmark(Benchmark):
    """A question asks for a letter, or for a word or phrase, with the unit where there is one.

    The official prompt asks for reasoning, and a language model finds the answer in it. Here an
    answer that rules cannot read is wrong and counts as unparsed, so the figure is a lower bound of
    the official one. The file for the official judge is written as well.
    """

    name = "mathvista"
    title = "MathVista"
    url = "https://github.com/lupantech/MathVista"
    licence = "CC BY-SA 4.0; the images' own"
    family = "mllm"
    splits = ("testmini",)
    official_only = True
    max_new_tokens = 32  # a list of numbers takes more than a word

    def entries(self) -> Iterator[tuple[str, Any]]:
        yield from self.json("testmini.json").items()

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        kind, answer = entry["question_type"], text(entry["answer"])
        meta = {"category": text(entry["metadata"]["task"]), "problem": entry}
        image = ImageRef(text(entry["image"]))
        question = asked(entry["question"])
        if unit := entry.get("unit"):
            question = f"{question} (Unit: {text(unit)})"
        if kind == "multi_choice":
            choices = entry["choices"]
            if answer not in choices:
                raise SkipSample("answer_not_in_choices", key)
            yield letter_record(key, image, question, choices, string.ascii_uppercase[choices.index(answer)], meta)
        elif kind == "free_form" and entry["answer_type"] in ANSWER_TYPES:
            _precision(entry)
            yield Record(key, "short_vqa", (image,), question=question, answer=answer, meta=meta)
        else:
            raise ValueError(f"a question of type {kind}, {entry['answer_type']}")

    def score(self, record: Record, answer: str, coordinates: Coordinates) -> Score:
        problem = record.meta["problem"]
        choices = problem["choices"] or ()
        reading = read_answer(answer, problem["question_type"], problem["answer_type"], choices, _precision(problem))
        return Score(float(mathvista_match(reading, problem["answer"])), reading is not None)

    @property
    def metrics(self) -> Sequence[Metric]:
        return (mean("accuracy", "Share of right answers, read by rules, not by a language model."),)

    def submit(self, predictions: Sequence[Prediction], folder: Path) -> list[str]:
        problems = {
            prediction.record["meta"]["problem"]["pid"]: prediction.record["meta"]["problem"]
            | {"query": prediction.question, "response": prediction.prediction}
            for prediction in predictions
        }
        file = folder / f"answers_{self.name}_{self.split}.json"
        write_whole(file, json.dumps(problems, indent=2, ensure_ascii=False) + "\n")
        extract, score = (
            command("python", script, "--output_dir", folder, "--output_file", file.name, *more)
            for script, more in (
                ("extract_answer.py", ()),
                ("calculate_score.py", ("--score_file", f"scores_{self.name}_{self.split}.json")),
            )
        )
        return [
            f"MathVista: responses for the official judge: {file} ({extract}, then {score}; the first asks a language "
            "model)"
        ]


def _precision(problem: Any) -> int | None:
    """The decimals of the answer; None where it has none."""
    decimals = problem.get("precision")
    return None if decimals is None else int(decimals)
