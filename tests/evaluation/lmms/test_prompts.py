"""lmms-eval's questions as SPHINX is asked them, and its boxes as a benchmark reads them. The contexts here are those
that lmms-eval 0.7.3 writes."""

from __future__ import annotations

import dataclasses
import json

import pytest

from sphinx_pl.data.coordinates import Coordinates, iou, to_square
from sphinx_pl.evaluation.lmms.prompts import find_rule

WIDE = (100, 50)
GEOMETRY = Coordinates(decimals=3)


def asked(task: str, context: str, **doc: object) -> str:
    rule = find_rule(task)
    return rule.ask(context, doc, (WIDE,), GEOMETRY) if rule else context


@pytest.mark.parametrize("task", ["refcoco_bbox_rec_val", "refcoco+_bbox_rec_testA", "refcocog_bbox_rec_test"])
def test_a_box_is_asked_for_in_the_originals_words(task: str) -> None:
    wanted = "Please provide the bounding box coordinate of the region this sentence describes: the red square."
    assert asked(task, "Bounding box coordinates are ...: the red square", answer="the red square") == wanted
    assert asked(task, "", answer="the red square.") == wanted


def test_a_rule_gets_nothing_of_a_document_but_the_question() -> None:
    items: list[set[str]] = []
    for name in ("refcoco_bbox_rec_val", "refcoco_bbox_val", "ok_vqa_val2014"):
        rule = find_rule(name)
        assert rule is not None
        spy = dataclasses.replace(rule, ask=lambda context, doc, sizes, coordinates: items.append(set(doc)) or "")
        spy.question("", {"answer": "it", "bbox": [0, 0, 1, 1], "truth": 7}, (WIDE,), GEOMETRY)
    assert items == [{"answer"}, {"bbox"}, set()]  # the first's "answer" is the phrase that a box is asked for


@pytest.mark.parametrize("task", ["refcoco_grounding_testA", "refcoco_plus_grounding_testB", "refcocog_grounding_test"])
def test_of_several_sentences_the_first_is_asked(task: str) -> None:
    assert asked(task, "Locate ...", answer=["left one", "the cat"]).endswith("describes: left one.")


@pytest.mark.parametrize("task", ["refcoco_bbox_val", "refcoco+_seg_testA", "refcocog_bbox_test"])
def test_a_region_is_named_by_its_box(task: str) -> None:
    question = asked(task, "Provide a short description for this region.", bbox=[10, 5, 10, 10])
    assert question == "Please provide a short description for this region: [0.100,0.300,0.200,0.400]."


@pytest.mark.parametrize(
    ("task", "context", "question"),
    [
        (
            "ok_vqa_val2014",
            "Why?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
            "Answer the question using a single word or phrase.",
            "Why?\nAnswer the question using a single word or phrase.",
        ),
        (
            "vizwiz_vqa_val",
            "Why?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
            "Answer the question using a single word or phrase.",
            "Why? When the provided information is insufficient, respond with 'Unanswerable'.\n"
            "Answer the question using a single word or phrase.",
        ),
        (
            "mmbench_en_dev",
            "A hint. Which? There are several options:\nA. a\nB. b\n\n"
            "Answer with the option's letter from the given choices directly.",
            "A hint. Which?\nA. a\nB. b\nAnswer with the option's letter from the given choices directly.",
        ),
        (
            "mmvet",
            "First please perform reasoning, and think step by step to provide best answer to the following question: "
            "\n\nWhat is it?",
            "What is it?",
        ),
        ("seedbench_ppl", "Which? Answer :", "Which?\nAnswer the question using a single word or phrase."),
        (
            "iconqa_val",
            "Given a set of images and a question, please provide the answer to the question.\nQuestion: Which?.\n"
            "Options:\nA. a\nB. b\nPlease answer with the option letter from the given choices directly.",
            "Which?\nA. a\nB. b\nAnswer with the option's letter from the given choices directly.",
        ),
        (
            "iconqa_val",
            "Given a set of images and a question, please provide the answer to the question.\nQuestion: How many?.\n"
            "Please answer the question using a single word or phrase.",
            "How many?\nAnswer the question using a single word or phrase.",
        ),
        ("mme", "Is it?\nAnswer the question using a single word or phrase.", None),
        ("flickr30k_test", "Provide a one-sentence caption for the provided image.", None),
    ],
)
def test_wordings_are_those_of_training(task: str, context: str, question: str | None) -> None:
    assert asked(task, context) == (context if question is None else question)


@pytest.mark.parametrize("size", [(100, 50), (50, 100), (64, 64), (97, 31)])
def test_a_box_is_handed_over_in_the_images_own_frame(size: tuple[int, int]) -> None:
    width, height = size
    box = (0.1 * width, 0.2 * height, 0.6 * width, 0.9 * height)
    answer = "It is here: " + Coordinates(decimals=6).box(box, size)
    rule = find_rule("refcoco_bbox_rec_val")
    assert rule is not None
    assert json.loads(rule.answer(answer, size, GEOMETRY)) == pytest.approx([0.1, 0.2, 0.6, 0.9], abs=1e-4)
    rule = find_rule("refcoco_grounding_test")
    assert rule is not None
    [result] = json.loads(rule.answer(answer, size, GEOMETRY))
    assert result["bbox_2d"] == pytest.approx(box, abs=1e-2)


def test_an_overlap_is_that_in_the_padded_square_also_of_boxes_in_the_padding() -> None:
    rule = find_rule("refcoco_bbox_rec_val")
    assert rule is not None
    truth_px = (10, 5, 50, 40)
    guess = (0.05, 0.1, 0.5, 0.6)  # begins above the image, which is 0.25 to 0.75 of the square
    answer = json.loads(rule.answer(f"[{','.join(map(str, guess))}]", WIDE, GEOMETRY))
    assert answer[1] < 0
    truth = (truth_px[0] / 100, truth_px[1] / 50, truth_px[2] / 100, truth_px[3] / 50)
    assert iou(tuple(answer), truth) == pytest.approx(iou(guess, to_square(truth_px, WIDE)), abs=1e-5)


def test_an_answer_without_a_box_stays_as_it_is() -> None:
    rule = find_rule("refcoco_bbox_rec_val")
    assert rule is not None
    assert rule.answer("nothing [0.1,0.2", WIDE, GEOMETRY) == "nothing [0.1,0.2"
