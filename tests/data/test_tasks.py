import dataclasses
import random
import string

import pytest

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.schema import Region, Turn
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS, choice_letter, reading_order
from tests.examples import EXAMPLES, LEFT, LOW, PERSON, RIGHT

G = Coordinates()
BASE = EXAMPLES["chat"]

WRITTEN = {
    "short_vqa": ("What colour is it?\nAnswer the question using a single word or phrase.", "red"),
    "relation": ("Where is it?\nAnswer the question using a single word or phrase.", "left"),
    "multiple_choice": (
        "Which {digit}?\nA. 3\nB. 7\nC. 9\nAnswer with the option's letter from the given choices directly.",
        "B",
    ),
    "description": ("Generate a detailed description about the image.", "Two shapes."),
    "caption": ("Provide a one-sentence caption for the provided image.", "shapes"),
    "rec": (
        "Please provide the bounding box coordinate of the region this sentence describes: the red square.",
        "[0.100,0.300,0.200,0.400]",
    ),
    "reg": ("Please provide a short description for this region: [0.100,0.300,0.200,0.400].", "red square"),
    "grounded_caption": (
        "Describe the image concisely. Include the bounding box for each mentioned object.",
        "A <p>red square</p>[0.100,0.300,0.200,0.400] left of a <p>blue circle</p>[0.600,0.300,0.800,0.500].",
    ),
    "detection": (
        "Detect all red square shown in the image.",
        "[0.100,0.300,0.200,0.400;0.000,0.550,0.500,0.750]",
    ),
    "ocr": (
        "Please detect all texts and provide their bounding box coordinate.",
        "<p>red square</p>[0.100,0.300,0.200,0.400]<p>blue circle</p>[0.600,0.300,0.800,0.500]"
        "<p>red square</p>[0.000,0.550,0.500,0.750]",
    ),
    "pose": (
        "Detect the key points of the person in the region [0.000,0.250,1.000,0.750].",
        "<p>nose</p>[0.500,0.500]<p>left shoulder</p>[0.100,0.300]",
    ),
    "layout": (
        "Detect the layout elements of this page and provide their bounding box coordinate.",
        "<p>red square</p>[0.100,0.300,0.200,0.400;0.000,0.550,0.500,0.750]<p>blue circle</p>[0.600,0.300,0.800,0.500]",
    ),
    "chat": ("Hello?", "Hello."),
    "text": ("", "A document.\n"),
    "yes_no": ("Is it red?\nAnswer the question using a single word or phrase.", "yes"),
    "detailed_answer": ("Why is it red?\nAnswer the question in detail.", "It was painted. Nobody knows by whom."),
    "grounded_vqa": (
        "What is red?\nInclude the bounding box for each mentioned object.",
        "The <p>red square</p>[0.100,0.300,0.200,0.400;0.000,0.550,0.500,0.750], not the "
        "<p>blue circle</p>[0.600,0.300,0.800,0.500].",
    ),
    "detection_all": (
        "Detect all objects shown in the image.",
        "<p>red square</p>[0.100,0.300,0.200,0.400;0.000,0.550,0.500,0.750]<p>blue circle</p>[0.600,0.300,0.800,0.500]",
    ),
    "ocr_text": ("Please detect all texts.", "red square\nblue circle\nred square"),
    "relation_detection": (
        "What is the relation between <p>red square</p>[0.100,0.300,0.200,0.400] and "
        "<p>blue circle</p>[0.600,0.300,0.800,0.500]?\nAnswer the question using a single word or phrase.",
        "beside",
    ),
    "question_generation": ("Ask a question about the image.", "What colour is it?\nHow many are there?"),
}


def record(task, **fields):
    return dataclasses.replace(BASE, **{"question": "", "answer": ""} | fields, task=task)


def test_every_task_has_its_text_here():
    assert set(WRITTEN) == set(EXAMPLES) == set(TASKS)


def test_written_text(subtests):
    for task in WRITTEN:
        with subtests.test(task=task):
            assert TASKS[task].turns(EXAMPLES[task], G) == (Turn(*WRITTEN[task]),)


