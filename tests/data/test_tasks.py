import dataclasses
import random
import string

import pytest

from sphinx_pl.data.bad import BadSample
from sphinx_pl.data.geometry import Geometry
from sphinx_pl.data.record import ImageRef, Record, Region, Turn
from sphinx_pl.data.tasks import TASKS, choice_letter, reading_order

G = Geometry()
# 100x50 in a square of 100, moved down by 25
LEFT = Region((10, 5, 20, 15), "red square")  # [0.100,0.300,0.200,0.400]
RIGHT = Region((60, 5, 80, 25), "blue circle")  # [0.600,0.300,0.800,0.500]
LOW = Region((0, 30, 50, 50), "red square")  # [0.000,0.550,0.500,0.750]
BASE = Record("k", "chat", images=(ImageRef("a.jpg"),), sizes=((100, 50),))

PERSON = Region((0, 0, 100, 50), "person", ((50, 25, 2), *[(0, 0, 0)] * 4, (10, 5, 1), *[(0, 0, 0)] * 11))

WRITTEN = {
    "short_vqa": (
        {"question": "What colour is it?", "answer": "red"},
        "What colour is it?\nAnswer the question using a single word or phrase.",
        "red",
    ),
    "relation": (
        {"question": "Where is it?", "answer": "left"},
        "Where is it?\nAnswer the question using a single word or phrase.",
        "left",
    ),
    "multiple_choice": (
        {"question": "Which {digit}?", "answer": "7", "choices": ("3", "7", "9")},
        "Which {digit}?\nA. 3\nB. 7\nC. 9\nAnswer with the option's letter from the given choices directly.",
        "B",
    ),
    "description": ({"answer": " Two shapes. "}, "Generate a detailed description about the image.", "Two shapes."),
    "caption": ({"answer": "shapes"}, "Provide a one-sentence caption for the provided image.", "shapes"),
    "rec": (
        {"question": "the red square", "regions": (LEFT,)},
        "Please provide the bounding box coordinate of the region this sentence describes: the red square.",
        "[0.100,0.300,0.200,0.400]",
    ),
    "reg": (
        {"regions": (LEFT,)},
        "Please provide a short description for this region: [0.100,0.300,0.200,0.400].",
        "red square",
    ),
    "grounded_caption": (
        {"answer": "A {0} left of a {1}.", "regions": (LEFT, RIGHT)},
        "Describe the image concisely. Include the bounding box for each mentioned object.",
        "A <p>red square</p>[0.100,0.300,0.200,0.400] left of a <p>blue circle</p>[0.600,0.300,0.800,0.500].",
    ),
    "detection": (
        {"question": "red square", "regions": (LOW, RIGHT, LEFT)},
        "Detect all red square shown in the image.",
        "[0.100,0.300,0.200,0.400;0.000,0.550,0.500,0.750]",
    ),
    "ocr": (
        {"regions": (RIGHT, LOW, LEFT)},
        "Please detect all texts and provide their bounding box coordinate.",
        "<p>red square</p>[0.100,0.300,0.200,0.400]<p>blue circle</p>[0.600,0.300,0.800,0.500]"
        "<p>red square</p>[0.000,0.550,0.500,0.750]",
    ),
    "pose": (
        {"regions": (PERSON,)},
        "Detect the key points of the person in the region [0.000,0.250,1.000,0.750].",
        "<p>nose</p>[0.500,0.500]<p>left shoulder</p>[0.100,0.300]",
    ),
    "layout": (
        {"regions": (RIGHT, LOW, LEFT)},
        "Detect the layout elements of this page and provide their bounding box coordinate.",
        "<p>red square</p>[0.100,0.300,0.200,0.400;0.000,0.550,0.500,0.750]<p>blue circle</p>[0.600,0.300,0.800,0.500]",
    ),
    "chat": ({"question": "Hello?", "answer": "Hello."}, "Hello?", "Hello."),
    "text": ({"answer": "A document.\n"}, "", "A document.\n"),
}


def record(task, **fields):
    return dataclasses.replace(BASE, task=task, **fields)


def test_every_task_has_its_text_here():
    assert set(WRITTEN) == set(TASKS)


@pytest.mark.parametrize("task", WRITTEN)
def test_written_text(task):
    fields, question, answer = WRITTEN[task]
    assert TASKS[task].turns(record(task, **fields), G) == (Turn(question, answer),)


