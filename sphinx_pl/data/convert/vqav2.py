"""VQAv2: open questions about COCO images, ten answers each.

Files (https://visualqa.org/download.html): `v2_OpenEnded_mscoco_{split}2014_questions.json` with {"questions":
[{"question_id", "image_id", "question"}]} and `v2_mscoco_{split}2014_annotations.json` with {"annotations":
[{"question_id", "image_id", "multiple_choice_answer", "answers": [{"answer", ...}], "question_type", "answer_type"}]}.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sphinx_pl.data.convert import Converter
from sphinx_pl.data.record import ImageRef, Record


class VQAv2(Converter):
    """Trains on the most frequent answer, `multiple_choice_answer`; all ten go to meta for the official metric."""

    name = "vqav2"
    title = "VQAv2"
    url = "https://visualqa.org/download.html"
    licence = "CC BY 4.0 (annotations)"
    tasks = ("short_vqa",)

    def entries(self) -> Iterator[tuple[str, Any]]:
        questions = self.json(f"v2_OpenEnded_mscoco_{self.split}2014_questions.json")["questions"]
        annotations = self.json(f"v2_mscoco_{self.split}2014_annotations.json")["annotations"]
        answers = {annotation.get("question_id"): annotation for annotation in annotations}
        for question in questions:
            yield str(question.get("question_id")), (question, answers.get(question.get("question_id")))

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        question, annotation = entry
        image = f"{self.split}2014/COCO_{self.split}2014_{question['image_id']:012d}.jpg"
        yield Record(
            key=key,
            task="short_vqa",
            images=(ImageRef(image),),
            question=question["question"],
            answer=annotation["multiple_choice_answer"],
            meta={"answers": [answer["answer"] for answer in annotation["answers"]]},
        )
