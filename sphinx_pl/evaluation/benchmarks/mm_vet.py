"""MM-Vet: open questions that take several abilities at once (Yu et al. 2023, arXiv 2308.02490).

Files (https://github.com/yuweihao/MM-Vet, mm-vet.zip): `mm-vet.json`, {"v1_0": {"imagename",
"question", "answer", "imagesource", "capability": ["ocr", "math", ...]}}, and the folder `images`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sphinx_pl.data.converters.common import asked, text
from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.evaluation.benchmarks.base import JudgedBenchmark, command
from sphinx_pl.evaluation.runner import Prediction
from sphinx_pl.utils.files import write_whole


class MMVetBenchmark(JudgedBenchmark):
    """Questions that take several abilities, which the official judge scores."""

    name = "mm_vet"
    title = "MM-Vet"
    url = "https://github.com/yuweihao/MM-Vet"
    licence = "CC BY-NC 4.0; the images' own"
    family = "mllm"
    splits = ("v1",)
    max_new_tokens = 512

    def entries(self) -> Iterator[tuple[str, Any]]:
        yield from self.json("mm-vet.json").items()

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        image = (ImageRef(f"images/{text(entry['imagename'])}"),)
        meta = {"question_id": key, "capability": list(entry["capability"])}
        yield Record(key, "chat", image, question=asked(entry["question"]), answer=text(entry["answer"]), meta=meta)

    def submit(self, predictions: Sequence[Prediction], folder: Path) -> list[str]:
        """Write an answer to every question, blank where it was not asked, as the judge expects."""
        given = {prediction.record["meta"]["question_id"]: prediction.prediction for prediction in predictions}
        names = [name for name, _ in self.entries()]
        file = folder / f"answers_{self.name}_{self.split}.json"
        answers = {name: given.get(name, "") for name in names}
        write_whole(file, json.dumps(answers, indent=2, ensure_ascii=False) + "\n")
        blank = sum(name not in given for name in names)
        paths = "--mmvet_path", self.src, "--result_path", folder
        judge = command("python", "mm-vet_evaluator.py", *paths, "--model", file.stem)
        return [
            f"MM-Vet: answers for the official judge: {file} ({judge}; it asks GPT-4)"
            + (f"; {blank} of {len(names)} questions have no answer" if blank else "")
        ]
