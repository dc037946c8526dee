"""OK-VQA: questions about COCO images that need outside knowledge, ten answers each.

Files (https://okvqa.allenai.org/download.html): `OpenEnded_mscoco_{split}2014_questions.json` and
`mscoco_{split}2014_annotations.json`, in VQA's format, but without `multiple_choice_answer`.
"""

from __future__ import annotations

from typing import Any

from sphinx_pl.data.converters.common import most_frequent
from sphinx_pl.data.converters.vqav2 import VQAv2Converter


class OKVQAConverter(VQAv2Converter):
    """Trains on the most frequent answer; all ten go to meta for the official metric."""

    name = "okvqa"
    title = "OK-VQA"
    url = "https://okvqa.allenai.org/download.html"
    licence = "see the page"
    prefix = ""

    def answer(self, annotation: Any, answers: list[str]) -> str:
        return most_frequent(answers)
