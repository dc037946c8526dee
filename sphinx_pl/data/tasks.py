"""All instruction wordings, how each task writes its question and answer from a record, and how it reads an answer.

| task               | asks for                        | a record's fields                        | scored by        |
|--------------------|---------------------------------|------------------------------------------|------------------|
| short_vqa          | a word or phrase                | question, answer                         | vqa_exact        |
| relation           | where a thing is, in a word     | question, answer                         | vqa_exact        |
| yes_no             | yes or no                       | question, answer                         | yes_no           |
| multiple_choice    | the letter of a choice          | question, choices, answer                | choice           |
| detailed_answer    | a long answer                   | question, answer                         | caption_f1       |
| description        | a long description              | answer                                   | caption_f1       |
| caption            | one sentence                    | answer                                   | caption_f1       |
| rec                | the box of a phrase             | question (the phrase), regions[0]        | box_iou50        |
| reg                | the phrase of a box             | regions[0] with its label                | text_exact       |
| grounded_caption   | a caption with boxes            | answer with {0}, {1,2}; regions          | grounded_f1      |
| grounded_vqa       | an answer with boxes            | question, answer with {0}; regions       | grounded_answer  |
| detection          | all boxes of one class          | question (the class), regions            | detection_f1     |
| detection_all      | all boxes of all classes        | regions                                  | grounded_f1      |
| ocr                | all texts with boxes            | regions (label: the text)                | ocr_exact        |
| ocr_text           | all texts, one a line           | regions (label: the text)                | edit_similarity  |
| pose               | a person's key points           | regions[0] with keypoints; question: who | keypoint_pck     |
| layout             | a page's parts with boxes       | regions                                  | grounded_f1      |
| relation_detection | how one region relates to other | regions[0], regions[1], answer           | vqa_exact        |
| question_generation| questions about the image       | question (those to write); answer        | caption_f1       |
| chat               | an answer, image or not         | question, answer, or turns               | vqa_exact        |
| text               | nothing: a document is read     | answer                                   | none             |

Finished `turns` stand in for the other fields in every task. In an answer with boxes, `{0}` stands for region 0 (its
label and its box), `{1,2}` for region 1's label with the boxes of both.

The first wording of a task is what evaluation uses. Where the original's demo or evaluation has a prompt, it is that
one, or ours in its style; the others are ours. Adding a task is one `_task(...)` call: a name, a function that fills
the wording's slots and writes the answer, one that reads it back, a scorer and wordings.
"""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sphinx_pl.data.answer_parsing import normalise, read_letter, read_yes_or_no
from sphinx_pl.data.coordinates import (
    BEYOND,
    COCO_KEYPOINTS,
    Box4,
    Geometry,
    Grounded,
    Size,
    point_to_pixels,
    to_pixels,
)
from sphinx_pl.data.schema import PLACEHOLDER, Record, Region, Turn
from sphinx_pl.data.skip import BadSample
from sphinx_pl.utils.registry import Registry

# Annotation tools disagree on whether the last pixel is inside, so a box may pass the image's edge by this much.
EDGE_TOLERANCE = 1.0

_BRACKET = r"[\[({][^\[\](){}\n]*[\])}]"
for _ in range(2):  # so deep are brackets in brackets
    _BRACKET = rf"[\[({{](?:[^\[\](){{}}\n]|{_BRACKET})*[\])}}]"
_BRACKETS = rf"{_BRACKET}(?:[\s,;]*{_BRACKET})*"
_TAGGED = r"(?:<p>(?:(?!</?p>).)*</p>|<(\w{1,16})>[^<>]*</\1>)"
PARTS = re.compile(rf"{_TAGGED}(?:\s*{_BRACKETS})?|{_BRACKETS}|\w+(?:[.,:/'’-]\w+)*", re.DOTALL)
"""What stands in an answer as a whole: a phrase with its places, places alone (in any brackets), a number, a word."""
LINES = re.compile(r"[^\n]+")
WHOLE = re.compile(r".+", re.DOTALL)

