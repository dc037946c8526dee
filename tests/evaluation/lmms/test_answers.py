"""Requests in lmms-eval's form, answered by a tiny model. lmms-eval itself is in test_harness.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sphinx_pl.data.processor import Processor
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.evaluation.lmms.answers import DEFAULT_LIMIT, Answers, Drawing
from sphinx_pl.generation.assistant import Assistant, Dialog
from sphinx_pl.generation.generate import GenerationConfig
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError

SHORT = {"max_new_tokens": 8, "temperature": 0, "do_sample": False}


@pytest.fixture
def assistant(model_config: SphinxConfig, processor: Processor) -> Assistant:
    torch.manual_seed(0)
    model = Sphinx(model_config)
    for parameter in model.decoder.layers.parameters():  # the initial weights would repeat one token
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return Assistant(model, processor)


@pytest.fixture
def pictures() -> list[Image.Image]:
    return [Image.effect_mandelbrot((60, 20 + 8 * i), (-2, -1.5, 1, 1.5), 20).convert("RGB") for i in range(4)]


@pytest.fixture
def documents(pictures: list[Image.Image]) -> dict[str, Any]:
    rows = [{"image": picture, "answer": ["the left one"]} for picture in pictures]
    tasks = ("some", "refcoco_bbox_rec_val", "refcoco_grounding_test")
    return {task: {"test": rows} for task in tasks}


@pytest.fixture
def answers(assistant: Assistant, documents: dict[str, Any]) -> Answers:
    return Answers(assistant, documents, batch_size=2, progress=False)


def own(doc: Any) -> list[Image.Image]:
    return [doc["image"]]


def greedy(assistant: Assistant, dialog: Dialog, tokens: int = 8) -> str:
    return assistant.generate([dialog], GenerationConfig(max_new_tokens=tokens))[0]


def test_answers_come_in_the_order_of_their_requests(
    answers: Answers, assistant: Assistant, pictures: list[Image.Image]
) -> None:
    contexts = ["What is in this image, and where is it?", "What?", "What colour is it?", "Is it red?"]
    requests = [(context, SHORT, own, number, "some", "test") for number, context in enumerate(contexts)]
    texts = answers.generate_until(requests)
    wanted = [greedy(assistant, Dialog(c, [picture])) for c, picture in zip(contexts, pictures, strict=True)]
    assert texts == wanted
    assert len(set(texts)) > 2


def test_several_images_marks_and_text_only(
    answers: Answers, assistant: Assistant, pictures: list[Image.Image]
) -> None:
    two = pictures[:2]
    requests = [
        ("First <image> or second <image>?", SHORT, lambda doc: two, 0, "some", "test"),
        ("Which one?", SHORT, lambda doc: [two], 0, "some", "test"),
        ("One mark <image> for two", SHORT, lambda doc: two, 0, "some", "test"),
        ("Hello <image>", SHORT, None, 0, "some", "test"),
    ]
    wanted = [
        Dialog("First <image> or second <image>?", two),
        Dialog("Which one?", two),
        Dialog("One mark  for two", two),
        Dialog("Hello "),
    ]
    assert answers.generate_until(requests) == [greedy(assistant, dialog) for dialog in wanted]


def test_an_answer_ends_before_the_first_stop_string(answers: Answers, assistant: Assistant) -> None:
    whole = greedy(assistant, Dialog("Tell me"), 24)
    later, earlier = whole[len(whole) // 2 :][:3], whole[len(whole) // 3 :][:3]
    arguments = {"max_new_tokens": 24, "until": [later, earlier, "never"]}
    [text] = answers.generate_until([("Tell me", arguments, None, 0, "some", "test")])
    assert text == whole[: min(whole.find(later), whole.find(earlier))]
    assert 0 < len(text) < len(whole)


@pytest.mark.parametrize(
    ("arguments", "drawing"),
    [
        ({}, Drawing(DEFAULT_LIMIT, 0.0, 1.0, ())),
        ({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}, Drawing(16)),
        ({"max_gen_toks": 5, "until": "\n"}, Drawing(5, until=("\n",))),
        ({"until": [None, "a"], "top_p": None}, Drawing(until=("a",))),
        ({"temperature": 0.2, "top_p": 0.9, "do_sample": False}, Drawing()),
        ({"temperature": 0.2, "top_p": 0.9}, Drawing(temperature=0.2, top_p=0.9)),
        ({"do_sample": True, "top_p": 0}, Drawing(temperature=1.0)),
    ],
)
def test_generation_arguments_mean_what_they_mean_in_transformers(arguments: dict[str, Any], drawing: Drawing) -> None:
    assert Drawing.read(arguments) == drawing


def test_beams_are_refused() -> None:
    with pytest.raises(UserError, match="num_beams=5"):
        Drawing.read({"num_beams": 5})


def test_the_same_question_is_drawn_anew_each_time(answers: Answers) -> None:
    arguments = {"max_new_tokens": 8, "temperature": 1.0, "do_sample": True}
    requests = [("Tell me", arguments, None, 0, "some", "test")] * 4
    texts = answers.generate_until(requests)
    assert len(set(texts)) > 2
    assert answers.generate_until(requests) == texts


def test_boxes_are_asked_for_and_handed_over_as_the_task_wants(
    assistant: Assistant, documents: dict[str, Any], pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    questions: list[str] = []
    prompt = Assistant.prompt

    def noted(self: Assistant, dialog: Dialog, limit: int) -> Any:
        questions.append(dialog.question)
        return prompt(self, dialog, limit)

    monkeypatch.setattr(Assistant, "prompt", noted)
    # What a model says that has learned boxes; this one has not.
    monkeypatch.setattr(Assistant, "answer", lambda self, prompts, config: ["[0.0,0.5,0.5,1.0]"] * len(prompts))
    requests = [("As lmms-eval asks", SHORT, own, 1, task, "test") for task in list(documents)[1:]]
    fractions, pixels = Answers(assistant, documents, progress=False).generate_until(requests)
    wording = TASKS["rec"].templates[0]
    assert questions == [wording.format(phrase="the left one")] * 2
    assert pictures[1].size == (60, 28)  # in a square of 60, 16 from the top
    assert fractions == "[0.000000, 0.500000, 0.500000, 1.571429]"
    assert pixels == '[{"bbox_2d": [0.0, 14.0, 30.0, 44.0]}]'
    plain = Answers(assistant, documents, prompts="benchmark", progress=False)
    assert plain.generate_until(requests[:1]) == ["[0.0,0.5,0.5,1.0]"]
    assert questions[-1] == "As lmms-eval asks"


def test_losses_are_negative_log_probabilities_of_the_continuation(
    answers: Answers, assistant: Assistant, pictures: list[Image.Image]
) -> None:
    choices = ["red", "a blue star", "7"]
    requests: list[tuple[Any, ...]] = [("Which?", f" {choice}", own, 2, "some", "test") for choice in choices]
    requests.append(("Which?", lambda doc: doc["answer"][0], own, 2, "some", "test"))
    requests.append(("", "red"))  # an answer by itself
    best = greedy(assistant, Dialog("Hi"), 1)
    requests.append(("Hi", best, None, 0, "some", "test"))
    result = answers.loglikelihood(requests)
    for choice, (loss, _) in zip([*choices, "the left one"], result, strict=False):
        ids = assistant.encode_answer(choice)
        logits = assistant.compute_logits(Dialog("Which?", [pictures[2]]), choice)[-len(ids) - 1 : -1]
        wanted = -sum(float(row.log_softmax(-1)[token]) for row, token in zip(logits, ids, strict=True))
        assert loss == pytest.approx(wanted, rel=1e-4)
    assert result[4][0] > 0
    assert result[5][1] == (assistant.encode_answer(best) == [int(assistant.compute_logits(Dialog("Hi"))[-1].argmax())])


def test_rounds_go_on_until_the_task_ends_them(answers: Answers, assistant: Assistant) -> None:
    asked: list[tuple[int, list[str], Any]] = []

    def following(doc: Any, previous_output: list[str], round_idx: int, previous_round_info: Any) -> tuple[Any, ...]:
        asked.append((round_idx, previous_output, previous_round_info))
        ended = round_idx == (1 if doc is short else 3)
        return [], f"Round {round_idx}", ended, None if ended else previous_output, {"round": round_idx}

    short = answers.documents["some"]["test"][1]
    requests = [("Begin", SHORT, own, number, "some", "test") for number in (0, 1)]
    requests = [(*request[:3], following, *request[3:]) for request in requests]
    long, brief = answers.generate_until_multi_round(requests)
    assert len(long) == 3
    assert len(brief) == 1
    assert long[1] == greedy(assistant, Dialog("Round 1"))
    assert [number for number, _, _ in asked] == [1, 1, 2, 3]
    assert asked[3][1:] == (long, {"round": 2})


def test_what_cannot_be_asked_is_counted_and_has_no_answer(answers: Answers, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not one")
    broken = str(tmp_path / "broken.png")
    requests = [
        ("what " * 600, SHORT, None, 0, "some", "test"),
        ("What?", SHORT, lambda doc: [broken], 0, "some", "test"),
        ("What?", SHORT, own, 0, "some", "test"),
    ]
    texts = answers.generate_until(requests)
    assert texts[:2] == ["", ""]
    assert texts[2]
    assert answers.lost == {"some": 2}
    scores = answers.loglikelihood([("What?", answer, own, 0, "some", "test") for answer in ("", "a " * 600, "red")])
    assert [loss == float("inf") for loss, _ in scores] == [True, True, False]
    assert answers.lost == {"some": 4}


@pytest.mark.parametrize(("items", "named"), [("clip.mp4", "clip.mp4"), ({"array": [0]}, "dict")])
def test_videos_and_sounds_are_refused(answers: Answers, items: Any, named: str) -> None:
    with pytest.raises(UserError, match=f"'some' shows .*{named}"):
        answers.generate_until([("What?", SHORT, lambda doc: [items], 0, "some", "test")])


def test_wrong_options_are_one_line(assistant: Assistant) -> None:
    with pytest.raises(UserError, match="batch_size=0"):
        Answers(assistant, {}, batch_size=0)
    with pytest.raises(UserError, match=r"prompts='sphynx'.*did you mean 'sphinx'"):
        Answers(assistant, {}, prompts="sphynx")
