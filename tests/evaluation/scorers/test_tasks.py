"""Every scorer of tasks against cases worked by hand; the working stands beside the number."""

from __future__ import annotations

import dataclasses

import pytest

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.schema import ImageRef, Record, Region, Turn
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.evaluation.scorers.base import Score
from sphinx_pl.evaluation.scorers.tasks import SCORERS, register, scorer_of
from sphinx_pl.utils.errors import UserError
from tests.examples import EXAMPLES

GEOMETRY = Coordinates(decimals=3)
IMAGE = (ImageRef("unused.png"),)
SQUARE = ((100, 100),)


def record(task: str, **fields: object) -> Record:
    return Record(key="k", task=task, images=IMAGE, sizes=SQUARE, **fields)  # type: ignore[arg-type]


def score(name: str, prediction: str, item: Record) -> float:
    return SCORERS[name](prediction, item, GEOMETRY).value


VQA = record("short_vqa", question="What colour?", answer="Red")


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("Red", 1), (" red. ", 1), ("red\n", 1), ("", 0), ("reddish", 0), ("red circle", 0), ("r.e.d", 0)],
)
def test_vqa_exact(prediction: str, expected: float) -> None:
    assert score("vqa_exact", prediction, VQA) == expected


REG = record("reg", regions=(Region((10, 10, 50, 50), "Red square"),))


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("Red square", 1), ("  Red  square ", 1), ("red square", 0), ("Red square.", 0), ("", 0)],
)
def test_text_exact(prediction: str, expected: float) -> None:
    assert score("text_exact", prediction, REG) == expected


CHOICE = record("multiple_choice", question="Which?", choices=("blue", "red", "green"), answer="red")


@pytest.mark.parametrize(
    ("prediction", "expected", "parsed"),
    [
        ("B", 1, True),
        ("b", 1, True),
        ("(B)", 1, True),
        ("B. red", 1, True),
        ("A", 0, True),
        ("Blue", 0, False),  # begins with the right letter, but is a word
        ("A red one", 0, False),
        ("", 0, False),
        ("A. blue\nB. red\nC. green", 0, False),
        ("B. red or C. green", 0, False),
        ("b) or c)", 0, False),
    ],
)
def test_choice(prediction: str, expected: float, parsed: bool) -> None:
    assert score("choice", prediction, CHOICE) == expected
    assert SCORERS["choice"].parsed(prediction, CHOICE) is parsed


def test_letters_of_a_repetition_are_known_by_their_options() -> None:
    """Also where the record has only a finished conversation."""
    question = TASKS["multiple_choice"].turns(CHOICE, GEOMETRY)[-1]
    for item in (CHOICE, record("multiple_choice", turns=(question,))):
        for text, answer in (("B) red A) blue C) green", 0), ("B. C. Red", 0), ("B. red", 1), ("B. It is D. Trump", 1)):
            assert SCORERS["choice"](text, item, GEOMETRY) == Score(answer, bool(answer))


CAPTION = record("caption", answer="A red circle and a blue square.")  # 7 words, "a" twice


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("a blue square and a red circle", 1.0),  # order does not count: 7 of 7 both ways
        ("a a a", 0.4),  # "a" counts twice: precision 2/3, recall 2/7 -> 2 * 2 / (3 + 7)
        ("red", 2 / 8),  # 1 of 1 and 1 of 7 -> 2 * 1 / (1 + 7)
        ("green", 0.0),
        ("", 0.0),
    ],
)
def test_caption_f1(prediction: str, expected: float) -> None:
    assert score("caption_f1", prediction, CAPTION) == pytest.approx(expected)


REC = record("rec", question="the red one", regions=(Region((10, 20, 50, 60), "red"),))  # truth [.1,.2,.5,.6]


