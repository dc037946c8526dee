"""OK-VQA has questions about COCO images that need outside knowledge, with ten answers each.

The files (https://okvqa.allenai.org/download.html) are
`OpenEnded_mscoco_{split}2014_questions.json` and `mscoco_{split}2014_annotations.json`. They have
VQA's format, but no `multiple_choice_answer`.
"""

from __future__ import annotations

from typing import Any

from sphinx_pl.data.converters.common import most_frequent
from sphinx_pl.data.converters.vqav2 import VQAv2Converter


class OKVQAConverter(VQAv2Converter):
    """The target is the most frequent answer. meta keeps all ten for the official metric."""

    name = "okvqa"
    title = "OK-VQA"
    url = "https://okvqa.allenai.org/download.html"
    licence = "see the page"
    prefix = ""

    def answer(self, annotation: Any, answers: list[str]) -> str:
        return most_frequent(answers)