_MENTION = re.compile(r"\{([0-9]{1,4}(?:, ?[0-9]{1,4})*)\}")


@dataclass(frozen=True, slots=True)
class Parsed:
    """What an answer's text says: a record's annotations again, as far as the text holds them.

    `answer` is as in a record, with a placeholder for each phrase that has boxes (they number the regions in the order
    of the text); of multiple choice it is the letter. `places` are labels with boxes or points in fractions of the
    padded square, since a text does not tell the image's size. `formed`: whether the text has the form asked for.
    """

    answer: str = ""
    places: tuple[Grounded, ...] = ()
    formed: bool = True

    @property
    def boxes(self) -> list[Box4]:
        """All boxes in order, in fractions of the padded square."""
        return [box for place in self.places for box in place.boxes]

    def regions(self, size: Size) -> tuple[Region, ...]:
        """A region for each box, in pixels of an image (width, height) and cut at its edges."""
        return tuple(
            Region(_inside(to_pixels(box, size), size), place.phrase) for place in self.places for box in place.boxes
        )

    def keypoints(self, size: Size) -> tuple[tuple[float, float, int], ...]:
        """COCO's 17 keypoints in pixels of an image (width, height), as in a `Region`; of a name the first point.

        Text does not tell hidden points from seen ones: those that it names have visibility 2, the others 0.
        """
        named = {normalise(place.phrase): place.points[0] for place in reversed(self.places) if place.points}
        return tuple(
            (*point_to_pixels(named[name], size), 2) if name in named else (0.0, 0.0, 0) for name in COCO_KEYPOINTS
        )


def _inside(box: Box4, size: Size) -> Box4:
    (x1, y1, x2, y2), (width, height) = box, size
    return min(max(x1, 0.0), width), min(max(y1, 0.0), height), max(min(x2, width), 0.0), max(min(y2, height), 0.0)


Writer = Callable[[Record, Geometry], tuple[dict[str, str], str]]
Reader = Callable[[str, Geometry], Parsed]


@dataclass(frozen=True)
class Task:
    """One kind of question. `scorer` names an entry of the metric registry, `max_new_tokens` bounds the answer.

    `parse` is the other direction of `write`: it takes any text, and never raises. `given` are the wordings in place
    of `templates` for records that fill the optional slot `given_slot`. `parts` finds what of an answer is whole or is
    not there at all, where an answer that is too long is cut.
    """

    name: str
    templates: tuple[str, ...]
    write: Writer  # -> (values for the wording's slots, answer)
    parse: Reader
    scorer: str
    max_new_tokens: int
    needs_image: bool = True
    given_slot: str = ""
    given: tuple[str, ...] = ()
    parts: re.Pattern[str] = PARTS

    def turns(self, record: Record, geometry: Geometry, rng: random.Random | None = None) -> tuple[Turn, ...]:
        """The conversation of a record: its own turns where it has them, else one written from its annotations.

        Args:
            rng: chooses the wording; None takes the first.

        Raises:
            BadSample: the record lacks what the task needs, or its geometry is impossible.
        """
        if self.needs_image and not record.images:
            raise BadSample("image_absent", f"{record.key} has no image, its task {self.name} needs one")
        turns = record.turns or (self._write(record, geometry, rng),)
        if any(not turn.answer.strip() for turn in turns):
            raise BadSample("answer_empty", record.key)
        return turns

    def _write(self, record: Record, geometry: Geometry, rng: random.Random | None) -> Turn:
        slots, answer = self.write(record, geometry)
        templates = self.given if self.given_slot in slots else self.templates
        template = rng.choice(templates) if rng else templates[0]
        return Turn(template.format(**slots), answer)


TASKS: Registry[Task] = Registry("task", "docs/data.md")


def _task(
    name: str,
    write: Writer,
    parse: Reader,
    scorer: str,
    max_new_tokens: int,
    *templates: str,
    needs_image: bool = True,
    given_slot: str = "",
    given: tuple[str, ...] = (),
    parts: re.Pattern[str] = PARTS,
) -> None:
    task = Task(name, templates, write, parse, scorer, max_new_tokens, needs_image, given_slot, given, parts)
    TASKS.register(name, task)


