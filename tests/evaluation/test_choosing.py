from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from sphinx_pl.data.images import padded_resize, to_tensor
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.schema import ImageRef
from sphinx_pl.evaluation.question import question_of
from sphinx_pl.evaluation.runner import answer, evaluate
from sphinx_pl.generation.generate import GenerationConfig, Prompt, generate
from sphinx_pl.generation.loglikelihood import choice_loglikelihoods
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from tests.examples import EXAMPLES

ASKED = ("short_vqa", "multiple_choice", "yes_no")


@pytest.fixture
def model(model_config: SphinxConfig) -> Sphinx:
    torch.manual_seed(0)
    return Sphinx(model_config).eval()


@pytest.fixture
def prompts(processor: Processor) -> list[Prompt]:
    pixels = to_tensor(padded_resize(Image.new("RGB", (100, 50), (200, 30, 30)), processor.image_size))[None]
    return [Prompt(processor.prompt(EXAMPLES[task]).ids, pixels, 4) for task in ASKED]


def test_closed_questions_get_their_likeliest_answer_and_open_ones_a_generated_one(
    model: Sphinx, processor: Processor, prompts: list[Prompt]
) -> None:
    questions, config = [question_of(EXAMPLES[task], processor.coordinates) for task in ASKED], GenerationConfig()
    answers = [processor.decode(ids) for ids in generate(model, prompts, config)]
    assert answer(model, processor, questions, prompts, config) == answers
    chosen = answer(model, processor, questions, prompts, config, ranking=True)
    tokens = [[processor.tokenizer.encode(word) for word in words] for words in (("A", "B", "C"), ("yes", "no"))]
    scores = choice_loglikelihoods(model, prompts[1:], tokens)
    assert chosen == [
        answers[0],
        "ABC"[scores[0].index(max(scores[0]))],
        ("yes", "no")[scores[1].index(max(scores[1]))],
    ]


def test_where_a_choice_does_not_fit_the_answer_is_generated(
    model: Sphinx, processor: Processor, prompts: list[Prompt]
) -> None:
    short = dataclasses.replace(prompts[2], max_new_tokens=1)
    assert len(processor.tokenizer.encode("yes")) > 1
    answers = [processor.decode(ids) for ids in generate(model, [short], GenerationConfig())]
    question = question_of(EXAMPLES["yes_no"], processor.coordinates)
    assert answer(model, processor, [question], [short], GenerationConfig(), ranking=True) == answers


def test_evaluation_can_choose_and_search(model: Sphinx, processor: Processor, tmp_path: Path) -> None:
    Image.new("RGB", (100, 50), (200, 30, 30)).save(tmp_path / "a.png")
    images = (ImageRef(str(tmp_path / "a.png")),)
    records = [dataclasses.replace(EXAMPLES[task], key=task, images=images) for task in ASKED]
    chosen = evaluate(model, processor, records, ranking=True, generation=GenerationConfig(num_beams=2), progress=False)
    assert [prediction.parsed for prediction in chosen] == [True, True, True]
    assert chosen[1].prediction in ("A", "B", "C")
    assert chosen[2].prediction in ("yes", "no")