@pytest.mark.parametrize(
    ("prediction", "expected", "parsed"),
    [
        ("[0.100,0.200,0.500,0.600]", 1, True),
        ("[0.5,0.6,0.1,0.2]", 1, True),  # corners swapped
        ("[0.1,0.2,0.5,0.4]", 1, True),  # the upper half of the truth: IoU .08 / .16 = 0.5 exactly
        ("[0.1,0.2,0.5,0.39]", 0, True),  # IoU .19 / .4 = 0.475
        ("[0.3,0.2,0.7,0.6]", 0, True),  # half beside it: .08 / (.16 + .16 - .08) = 1/3
        ("[0,0,0.1,0.1;0.1,0.2,0.5,0.6]", 0, True),  # only the first box counts
        ("It is at [0.1,0.2,0.5,0.6], I think", 1, True),
        ("[0.1,0.2,0.5]", 0, False),
        ("[0.1,0.2,0.5,0.6", 0, False),  # cut off: the last number may lack digits
        ("", 0, False),
    ],
)
def test_box_iou50(prediction: str, expected: float, parsed: bool) -> None:
    assert score("box_iou50", prediction, REC) == expected
    assert SCORERS["box_iou50"].parsed(prediction, REC) is parsed


def test_boxes_are_compared_in_the_padded_square() -> None:
    # 200 x 100 is padded by 50 above and below: rows 0..100 become 0.25..0.75.
    item = Record("k", "rec", IMAGE, ((200, 100),), question="it", regions=(Region((0, 0, 100, 100), "it"),))
    assert score("box_iou50", "[0,0.25,0.5,0.75]", item) == 1
    assert score("box_iou50", "[0,0,0.5,1]", item) == 1  # IoU .25 / .5 = 0.5
    assert score("box_iou50", "[0,0,0.5,0.5]", item) == 0  # overlap .125 of .375 = 1/3


TWO = record("detection", question="dot", regions=(Region((0, 0, 20, 20), "dot"), Region((50, 50, 90, 90), "dot")))
NOTHING = record("detection", question="dot", regions=(Region((0, 0, 20, 20), "cube"),))


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("[0,0,0.2,0.2;0.5,0.5,0.9,0.9]", 1.0),
        ("[0.5,0.5,0.9,0.9;0,0,0.2,0.2]", 1.0),  # order does not count
        ("[0,0,0.2,0.2]", 2 / 3),  # 1 hit: 2 * 1 / (1 + 2)
        ("[0,0,0.2,0.2;0,0,0.2,0.2]", 0.5),  # a double counts once: 2 * 1 / (2 + 2)
        ("[0,0,0.2,0.2;0.5,0.5,0.9,0.9;0.3,0,0.4,0.1]", 0.8),  # one too many: 2 * 2 / (3 + 2)
        ("None", 0.0),
        ("", 0.0),
    ],
)
def test_detection_f1(prediction: str, expected: float) -> None:
    assert score("detection_f1", prediction, TWO) == pytest.approx(expected)


@pytest.mark.parametrize(("prediction", "expected"), [("None", 1), ("none.", 1), ("[0,0,0.2,0.2]", 0), ("", 0)])
def test_detection_of_nothing(prediction: str, expected: float) -> None:
    assert score("detection_f1", prediction, NOTHING) == expected


def test_matching_takes_the_best_overlap_first() -> None:
    # Truths A = [0,0,.4,.4] and B = [.1,0,.5,.4], with an IoU of .12/.2 = .6. The first prediction is B and reaches A
    # too; the second is a part of A (.12/.16 = .75 with A, .08/.2 = .4 with B). Taken in order of prediction and truth
    # the first would use up A, and the second would be left without any.
    item = record("detection", question="dot", regions=(Region((0, 0, 40, 40), "dot"), Region((10, 0, 50, 40), "dot")))
    assert score("detection_f1", "[0.1,0,0.5,0.4;0,0,0.3,0.4]", item) == 1.0


GROUNDED = record(
    "grounded_caption",
    answer="{0} left of {1}.",
    regions=(Region((0, 0, 20, 20), "a dot"), Region((50, 50, 90, 90), "a cube")),
)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("<p>a dot</p>[0,0,0.2,0.2] left of <p>a cube</p>[0.5,0.5,0.9,0.9].", 1.0),
        ("<p>A Dot</p>[0,0,0.2,0.2]", 2 / 3),  # 2 * 1 / (1 + 2)
        ("<p>a cube</p>[0,0,0.2,0.2]<p>a dot</p>[0.5,0.5,0.9,0.9]", 0.0),  # right boxes, wrong phrases
        ("[0,0,0.2,0.2;0.5,0.5,0.9,0.9]", 0.0),  # no phrases
        ("<p>a dot</p>", 0.0),
        ("", 0.0),
    ],
)
def test_grounded_f1(prediction: str, expected: float) -> None:
    assert score("grounded_f1", prediction, GROUNDED) == pytest.approx(expected)


