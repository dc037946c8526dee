"""Log-probabilities of given answers: batched as alone, beside the plain forward pass and greedy generation."""

from __future__ import annotations

import pytest
import torch

from sphinx_pl.data.schema import IMAGE_SLOT
from sphinx_pl.generation.generate import GenerationConfig, Prompt, generate
from sphinx_pl.generation.likelihood import answer_logprobs
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError


@torch.no_grad()
def alone(model: Sphinx, prompt: Prompt, answer: list[int]) -> float:
    ids = torch.tensor([*prompt.ids, *answer])[None]
    x = model.decoder.embed(ids.clamp(min=0))
    if prompt.pixels is not None:
        x[ids == IMAGE_SLOT] = model.embed_images(prompt.pixels).flatten(0, 1)
    logits = model.decoder.logits(model.decoder(x, torch.arange(ids.shape[1])[None]))[0]
    places = range(len(prompt.ids) - 1, ids.shape[1] - 1)
    return sum(float(logits[at].log_softmax(-1)[token]) for at, token in zip(places, answer, strict=True))


def test_a_batch_of_different_lengths_scores_as_each_alone(model: Sphinx, prompts: list[Prompt]) -> None:
    answers = [[5, 6, 7], [9], [300, 2, 2, 8, 11], [4, 4]]
    scores = answer_logprobs(model, prompts, answers)
    expected = [alone(model, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    assert [score for score, _ in scores] == pytest.approx(expected, rel=1e-4)
    assert len({round(score) for score, _ in scores}) == 4


def test_greedy_is_what_generation_gives(model: Sphinx, prompts: list[Prompt]) -> None:
    generated = generate(model, prompts, GenerationConfig(max_new_tokens=6))
    assert all(greedy for _, greedy in answer_logprobs(model, prompts, generated))
    changed = [[*answer[:3], (answer[3] + 1) % 512, *answer[4:]] for answer in generated]
    assert not any(greedy for _, greedy in answer_logprobs(model, prompts, changed))


def test_the_mode_is_restored_and_nothing_gives_nothing(model: Sphinx, prompts: list[Prompt]) -> None:
    model.train()
    answer_logprobs(model, prompts[3:], [[3]])
    assert model.training
    assert answer_logprobs(model, [], []) == []


def test_what_cannot_be_scored_is_one_line(model: Sphinx, prompts: list[Prompt]) -> None:
    with pytest.raises(UserError, match="answer 1 has no token"):
        answer_logprobs(model, prompts[:2], [[3], []])
    with pytest.raises(UserError, match="max_positions"):
        answer_logprobs(model, prompts[3:], [[3] * model.config.decoder.max_positions])
    with pytest.raises(UserError, match="image slots"):
        answer_logprobs(model, [Prompt(prompts[0].ids[2:], prompts[0].pixels)], [[3]])