def test_every_wording_can_be_chosen_and_keeps_the_answer(subtests):
    for task in WRITTEN:
        with subtests.test(task=task):
            rng = random.Random(0)
            turns = [TASKS[task].turns(EXAMPLES[task], G, rng)[0] for _ in range(50)]
            assert len({turn.question for turn in turns}) == len(TASKS[task].templates)
            assert {turn.answer for turn in turns} == {WRITTEN[task][1]}
            # each wording holds the same information: the slots
            for wordings in filter(None, (TASKS[task].templates, TASKS[task].given)):
                slots = {
                    frozenset(name for _, name, _, _ in string.Formatter().parse(wording) if name)
                    for wording in wordings
                }
                assert len(slots) == 1


def test_own_turns_are_used_as_they_are(subtests):
    for task in WRITTEN:
        with subtests.test(task=task):
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
        ("yes_no", {"question": "q", "answer": "maybe"}, "answer_not_yes_no"),
        ("yes_no", {"question": "q", "answer": "yes, both"}, "answer_not_yes_no"),
        ("yes_no", {"question": "q", "answer": " "}, "answer_empty"),
        ("detailed_answer", {"question": "q"}, "answer_empty"),
        ("grounded_vqa", {"question": "q", "answer": "Nothing", "regions": (LEFT,)}, "region_missing"),
        ("grounded_vqa", {"question": "q", "answer": "{0,1}", "regions": (LEFT,)}, "region_missing"),
        ("grounded_vqa", {"answer": "{0}", "regions": (LEFT,)}, "question_empty"),
        ("detection_all", {}, "region_missing"),
        ("ocr_text", {}, "region_missing"),
        ("ocr_text", {"regions": (Region(LEFT.box, "\n"),)}, "label_empty"),
        ("relation_detection", {"answer": "by", "regions": (LEFT,)}, "region_missing"),
        ("relation_detection", {"answer": "", "regions": (LEFT, RIGHT)}, "answer_empty"),
        ("question_generation", {"question": " "}, "question_empty"),
        ("question_generation", {"question": "q", "images": ()}, "image_absent"),
        # A region without a label could be one of those that are asked for.
        ("detection", {"question": "cat", "regions": (Region(LEFT.box),)}, "label_empty"),
    ],
)
def test_what_a_task_refuses(task, fields, reason):
    with pytest.raises(SkipSample) as caught:
        TASKS[task].turns(record(task, **fields), G)
    assert caught.value.reason == reason


def in_fractions(region: Region) -> Region:
    x1, y1, x2, y2 = region.box
    keypoints = tuple((x / 100, y / 50, v) for x, y, v in region.keypoints)
    return Region((x1 / 100, y1 / 50, x2 / 100, y2 / 50), region.label, keypoints)


@pytest.mark.parametrize("task", [task for task, example in EXAMPLES.items() if example.regions])
def test_boxes_in_fractions_are_refused_for_every_task_with_regions(task):
    example = EXAMPLES[task]
    regions = tuple(in_fractions(region) for region in example.regions)
    with pytest.raises(SkipSample) as caught:
        TASKS[task].turns(dataclasses.replace(example, regions=regions), G)
    assert caught.value.reason == "box_below_pixel"
    # One that is in pixels shows that all are; finished turns have their own coordinates.
    if len(regions) > 1:
        TASKS[task].turns(dataclasses.replace(example, regions=(example.regions[0], *regions[1:])), G)
    turns = (Turn("Where?", "There."),)
    assert TASKS[task].turns(dataclasses.replace(example, regions=regions, turns=turns), G) == turns


def test_keypoints_in_fractions_are_refused():
    person = dataclasses.replace(EXAMPLES["pose"].regions[0], keypoints=in_fractions(PERSON).keypoints)
    with pytest.raises(SkipSample) as caught:
        TASKS["pose"].turns(dataclasses.replace(EXAMPLES["pose"], regions=(person,)), G)
    assert caught.value.reason == "keypoint_below_pixel"


def test_an_image_of_one_pixel_has_a_box_of_one_pixel():
    example = dataclasses.replace(EXAMPLES["rec"], sizes=((1, 1),), regions=(Region((0, 0, 1, 1)),))
    assert TASKS["rec"].turns(example, G)[0].answer == "[0.000,0.000,1.000,1.000]"