OCR = record("ocr", regions=(Region((60, 0, 80, 20), "7"), Region((0, 0, 20, 20), "4")))  # read from the left: 4, 7


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("<p>4</p>[0,0,0.2,0.2]<p>7</p>[0.6,0,0.8,0.2]", 1),
        ("<p>4</p>[0.5,0.5,0.6,0.6]<p>7</p>[0,0,0.1,0.1]", 1),  # places do not count
        ("<p>7</p>[0.6,0,0.8,0.2]<p>4</p>[0,0,0.2,0.2]", 0),
        ("<p>4</p>[0,0,0.2,0.2]", 0),
        ("47", 0),
        ("", 0),
    ],
)
def test_ocr_exact(prediction: str, expected: float) -> None:
    assert score("ocr_exact", prediction, OCR) == expected


# Box 30 x 40 pixels of 100: diagonal 0.5, so points may be off by 0.05. Two keypoints are labelled.
POSE = record(
    "pose",
    regions=(Region((10, 10, 40, 50), "person", ((20, 20, 2), (30, 20, 1), *[(0, 0, 0)] * 15)),),
)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("<p>nose</p>[0.2,0.2]<p>left eye</p>[0.3,0.2]", 1.0),
        ("<p>nose</p>[0.23,0.239]<p>left eye</p>[0.33,0.241]", 0.5),  # off by .0492 and .0508
        ("<p>nose</p>[0.3,0.2]<p>left eye</p>[0.2,0.2]", 0.0),  # swapped names
        ("<p>nose</p>[0.9,0.9]<p>nose</p>[0.2,0.2]", 0.0),  # no second chance
        ("<p>nose</p>[0.2,0.2]<p>left ankle</p>[0.2,0.2]", 0.5),  # an unlabelled one neither helps nor harms
        ("[0.2,0.2;0.3,0.2]", 0.0),  # no names
        ("", 0.0),
    ],
)
def test_keypoint_pck(prediction: str, expected: float) -> None:
    assert score("keypoint_pck", prediction, POSE) == expected


# The same person by name: the box is the record's then, and without one the keypoints' own extent.
@pytest.mark.parametrize(("prediction", "expected"), [("<p>nose</p>[0.23,0.239]", 0.5), ("<p>nose</p>[0.23,0.241]", 0)])
def test_keypoint_pck_of_a_named_person(prediction: str, expected: float) -> None:
    named = dataclasses.replace(POSE, question="the man in red")
    assert score("keypoint_pck", prediction, named) == expected
    # From [.2,.2] to [.5,.6]: diagonal 0.5 again.
    turns = (Turn("Where is he?", "<p>nose</p>[0.2,0.2]<p>left ankle</p>[0.5,0.6]"),)
    assert score("keypoint_pck", prediction, record("pose", turns=turns)) == expected
    assert score("keypoint_pck", turns[0].answer, record("pose", turns=turns)) == 1


YES_NO = record("yes_no", question="Is it?", answer="No")


@pytest.mark.parametrize(
    ("prediction", "expected", "parsed"),
    [("no", 1, True), ("No, it is not.", 1, True), ("Yes", 0, True), ("not", 0, False), ("I say no", 0, False)],
)
def test_yes_no(prediction: str, expected: float, parsed: bool) -> None:
    assert score("yes_no", prediction, YES_NO) == expected
    assert SCORERS["yes_no"].parsed(prediction, YES_NO) is parsed


GROUNDED_VQA = dataclasses.replace(GROUNDED, task="grounded_vqa", question="What is where?")  # a dot left of a cube


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("<p>a dot</p>[0,0,0.2,0.2] left of <p>a cube</p>[0.5,0.5,0.9,0.9].", 1.0),
        ("a dot left of a cube", 0.5),  # all words, no boxes
        ("<p>a dot</p>[0,0,0.2,0.2]", (2 * 2 / (2 + 6) + 2 / 3) / 2),  # 2 of 6 words, 1 of 2 pairs
        ("<p>a dot</p>[0.5,0.5,0.9,0.9]", (2 * 2 / (2 + 6) + 0) / 2),
        ("", 0.0),
    ],
)
def test_grounded_answer(prediction: str, expected: float) -> None:
    assert score("grounded_answer", prediction, GROUNDED_VQA) == pytest.approx(expected)