@pytest.mark.parametrize("task", WRITTEN)
def test_every_wording_can_be_chosen_and_keeps_the_answer(task):
    fields, _, answer = WRITTEN[task]
    rng = random.Random(0)
    turns = [TASKS[task].turns(record(task, **fields), G, rng)[0] for _ in range(50)]
    assert len({turn.question for turn in turns}) == len(TASKS[task].templates)
    assert {turn.answer for turn in turns} == {answer}
    # each wording holds the same information: the slots
    slots = {frozenset(name for _, name, _, _ in string.Formatter().parse(t) if name) for t in TASKS[task].templates}
    assert len(slots) == 1


@pytest.mark.parametrize("task", WRITTEN)
def test_own_turns_are_used_as_they_are(task):
    turns = (Turn("<image>\nOne?", "1"), Turn("Two?", "2"))
    assert TASKS[task].turns(record(task, turns=turns), G, random.Random(0)) == turns


def test_detection_of_nothing_says_none():
    turns = TASKS["detection"].turns(record("detection", question="cat", regions=(LEFT,)), G)
    assert turns[0].answer == "None"


@pytest.mark.parametrize(
    ("task", "fields", "reason"),
    [
        ("short_vqa", {"question": "q", "answer": "  "}, "answer_empty"),
        ("short_vqa", {"question": "", "answer": "a"}, "question_empty"),
        ("short_vqa", {"question": "q", "answer": "a", "images": ()}, "image_absent"),
        ("chat", {"turns": (Turn("q", "a"), Turn("q", ""))}, "answer_empty"),
        ("text", {"answer": "\n"}, "answer_empty"),
        ("multiple_choice", {"question": "q", "answer": "4", "choices": ("3", "7")}, "answer_not_in_choices"),
        ("multiple_choice", {"question": "q", "answer": "3", "choices": ("3",)}, "choices_count"),
        ("rec", {"question": "it"}, "region_missing"),
        ("rec", {"question": "it", "regions": (LEFT,), "sizes": ()}, "size_unknown"),
        ("rec", {"question": "it", "regions": (Region((10, 10, 102, 20)),)}, "box_outside"),
        ("rec", {"question": "it", "regions": (Region((-2, 10, 50, 20)),)}, "box_outside"),
        ("rec", {"question": "it", "regions": (Region((100.5, 10, 100.9, 20)),)}, "box_outside"),
        ("rec", {"question": "it", "regions": (Region((50, 10, 40, 20)),)}, "box_inverted"),
        ("rec", {"question": "it", "regions": (Region((50, 10, 50, 20)),)}, "box_inverted"),
        ("rec", {"question": "it", "regions": (Region((float("nan"), 10, 50, 20)),)}, "box_inverted"),
        ("reg", {"regions": (Region(LEFT.box, " "),)}, "label_empty"),
        ("ocr", {"regions": ()}, "region_missing"),
        ("ocr", {"regions": (Region(LEFT.box, "a</p>"),)}, "label_markup"),
        ("grounded_caption", {"answer": "A {1}", "regions": (LEFT,)}, "region_missing"),
        ("grounded_caption", {"answer": "Nothing", "regions": (LEFT,)}, "region_missing"),
        ("grounded_caption", {"answer": "", "regions": (LEFT,)}, "answer_empty"),
        ("pose", {"regions": (LEFT,)}, "keypoints_count"),
        ("pose", {"regions": (Region(LEFT.box, "", ((0, 0, 0),) * 17),)}, "keypoints_absent"),
        ("pose", {"regions": (Region(LEFT.box, "", ((200, 0, 2),) * 17),)}, "keypoint_outside"),
    ],
)
def test_what_a_task_refuses(task, fields, reason):
    with pytest.raises(BadSample) as caught:
        TASKS[task].turns(record(task, **fields), G)
    assert caught.value.reason == reason


def test_a_box_may_pass_the_edge_by_a_pixel_and_is_cut_there():
    turns = TASKS["rec"].turns(record("rec", question="it", regions=(Region((-0.5, -1, 101, 50)),)), G)
    assert turns[0].answer == "[0.000,0.250,1.000,0.750]"


def test_choice_letter():
    assert choice_letter(record("multiple_choice", answer="9", choices=("3", "7", "9"))) == "C"


def test_reading_order_bears_with_uneven_lines():
    words = [Region((50, 8, 70, 20), "b"), Region((10, 10, 30, 22), "a"), Region((5, 30, 30, 40), "c")]
    assert [region.label for region in reading_order(reversed(words))] == ["a", "b", "c"]
    assert reading_order([]) == []
