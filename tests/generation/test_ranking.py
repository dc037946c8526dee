"""Likelihoods of given answers beside a plain forward pass, batched as alone, with each image read once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sphinx_pl.data.schema import IMAGE_SLOT
from sphinx_pl.generation.prompt import Prompt
from sphinx_pl.generation.ranking import rank
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError

CHOICES = [[[5], [6, 7, 8], [9, 10]], [[11, 12], [13]]]


@pytest.fixture
def prompts() -> list[Prompt]:
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


def test_scores_are_those_of_a_plain_forward_pass(sample: Sphinx, prompts: list[Prompt]) -> None:
    expected = [[plain(sample, p, answer) for answer in answers] for p, answers in zip(prompts, CHOICES, strict=True)]
    assert len({round(score, 3) for scores in expected for score in scores}) == 5
    found = rank(sample, prompts, CHOICES)
    assert found == [pytest.approx(scores, abs=1e-4) for scores in expected]
    alone = [rank(sample, [prompt], [answers])[0] for prompt, answers in zip(prompts, CHOICES, strict=True)]
    assert found == [pytest.approx(scores, abs=1e-4) for scores in alone]
    means = [
        [s / len(a) for s, a in zip(scores, answers, strict=True)]
        for scores, answers in zip(expected, CHOICES, strict=True)
    ]
    assert rank(sample, prompts, CHOICES, normalise=True) == [pytest.approx(scores, abs=1e-4) for scores in means]


def test_single_tokens_need_no_second_pass_and_an_image_is_read_once(
    sample: Sphinx, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, read = sample.embed_images, []

    def counting(pixels: Tensor, seen: Tensor | None = None) -> Tensor:
        read.append(len(pixels))
        return embed(pixels, seen)

    monkeypatch.setattr(sample, "embed_images", counting)
    [scores] = rank(sample, prompts[:1], [[[5], [6], [7, 8]]])
    assert read == [1]
    assert rank(sample, prompts[:1], [[[5], [6]]]) == [pytest.approx(scores[:2], abs=1e-5)]


def test_the_mode_is_restored_and_mistakes_are_one_line(sample: Sphinx, prompts: list[Prompt]) -> None:
    sample.train()
    assert rank(sample, [], []) == []
    rank(sample, prompts, CHOICES)
    assert sample.training
    for choices in ([], [[]], [[5], []]):
        with pytest.raises(UserError, match="prompt 0: every prompt needs choices"):
            rank(sample, prompts[1:], [choices])
    with pytest.raises(UserError, match="max_positions"):
        rank(sample, prompts[1:], [[[5] * 1100]])
