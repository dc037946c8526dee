"""lmms-eval's questions in SPHINX's wordings, and SPHINX's boxes in the frame that a benchmark
expects.

lmms-eval's own mechanism, `lmms_eval_specific_kwargs` keyed by the model's name, is read from a
task's YAML file only, and its files name no `sphinx_pl`: a model from outside gets their `default`.
Those are mostly LLaVA-1.5's wordings, which are SPHINX's too (MME, POPE, VQAv2, GQA, TextVQA,
ScienceQA, SEED, captions). `RULES` has the tasks where they are not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sphinx_pl.data.coordinates import Coordinates, Size, to_pixels
from sphinx_pl.data.tasks import TASKS

SHORT = TASKS["short_vqa"].templates[0]
CHOICE = TASKS["multiple_choice"].templates[0]
REC = TASKS["rec"].templates[0]
REG = TASKS["reg"].templates[0]

Ask = Callable[[str, Mapping[str, Any], tuple[Size, ...], Coordinates], str]
"""(context, those of a document's values that the question needs, sizes of its images, the model's
geometry) -> SPHINX's question."""
Answer = Callable[[str, Size, Coordinates], str]
"""(SPHINX's answer, size of the image, the model's geometry) -> what the benchmark reads."""


def _as_given(text: str, size: Size, coordinates: Coordinates) -> str:
    return text


@dataclass(frozen=True)
class PromptRule:
    """The question and the conversion of answers for tasks whose whole name `tasks` matches.

    `needs` are the document's values that are part of the question. `ask` gets no others, so no
    truth.
    """

    tasks: str
    ask: Ask
    answer: Answer = _as_given
    needs: tuple[str, ...] = ()

    def question(self, context: str, doc: Mapping[str, Any], sizes: tuple[Size, ...], coordinates: Coordinates) -> str:
        return self.ask(context, {name: doc[name] for name in self.needs}, sizes, coordinates)


def find_rule(task: str) -> PromptRule | None:
    """The rule for a task of lmms-eval, or None where question and answer stay as they are."""
    return next((rule for rule in RULES if re.fullmatch(rule.tasks, task)), None)


def _phrase(context: str, doc: Mapping[str, Any], sizes: tuple[Size, ...], coordinates: Coordinates) -> str:
    # RefCOCO's sentences, which lmms-eval keeps under "answer" although a box is asked for; of
    # several the first.
    phrase = doc["answer"] if isinstance(doc["answer"], str) else doc["answer"][0]
    return REC.format(phrase=phrase.strip().rstrip("."))


def _region(context: str, doc: Mapping[str, Any], sizes: tuple[Size, ...], coordinates: Coordinates) -> str:
    x, y, width, height = doc["bbox"]
    return REG.format(box=coordinates.box((x, y, x + width, y + height), sizes[0]))


def _okvqa(context: str, doc: Mapping[str, Any], sizes: tuple[Size, ...], coordinates: Coordinates) -> str:
    return context.replace("\nWhen the provided information is insufficient, respond with 'Unanswerable'.", "")


def _vizwiz(context: str, doc: Mapping[str, Any], sizes: tuple[Size, ...], coordinates: Coordinates) -> str:
    # The original's evaluation has this sentence on the question's line.
    return context.replace(
        "\nWhen the provided information is insufficient", " When the provided information is insufficient"
    )


def _mmbench(context: str, doc: Mapping[str, Any], sizes: tuple[Size, ...], coordinates: Coordinates) -> str:
    return context.replace(" There are several options:\n", "\n").replace("\n\nAnswer with", "\nAnswer with")


def _mmvet(context: str, doc: Mapping[str, Any], sizes: tuple[Size, ...], coordinates: Coordinates) -> str:
    return re.sub(r"\AFirst please perform reasoning[^\n]*:\s*", "", context)


def _seed_ppl(context: str, doc: Mapping[str, Any], sizes: tuple[Size, ...], coordinates: Coordinates) -> str:
    return SHORT.format(question=context.removesuffix(" Answer :"))


def _iconqa(context: str, doc: Mapping[str, Any], sizes: tuple[Size, ...], coordinates: Coordinates) -> str:
    choice = re.search(r"Question: (.*)\.\nOptions:\n(.*)\nPlease answer with the option letter", context, re.DOTALL)
    if choice:
        return CHOICE.format(question=choice[1], choices=choice[2])
    free = re.search(r"Question: (.*)\.\nPlease answer the question using a single word", context, re.DOTALL)
    return SHORT.format(question=free[1]) if free else context


def _fractions(text: str, size: Size, coordinates: Coordinates) -> str:
    """The first box in fractions of the image. It is not cut at the edges, so overlaps are those in
    the square."""
    boxes = coordinates.parse_boxes(text)
    if not boxes:
        return text
    x1, y1, x2, y2 = to_pixels(boxes[0], size)
    width, height = size
    return f"[{x1 / width:.6f}, {y1 / height:.6f}, {x2 / width:.6f}, {y2 / height:.6f}]"


def _pixels(text: str, size: Size, coordinates: Coordinates) -> str:
    """The first box in pixels of the image, as JSON."""
    boxes = coordinates.parse_boxes(text)
    if not boxes:
        return text
    return json.dumps([{"bbox_2d": [round(value, 3) for value in to_pixels(boxes[0], size)]}])


RULES = (
    PromptRule(r"refcoco[+g]?_bbox_rec_.*", _phrase, _fractions, needs=("answer",)),
    PromptRule(r"refcoco(_plus|g)?_grounding_.*", _phrase, _pixels, needs=("answer",)),
    PromptRule(r"refcoco[+g]?_(bbox|seg)_.*", _region, needs=("bbox",)),
    PromptRule(r"ok_vqa_.*", _okvqa),
    PromptRule(r"vizwiz_vqa_.*", _vizwiz),
    PromptRule(r"mmbench_en_(dev|test)(_lite)?", _mmbench),
    PromptRule(r"mmvet", _mmvet),
    PromptRule(r"seedbench_ppl.*", _seed_ppl),
    PromptRule(r"iconqa_.*", _iconqa),
)
"""The first rule that matches applies."""