def choice_letter(record: Record) -> str:
    """The letter ("A", "B", ...) of a record's answer among its choices.

    Raises:
        BadSample: the answer is not one of the choices, one of these is blank or repeated, or there are more than 26.
    """
    if not 2 <= len(record.choices) <= len(string.ascii_uppercase):
        raise BadSample("choices_count", f"{record.key} has {len(record.choices)} choices")
    if not all(choice.strip() for choice in record.choices):
        raise BadSample("choice_empty", f"{record.key}: {record.choices}")
    if repeated := repeated_choice(record.choices):
        raise BadSample("choices_repeated", f"{record.key}: {repeated}")
    if record.answer not in record.choices:
        raise BadSample("answer_not_in_choices", record.key)
    return string.ascii_uppercase[record.choices.index(record.answer)]


def repeated_choice(choices: Iterable[str]) -> str:
    """The choice that stands there more than once but for white space; "" if none does."""
    ((choice, count),) = Counter(" ".join(choice.split()) for choice in choices).most_common(1)
    return choice if count > 1 else ""


def reading_order(regions: Iterable[Region]) -> list[Region]:
    """Regions line by line from the top, each line from the left.

    A region is on the line that an earlier (higher) one opened if its vertical middle is above that one's lower edge.
    """
    ordered: list[Region] = []
    line: list[Region] = []
    for region in sorted(regions, key=lambda region: (region.box[1], region.box[0])):
        if line and (region.box[1] + region.box[3]) / 2 >= line[0].box[3]:
            ordered += sorted(line, key=lambda region: region.box[0])
            line = []
        line.append(region)
    return ordered + sorted(line, key=lambda region: region.box[0])


def _size(record: Record) -> Size:
    if not record.sizes:
        raise BadSample("size_unknown", f"{record.key} has geometry but its image has no width and height")
    _check_unit(record)
    return record.sizes[0]


def _check_unit(record: Record) -> None:
    """Raises: BadSample: all boxes or all keypoints lie within one pixel, so they are fractions of the image."""
    if record.sizes and max(record.sizes[0]) == 1:
        return
    boxes = [region.box for region in record.regions]
    points = [point[:2] for region in record.regions for point in region.keypoints if point[2]]
    for name, places in (("box", boxes), ("keypoint", points)):
        if places and all(-BEYOND <= number <= 1 + BEYOND for place in places for number in place):
            raise BadSample(
                f"{name}_below_pixel", f"{record.key}: {places[0]} must be in pixels of the image, not in fractions"
            )


def _checked_box(record: Record, region: Region) -> Box4:
    """The region's box, cut at the image's edges."""
    width, height = _size(record)
    x1, y1, x2, y2 = region.box
    if not (x1 < x2 and y1 < y2):  # also true of NaN
        raise BadSample("box_inverted", f"{record.key}: {region.box}")
    if min(x1, y1) < -EDGE_TOLERANCE or x2 > width + EDGE_TOLERANCE or y2 > height + EDGE_TOLERANCE:
        raise BadSample("box_outside", f"{record.key}: {region.box} in {width}x{height}")
    x1, y1, x2, y2 = cut = _inside(region.box, (width, height))
    if not (x1 < x2 and y1 < y2):
        raise BadSample("box_outside", f"{record.key}: {region.box} in {width}x{height}")
    return cut


def _regions(record: Record) -> tuple[Region, ...]:
    if not record.regions:
        raise BadSample("region_missing", record.key)
    _check_unit(record)
    return record.regions


def _label(record: Record, region: Region) -> str:
    label = region.label.strip()
    if not label:
        raise BadSample("label_empty", record.key)
    if any(mark in label for mark in ("<p>", "</p>", PLACEHOLDER)):
        raise BadSample("label_markup", f"{record.key}: {label}")
    return label


def _question(record: Record) -> str:
    question = record.question.strip()
    if not question:
        raise BadSample("question_empty", record.key)
    return question