OCR_TEXT = record("ocr_text", regions=(Region((0, 40, 20, 60), "Exit 7"), Region((0, 0, 20, 20), "STOP")))


@pytest.mark.parametrize(
    ("prediction", "expected", "parsed"),
    [
        ("STOP\nExit 7", 1, True),  # 11 characters
        (" STOP \n\nExit  7\n", 1, True),  # white space does not count
        ("STOP\nExit 1", 1 - 1 / 11, True),  # one replaced
        ("STOP", 1 - 7 / 11, True),  # seven left out, the line break too
        ("STOP Exit 7", 1 - 1 / 11, True),  # a blank for the line break
        ("stop\nExit 7", 1 - 4 / 11, True),
        ("STOP\nExit 7\nSTOP\nExit 7", 1 - 12 / 23, True),  # twelve too many of 23
        ("z", 0, True),
        ("", 0, False),
    ],
)
def test_edit_similarity(prediction: str, expected: float, parsed: bool) -> None:
    assert score("edit_similarity", prediction, OCR_TEXT) == pytest.approx(expected)
    assert SCORERS["edit_similarity"].parsed(prediction, OCR_TEXT) is parsed


def test_long_answers_and_questions_are_scored_by_their_words() -> None:
    asked = record("question_generation", question="Is it red?", answer="yes")
    assert score("caption_f1", "Is it blue?", asked) == pytest.approx(2 / 3)
    assert score("caption_f1", "because", record("detailed_answer", question="Why?", answer="Just because.")) == 2 / 3


def test_relations_are_scored_by_the_predicate() -> None:
    regions = (Region((0, 0, 20, 20), "man"), Region((50, 50, 90, 90), "horse"))
    item = record("relation_detection", answer="riding", regions=regions)
    assert score("vqa_exact", "Riding.", item) == 1
    assert score("vqa_exact", "<p>man</p>[0,0,0.2,0.2] riding", item) == 0


@pytest.mark.parametrize("item", EXAMPLES.values(), ids=lambda item: item.task)
def test_an_example_of_every_task_answers_itself_perfectly(item: Record) -> None:
    task = TASKS[item.task]
    answer = task.turns(item, GEOMETRY)[-1].answer
    assert task.parse(answer, GEOMETRY).formed
    perfect = Score(0 if item.task == "text" else 1)
    assert scorer_of(item)(answer, item, GEOMETRY) == perfect
    finished = dataclasses.replace(item, turns=task.turns(item, GEOMETRY), regions=())
    assert scorer_of(item)(answer, finished, GEOMETRY) == perfect


@pytest.mark.parametrize(
    "item", [VQA, REG, CHOICE, CAPTION, REC, TWO, NOTHING, GROUNDED, OCR, POSE], ids=lambda r: r.task
)
def test_a_tasks_own_answer_is_perfect_and_parsed(item: Record) -> None:
    task = TASKS[item.task]
    answer = task.turns(item, GEOMETRY)[-1].answer
    assert scorer_of(item)(answer, item, GEOMETRY) == Score(1)


def test_finished_turns_score_like_regions() -> None:
    item = record("rec", turns=(Turn("Where is it?", "[0.100,0.200,0.500,0.600]"),))
    assert score("box_iou50", "[0.1,0.2,0.5,0.6]", item) == 1


def test_every_task_has_a_scorer_and_every_scorer_its_definition() -> None:
    for task in TASKS.values():
        assert task.scorer in SCORERS, task.name
    assert all(scorer.description for scorer in SCORERS.values())
    with pytest.raises(UserError, match="did you mean 'vqa_exact'"):
        SCORERS["vqa_exakt"]
    with pytest.raises(ValueError, match="docstring"):
        register("undefined", lambda prediction, record, coordinates: 0.0)
