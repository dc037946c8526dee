"""MathVista: mathematics on figures, charts and photographs (Lu et al. 2023, arXiv 2310.02255).

Files (https://github.com/lupantech/MathVista, data): `testmini.json`, {pid: {"pid", "question", "image":
"images/1.jpg", "choices": list or null, "unit", "precision", "answer", "question_type": "multi_choice" or "free_form",
"answer_type": "text", "integer", "float" or "list", "metadata": {"task", ...}}}, and the folder `images`. The answers
of the other split, test, are not public.
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
from sphinx_pl.evaluation.benchmarks import Verdict, command
from sphinx_pl.evaluation.benchmarks.choices import letter_record
from sphinx_pl.evaluation.benchmarks.official_only import OfficialOnly
from sphinx_pl.evaluation.measures import Measure, mean
from sphinx_pl.evaluation.runner import Prediction
from sphinx_pl.evaluation.scorers.mathvista import mathvista_match, read_answer
from sphinx_pl.utils.files import write_whole

ANSWER_TYPES = ("text", "integer", "float", "list")


class MathVista(OfficialOnly):
    """Asked for a letter, or for a word or phrase, with the unit where there is one; the official prompt asks for
    reasoning, and a language model finds the answer in it. Here an answer that rules cannot read is wrong and counted,
    so the figure is a lower bound of the official one; the file for the official judge is written as well."""

    name = "mathvista"
    title = "MathVista"
    url = "https://github.com/lupantech/MathVista"
    licence = "CC BY-SA 4.0; the images' own"
    family = "mllm"
    splits = ("testmini",)
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

    def verdict(self, record: Record, answer: str, coordinates: Coordinates) -> Verdict:
        problem = record.meta["problem"]
        choices = problem["choices"] or ()
        said = read_answer(answer, problem["question_type"], problem["answer_type"], choices, _precision(problem))
        return Verdict(float(mathvista_match(said, problem["answer"])), said is not None)

    @property
    def measures(self) -> Sequence[Measure]:
        return (mean("accuracy", "Share of right answers, read by rules and not by a language model."),)

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
    """Decimals of the answer, which are None where it has none."""
    found = problem.get("precision")
    return None if found is None else int(found)