def test_a_box_may_pass_the_edge_by_a_pixel_and_is_cut_there():
    turns = TASKS["rec"].turns(record("rec", question="it", regions=(Region((-0.5, -1, 101, 50)),)), G)
    assert turns[0].answer == "[0.000,0.250,1.000,0.750]"


def test_choice_letter():
    assert choice_letter(record("multiple_choice", answer="9", choices=("3", "7", "9"))) == "C"


def test_reading_order_bears_with_uneven_lines():
    words = [Region((50, 8, 70, 20), "b"), Region((10, 10, 30, 22), "a"), Region((5, 30, 30, 40), "c")]
    assert [region.label for region in reading_order(reversed(words))] == ["a", "b", "c"]
    assert reading_order([]) == []


@pytest.mark.parametrize("answer", ["No", " no. ", "NO"])
def test_yes_and_no_are_written_in_one_way(answer):
    assert TASKS["yes_no"].turns(record("yes_no", question="q", answer=answer), G)[0].answer == "no"


def test_a_person_may_be_named_instead_of_pointed_out():
    named = dataclasses.replace(EXAMPLES["pose"], question="the man in red.")
    (turn,) = TASKS["pose"].turns(named, G)
    assert turn == Turn("Detect the key points of the man in red.", WRITTEN["pose"][1])
    rng = random.Random(0)
    questions = {TASKS["pose"].turns(named, G, rng)[0].question for _ in range(30)}
    assert questions == {turn.question, "Where are the body key points of the man in red?"}


def test_a_question_can_be_asked_for_by_its_answer():
    (turn,) = TASKS["question_generation"].turns(
        record("question_generation", question="What colour is it?", answer="red"), G
    )
    assert turn == Turn("Ask a question about the image that has this answer: red", "What colour is it?")


def test_a_choice_of_several_lines_is_one_choice():
    asked = record("multiple_choice", question="q", choices=("cat\nB. dog", "bird"), answer="bird")
    turn = TASKS["multiple_choice"].turns(asked, G)[0]
    assert turn.question.split("\n")[:3] == ["q", "A. cat B. dog", "B. bird"]
    assert turn.answer == "B"


def test_a_text_of_several_lines_is_one_line():
    regions = (Region(LEFT.box, "two\n lines"), Region(LOW.box, "one"))
    assert TASKS["ocr_text"].turns(record("ocr_text", regions=regions), G)[0].answer == "two lines\none"


def test_a_placeholder_may_have_blanks_and_other_braces_stay():
    item = record("grounded_caption", answer="{a} {1, 0} {}", regions=(LEFT, RIGHT))
    expected = "{a} <p>blue circle</p>[0.600,0.300,0.800,0.500;0.100,0.300,0.200,0.400] {}"
    assert TASKS["grounded_caption"].turns(item, G)[0].answer == expected


# --- Back from text

# What each example's answer is read back as: the answer, then labels and boxes or keypoints in the order of the text.
READ = {task: (example.answer, ()) for task, example in EXAMPLES.items()} | {
    "multiple_choice": ("B", ()),
    "rec": ("", (Region(LEFT.box),)),  # the phrase stands in the question
    "reg": (LEFT.label, ()),  # and here the box
    "grounded_caption": ("A {0} left of a {1}.", (LEFT, RIGHT)),
    "detection": ("", (Region(LEFT.box), Region(LOW.box))),
    "ocr": ("", (LEFT, RIGHT, LOW)),
    "layout": ("", (LEFT, LOW, RIGHT)),
    "grounded_vqa": ("The {0,1}, not the {2}.", (LEFT, LOW, RIGHT)),
    "detection_all": ("", (LEFT, LOW, RIGHT)),
    "question_generation": (EXAMPLES["question_generation"].question, ()),
}


