"""A-OKVQA has questions about COCO images that need common sense and knowledge.

Each question has choices, answers and rationales.

The file (https://github.com/allenai/aokvqa) is `aokvqa_v1p0_{split}.json`, a list of
{"question_id", "image_id", "question", "choices": [four], "correct_choice_idx", "direct_answers":
[ten], "difficult_direct_answer", "rationales": [three]}. The images are those of COCO's
train2017.zip and val2017.zip.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sphinx_pl.data.converters import Converter
from sphinx_pl.data.converters.common import choice_record, keyed, most_frequent, question_record
from sphinx_pl.data.schema import Record


class AOKVQAConverter(Converter):
    """Each question gives two records: one with its choices, one with its most frequent direct
    answer.

    The official evaluation asks for no direct answer if `difficult_direct_answer` is set. Such a
    question gives no second record.
    """

    name = "aokvqa"
    title = "A-OKVQA"
    url = "https://github.com/allenai/aokvqa"
    licence = "see the page"
    tasks = ("multiple_choice", "short_vqa", "yes_no")

    def entries(self) -> Iterator[tuple[str, Any]]:
        yield from keyed(self.json(f"aokvqa_v1p0_{self.split}.json"), "question_id")

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        image = f"{self.split}2017/{entry['image_id']:012d}.jpg"
        meta = {"rationales": entry.get("rationales", [])}
        question, answers = entry["question"], entry["direct_answers"]
        yield choice_record(f"{key}-choice", image, question, entry["choices"], entry["correct_choice_idx"], meta)
        if entry.get("difficult_direct_answer"):
            self.skipped["difficult_direct_answer"] += 1
        else:
            direct = meta | {"answers": answers}
            yield question_record(f"{key}-direct", image, question, most_frequent(answers), direct)
