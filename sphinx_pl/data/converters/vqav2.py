"""VQAv2 has open questions about COCO images, with ten answers each.

The files (https://visualqa.org/download.html) are `v2_OpenEnded_mscoco_{split}2014_questions.json`
with {"questions": [{"question_id", "image_id", "question"}]} and
`v2_mscoco_{split}2014_annotations.json` with {"annotations": [{"question_id", "image_id",
"multiple_choice_answer", "answers": [{"answer", ...}], "question_type", "answer_type"}]}. The
images are those of COCO's train2014.zip and val2014.zip.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from sphinx_pl.data.converters import Converter
from sphinx_pl.data.converters.common import keyed, question_record, text
from sphinx_pl.data.schema import Record
from sphinx_pl.data.skip import SkipSample


class VQAv2Converter(Converter):
    """The target is the most frequent answer, `multiple_choice_answer`.

    All ten answers are kept in meta for the official metric.
    """

    name = "vqav2"
    title = "VQAv2"
    url = "https://visualqa.org/download.html"
    licence = "CC BY 4.0 (annotations)"
    tasks = ("short_vqa", "yes_no")
    prefix: ClassVar[str] = "v2_"

    def entries(self) -> Iterator[tuple[str, Any]]:
        questions = self.json(f"{self.prefix}OpenEnded_mscoco_{self.split}2014_questions.json")["questions"]
        annotations = self.json(f"{self.prefix}mscoco_{self.split}2014_annotations.json")["annotations"]
        by_question = dict(keyed(annotations, "question_id"))
        for key, question in keyed(questions, "question_id"):
            yield key, (question, by_question.get(key))

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        question, annotation = entry
        if annotation is None:
            raise SkipSample("annotation_missing", key)
        answers = [answer["answer"] for answer in annotation["answers"]]
        yield question_record(
            key,
            f"{self.split}2014/COCO_{self.split}2014_{question['image_id']:012d}.jpg",
            question["question"],
            self.answer(annotation, answers),
            {
                "answers": answers,
                "question_type": annotation.get("question_type"),
                "answer_type": annotation.get("answer_type"),
            },
        )

    def answer(self, annotation: Any, answers: list[str]) -> str:
        return text(annotation["multiple_choice_answer"])