def test_an_answer_is_read_back_as_what_it_was_written_from(subtests):
    for task in TASKS:
        with subtests.test(task=task):
            parsed = TASKS[task].parse(WRITTEN[task][1], G)
            answer, regions = READ[task]
            size = EXAMPLES[task].sizes[0]
            assert parsed.formed
            assert parsed.answer == answer
            assert [region.label for region in parsed.regions(size)] == [region.label for region in regions]
            for region, true in zip(parsed.regions(size), regions, strict=True):
                assert region.box == pytest.approx(true.box)
            keypoints = PERSON.keypoints if task == "pose" else ((0, 0, 0),) * 17
            for point, true_point in zip(parsed.keypoints(size), keypoints, strict=True):
                assert point == pytest.approx(true_point)
            if task == "ocr_text":
                assert [place.phrase for place in parsed.places] == [LEFT.label, RIGHT.label, LOW.label]


@pytest.mark.parametrize("task", ["grounded_caption", "grounded_vqa", "ocr", "layout", "detection_all"])
def test_what_is_read_is_written_as_the_same_text(task):
    rng = random.Random(task)
    compared = 0
    for _ in range(300):
        coordinates = Coordinates(rng.randint(1, 6))
        size = (rng.randint(20, 3000), rng.randint(20, 3000))
        regions = []
        for label in rng.choices(["a", "red  dot", "5", "(b)", "no."], k=rng.randint(1, 6)):
            (x1, x2), (y1, y2) = (sorted(rng.sample(range(limit * 10 + 1), 2)) for limit in size)
            regions.append(Region((x1 / 10, y1 / 10, x2 / 10, y2 / 10), label))
        mentions, order = [], rng.sample(range(len(regions)), len(regions))
        while order:
            count = rng.randint(1, 3)
            mentions.append("{" + ",".join(map(str, order[:count])) + "}")
            order = order[count:]
        item = record(task, question="q", answer=" [1] <p>and ".join(mentions), regions=tuple(regions), sizes=(size,))
        (turn,) = TASKS[task].turns(item, coordinates)
        parsed = TASKS[task].parse(turn.answer, coordinates)
        assert len(parsed.boxes) == len(regions)
        # Rounding can leave a box without width, which no record may have.
        if all(x1 < x2 and y1 < y2 for x1, y1, x2, y2 in parsed.boxes):
            repeat = dataclasses.replace(item, answer=parsed.answer, regions=parsed.regions(size))
            (turn_again,) = TASKS[task].turns(repeat, coordinates)
            read_again = TASKS[task].parse(turn_again.answer, coordinates)
            assert sorted(read_again.regions(size), key=str) == sorted(parsed.regions(size), key=str)
            # The other tasks' order follows the boxes, of which rounding can make two start in one row.
            assert turn_again == turn or not parsed.answer
            compared += 1
    assert compared > 200


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("yes_no", "Yes, it is.", "yes"),
        ("yes_no", " NO", "no"),
        ("yes_no", "'No'", "no"),
        ("yes_no", "nothing", None),
        ("yes_no", "no-one", None),
        ("yes_no", "It is. Yes", None),
        ("multiple_choice", "(c) red", "C"),
        ("multiple_choice", "Cat", None),
    ],
)
def test_tolerant_reading(task, text, answer):
    parsed = TASKS[task].parse(text, G)
    assert parsed.formed is (answer is not None)
    assert parsed.answer == (answer or "")


def test_detection_reads_none_as_no_boxes():
    assert TASKS["detection"].parse("none.", G).formed
    assert TASKS["detection"].parse("none.", G).places == ()
    assert not TASKS["detection"].parse("cats", G).formed


def test_of_a_keypoint_named_twice_the_first_counts():
    parsed = TASKS["pose"].parse("<p>Nose</p>[0.5,0.5]<p>nose</p>[0.1,0.1]<p>tail</p>[0,0]", G)
    assert parsed.keypoints((100, 50)) == ((50.0, 25.0, 2), *[(0.0, 0.0, 0)] * 16)


PIECES = ["[", "]", ";", ",", "0.5", "1", " ", "<p>", "</p>", "{0}", "yes", "A", "\n", "0.1,0.2,0.3,0.4", "0.1,0.2"]


def test_reading_never_raises(subtests):
    for task in TASKS:
        with subtests.test(task=task):
            rng = random.Random(3)
            for _ in range(500):
                parsed = TASKS[task].parse("".join(rng.choices(PIECES, k=rng.randint(0, 20))), G)
                parsed.regions((3, 2))
                parsed.keypoints((3, 2))
