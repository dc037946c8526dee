"""Log-likelihoods beside a plain forward pass and greedy generation, batched as alone, each image read once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sphinx_pl.data.schema import IMAGE_SLOT
from sphinx_pl.generation.generate import GenerationConfig, Prompt, generate
from sphinx_pl.generation.loglikelihood import answer_loglikelihoods, choice_loglikelihoods
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError

CHOICES = [[[5], [6, 7, 8], [9, 10]], [[11, 12], [13]]]


@pytest.fixture
def pair() -> list[Prompt]:
    image = torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return [Prompt([1, *[IMAGE_SLOT] * 27, 17, 20], image), Prompt([1, 40, 41, 42])]


@torch.no_grad()
def plain(model: Sphinx, prompt: Prompt, answer: list[int]) -> float:
    ids = torch.tensor([*prompt.ids, *answer])
    x = model.decoder.embed(ids.clamp(min=0)[None])
    if prompt.pixels is not None:
        x[0, ids == IMAGE_SLOT] = model.embed_images(prompt.pixels).flatten(0, 1)
    logits = model.decoder.logits(model.decoder(x, torch.arange(len(ids))[None]))[0]
    logp = logits[len(prompt.ids) - 1 : -1].log_softmax(dim=-1)
    return float(logp[torch.arange(len(answer)), torch.tensor(answer)].sum())


def test_scores_are_those_of_a_plain_forward_pass(sample: Sphinx, pair: list[Prompt]) -> None:
    expected = [[plain(sample, p, answer) for answer in answers] for p, answers in zip(pair, CHOICES, strict=True)]
    assert len({round(score, 3) for scores in expected for score in scores}) == 5
    found = choice_loglikelihoods(sample, pair, CHOICES)
    assert found == [pytest.approx(scores, abs=1e-4) for scores in expected]
    alone = [
        choice_loglikelihoods(sample, [prompt], [answers])[0] for prompt, answers in zip(pair, CHOICES, strict=True)
    ]
    assert found == [pytest.approx(scores, abs=1e-4) for scores in alone]
    means = [
        [s / len(a) for s, a in zip(scores, answers, strict=True)]
        for scores, answers in zip(expected, CHOICES, strict=True)
    ]
    assert choice_loglikelihoods(sample, pair, CHOICES, normalise=True) == [
        pytest.approx(scores, abs=1e-4) for scores in means
    ]


def test_single_tokens_need_no_second_pass_and_an_image_is_read_once(
    sample: Sphinx, pair: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, read = sample.embed_images, []

    def counting(pixels: Tensor, seen: Tensor | None = None) -> Tensor:
        read.append(len(pixels))
        return embed(pixels, seen)

    monkeypatch.setattr(sample, "embed_images", counting)
    [scores] = choice_loglikelihoods(sample, pair[:1], [[[5], [6], [7, 8]]])
    assert read == [1]
    assert choice_loglikelihoods(sample, pair[:1], [[[5], [6]]]) == [pytest.approx(scores[:2], abs=1e-5)]


def test_choices_keep_the_mode_and_mistakes_are_one_line(sample: Sphinx, pair: list[Prompt]) -> None:
    sample.train()
    assert choice_loglikelihoods(sample, [], []) == []
    choice_loglikelihoods(sample, pair, CHOICES)
    assert sample.training
    for choices in ([], [[]], [[5], []]):
        with pytest.raises(UserError, match="prompt 0: every prompt needs choices"):
            choice_loglikelihoods(sample, pair[1:], [choices])
    with pytest.raises(UserError, match="max_positions"):
        choice_loglikelihoods(sample, pair[1:], [[[5] * 1100]])


def test_a_batch_of_different_lengths_scores_as_each_alone(model: Sphinx, prompts: list[Prompt]) -> None:
    answers = [[5, 6, 7], [9], [300, 2, 2, 8, 11], [4, 4]]
    scores = answer_loglikelihoods(model, prompts, answers)
    expected = [plain(model, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    assert [score for score, _ in scores] == pytest.approx(expected, rel=1e-4)
    assert len({round(score) for score, _ in scores}) == 4


def test_greedy_is_what_generation_gives(model: Sphinx, prompts: list[Prompt]) -> None:
    generated = generate(model, prompts, GenerationConfig(max_new_tokens=6))
    assert all(greedy for _, greedy in answer_loglikelihoods(model, prompts, generated))
    changed = [[*answer[:3], (answer[3] + 1) % 512, *answer[4:]] for answer in generated]
    assert not any(greedy for _, greedy in answer_loglikelihoods(model, prompts, changed))


def test_the_mode_is_kept_and_nothing_gives_nothing(model: Sphinx, prompts: list[Prompt]) -> None:
    model.train()
    answer_loglikelihoods(model, prompts[3:], [[3]])
    assert model.training
    assert answer_loglikelihoods(model, [], []) == []


def test_what_cannot_be_scored_is_one_line(model: Sphinx, prompts: list[Prompt]) -> None:
    with pytest.raises(UserError, match="answer 1 has no token"):
        answer_loglikelihoods(model, prompts[:2], [[3], []])
    with pytest.raises(UserError, match="max_positions"):
        answer_loglikelihoods(model, prompts[3:], [[3] * model.config.decoder.max_positions])
    with pytest.raises(UserError, match="image slots"):
        answer_loglikelihoods(model, [Prompt(prompts[0].ids[2:], prompts[0].pixels)], [[3]])