def _answer(record: Record) -> str:
    return record.answer.strip()  # an empty one is refused by Task.turns, for every task


def _grounded(record: Record, geometry: Geometry, *regions: Region) -> str:
    """The first region's label with the boxes of all."""
    boxes = [_checked_box(record, region) for region in regions]
    return geometry.grounded(_label(record, regions[0]), boxes, _size(record))


def _grounded_answer(record: Record, geometry: Geometry) -> str:
    """The record's answer with its placeholders filled."""

    def phrase(match: re.Match[str]) -> str:
        indices = [int(index) for index in match[1].split(",")]
        if max(indices) >= len(record.regions):
            raise BadSample("region_missing", f"{record.key} mentions region {max(indices)} of {len(record.regions)}")
        return _grounded(record, geometry, *(record.regions[index] for index in indices))

    answer, mentioned = _MENTION.subn(phrase, _answer(record))
    if answer and not mentioned:
        raise BadSample("region_missing", f"{record.key} mentions no region")
    return answer


def _write_question(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    return {"question": _question(record)}, _answer(record)


def _write_choice(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    answer = choice_letter(record)
    # A line break inside a choice could make two of it.
    choices = (" ".join(choice.split()) for choice in record.choices)
    lines = (f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False))
    return {"question": _question(record), "choices": "\n".join(lines)}, answer


def _write_answer(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    return {}, _answer(record)


def _write_rec(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    box = _checked_box(record, _regions(record)[0])
    return {"phrase": _question(record).rstrip(".")}, geometry.box(box, _size(record))


def _write_reg(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    region = _regions(record)[0]
    return {"box": geometry.box(_checked_box(record, region), _size(record))}, _label(record, region)


def _write_yes_no(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    answer = normalise(record.answer)
    if answer and answer not in ("yes", "no"):
        raise BadSample("answer_not_yes_no", f"{record.key}: {record.answer}")
    return {"question": _question(record)}, answer


def _write_grounded_caption(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    return {}, _grounded_answer(record, geometry)


def _write_grounded_vqa(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    return {"question": _question(record)}, _grounded_answer(record, geometry)


def _write_detection(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    label = _question(record)
    # A region without a label could be one of those that are asked for.
    found = reading_order(region for region in record.regions if _label(record, region) == label)
    boxes = [_checked_box(record, region) for region in found]
    return {"label": label}, geometry.boxes(boxes, _size(record)) if boxes else "None"


def _write_ocr(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    return {}, "".join(_grounded(record, geometry, region) for region in reading_order(_regions(record)))


def _write_ocr_text(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    # A line break inside a label would make two texts of it.
    return {}, "\n".join(" ".join(_label(record, region).split()) for region in reading_order(_regions(record)))


def _write_pose(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    person = _regions(record)[0]
    size = _size(record)
    if len(person.keypoints) != len(COCO_KEYPOINTS):
        raise BadSample("keypoints_count", f"{record.key} has {len(person.keypoints)}, not {len(COCO_KEYPOINTS)}")
    present = [(x, y) for x, y, visibility in person.keypoints if visibility]
    if not present:
        raise BadSample("keypoints_absent", record.key)
    if any(
        not (-EDGE_TOLERANCE <= value <= limit + EDGE_TOLERANCE)
        for point in present
        for value, limit in zip(point, size, strict=True)
    ):
        raise BadSample("keypoint_outside", record.key)
    named = {"person": _question(record).rstrip(".")} if record.question.strip() else {}
    return {"box": geometry.box(_checked_box(record, person), size)} | named, geometry.keypoints(person.keypoints, size)


def _write_groups(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    groups: dict[str, list[Box4]] = {}
    for region in reading_order(_regions(record)):
        groups.setdefault(_label(record, region), []).append(_checked_box(record, region))
    return {}, "".join(geometry.grounded(label, boxes, _size(record)) for label, boxes in groups.items())


def _write_relation(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    if len(record.regions) < 2:
        raise BadSample("region_missing", f"{record.key} has {len(record.regions)} of subject and object")
    subject, other = (_grounded(record, geometry, region) for region in record.regions[:2])
    return {"subject": subject, "object": other}, _answer(record)


def _write_questions(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    return {"answer": answer} if (answer := _answer(record)) else {}, _question(record)


def read_text(text: str, geometry: Geometry) -> Parsed:
    """The text as it is."""
    return Parsed(text)


def read_yes_no(text: str, geometry: Geometry) -> Parsed:
    """ "yes" or "no" where the text begins with that word, in any case, and does not say the other one too."""
    yes = read_yes_or_no(text)
    return Parsed(formed=False) if yes is None else Parsed("yes" if yes else "no")


def read_choice(text: str, geometry: Geometry) -> Parsed:
    """The letter that the text begins with, if it names no other: "B", "b", "(B)", "B. text"; "Blue" is no letter."""
    letter = read_letter(text)
    return Parsed(letter) if letter else Parsed(formed=False)


def read_boxes(text: str, geometry: Geometry) -> Parsed:
    """All boxes, as one place without a label."""
    boxes = tuple(geometry.parse_boxes(text))
    return Parsed(places=(Grounded("", boxes),)) if boxes else Parsed(formed=False)


def read_detection(text: str, geometry: Geometry) -> Parsed:
    """All boxes, or none where the text says "None"."""
    return Parsed() if normalise(text) == "none" else read_boxes(text, geometry)


def read_grounded(text: str, geometry: Geometry) -> Parsed:
    """All phrases with their boxes."""
    places = tuple(geometry.parse_grounded(text))
    return Parsed(places=places, formed=any(place.boxes for place in places))


def read_ocr(text: str, geometry: Geometry) -> Parsed:
    """All phrases with a place, whether that is a box or a point: what counts is the text."""
    places = tuple(geometry.parse_grounded(text))
    return Parsed(places=places, formed=bool(places))


def read_keypoints(text: str, geometry: Geometry) -> Parsed:
    """All phrases with their points."""
    places = tuple(geometry.parse_grounded(text))
    return Parsed(places=places, formed=any(place.points for place in places))


def read_lines(text: str, geometry: Geometry) -> Parsed:
    """A label without a place for each line that is not blank."""
    places = tuple(Grounded(line.strip()) for line in text.splitlines() if line.strip())
    return Parsed(places=places, formed=bool(places))


def read_grounded_answer(text: str, geometry: Geometry) -> Parsed:
    """All phrases with their boxes, and the text with a placeholder for each: `{0}`, or `{1,2}` where it has two."""
    answer, places, count = "", [], 0
    for part in geometry.cut_grounded(text):
        if isinstance(part, str):
            answer += part
            continue
        places.append(part)
        numbers = ",".join(str(count + i) for i in range(len(part.boxes)))
        answer += f"{{{numbers}}}" if numbers else part.phrase
        count += len(part.boxes)
    return Parsed(answer, tuple(places), formed=count > 0)


_task(
    "short_vqa",
    _write_question,
    read_text,
    "vqa_exact",
    10,
    "{question}\nAnswer the question using a single word or phrase.",
    "{question}\nGive a short answer.",
    parts=WHOLE,
)
_task(
    "relation",
    _write_question,
    read_text,
    "vqa_exact",
    10,
    "{question}\nAnswer the question using a single word or phrase.",
    "{question}\nGive a short answer.",
    parts=WHOLE,
)
_task(
    "multiple_choice",
    _write_choice,
    read_choice,
    "choice",
    10,
    "{question}\n{choices}\nAnswer with the option's letter from the given choices directly.",
    "{question}\n{choices}\nReply with the letter of the right option.",
    parts=WHOLE,
)
_task(
    "description",
    _write_answer,
    read_text,
    "caption_f1",
    256,
    "Generate a detailed description about the image.",
    "Describe this image in detail.",
    "What is in this image? Tell me everything that you see.",
)
_task(
    "caption",
    _write_answer,
    read_text,
    "caption_f1",
    64,
    "Provide a one-sentence caption for the provided image.",
    "Describe the image in one sentence.",
    "Write a short caption for this image.",
)
_task(
    "rec",
    _write_rec,
    read_boxes,
    "box_iou50",
    30,
    "Please provide the bounding box coordinate of the region this sentence describes: {phrase}.",
    "Where is {phrase}? Answer with its bounding box.",
    parts=WHOLE,
)
_task(
    "reg",
    _write_reg,
    read_text,
    "text_exact",
    32,
    "Please provide a short description for this region: {box}.",
    "What is in the region {box}? Describe it briefly.",
    parts=WHOLE,
)
_task(
    "grounded_caption",
    _write_grounded_caption,
    read_grounded_answer,
    "grounded_f1",
    256,
    "Describe the image concisely. Include the bounding box for each mentioned object.",
    "Give a brief description of the image with the bounding box of every object that you mention.",
)
_task(
    "detection",
    _write_detection,
    read_detection,
    "detection_f1",
    256,
    "Detect all {label} shown in the image.",
    "Find every {label} in the image and give the bounding boxes.",
    parts=WHOLE,
)
_task(
    "ocr",
    _write_ocr,
    read_ocr,
    "ocr_exact",
    256,
    "Please detect all texts and provide their bounding box coordinate.",
    "Read all the text in the image and give the bounding box of each piece.",
)
_task(
    "pose",
    _write_pose,
    read_keypoints,
    "keypoint_pck",
    512,
    "Detect the key points of the person in the region {box}.",
    "Where are the body key points of the person in {box}?",
    given_slot="person",
    given=("Detect the key points of {person}.", "Where are the body key points of {person}?"),
)
_task(
    "layout",
    _write_groups,
    read_grounded,
    "grounded_f1",
    256,
    "Detect the layout elements of this page and provide their bounding box coordinate.",
    "Which parts does this page have? Give the bounding boxes of each kind.",
)
_task("chat", _write_question, read_text, "vqa_exact", 256, "{question}", needs_image=False)
# A document of plain text: no instruction, and all of it is supervised.
_task("text", lambda record, geometry: ({}, record.answer), read_text, "none", 64, "", needs_image=False)

# New tasks come last: a task's number in a batch is its place here.
_task(
    "yes_no",
    _write_yes_no,
    read_yes_no,
    "yes_no",
    10,
    "{question}\nAnswer the question using a single word or phrase.",
    "{question}\nPlease answer yes or no.",
    parts=WHOLE,
)
_task(
    "detailed_answer",
    _write_question,
    read_text,
    "caption_f1",
    512,
    "{question}\nAnswer the question in detail.",
    "{question}\nGive a long answer and explain it.",
)
_task(
    "grounded_vqa",
    _write_grounded_vqa,
    read_grounded_answer,
    "grounded_answer",
    256,
    "{question}\nInclude the bounding box for each mentioned object.",
    "{question}\nGive the bounding box of every object that you mention.",
)
_task(
    "detection_all",
    _write_groups,
    read_grounded,
    "grounded_f1",
    512,
    "Detect all objects shown in the image.",
    "Which objects are in the image? Give the bounding boxes of each kind.",
)
_task(
    "ocr_text",
    _write_ocr_text,
    read_lines,
    "edit_similarity",
    512,
    "Please detect all texts.",
    "Read all the text in the image, one piece on each line.",
    parts=LINES,
)
_task(
    "relation_detection",
    _write_relation,
    read_text,
    "vqa_exact",
    16,
    "What is the relation between {subject} and {object}?\nAnswer the question using a single word or phrase.",
    "How does {subject} relate to {object}? Give a short answer.",
    parts=WHOLE,
)
_task(
    "question_generation",
    _write_questions,
    read_text,
    "caption_f1",
    128,
    "Ask a question about the image.",
    "What could one ask about this image?",
    given_slot="answer",
    given=(
        "Ask a question about the image that has this answer: {answer}",
        "Which question about this image is answered by: {answer}",
    ),
    parts=LINES,
)
