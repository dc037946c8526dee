"""Generation: batches, stop sequences, limits, seeds."""

from __future__ import annotations

import pytest
import torch

from sphinx_pl.data.schema import IMAGE_SLOT
from sphinx_pl.generation.generate import GenerationConfig, Prompt, generate
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError


def greedy_without_cache(model: Sphinx, prompt: Prompt, tokens: int) -> list[int]:
    ids: list[int] = []
    for _ in range(tokens):
        every = torch.tensor([*prompt.ids, *ids])
        x = model.decoder.embed(every.clamp(min=0)[None])
        if prompt.pixels is not None:
            x[0, every == IMAGE_SLOT] = model.embed_images(prompt.pixels).flatten(0, 1)
        hidden = model.decoder(x, torch.arange(len(every))[None])
        ids.append(int(model.decoder.logits(hidden[0, -1]).argmax()))
    return ids


@torch.no_grad()
def test_batched_greedy_equals_alone_without_cache(model: Sphinx, prompts: list[Prompt]) -> None:
    expected = [greedy_without_cache(model, prompt, 12) for prompt in prompts]
    assert len({tuple(ids) for ids in expected}) == 4
    assert len(set(expected[0])) > 3
    assert generate(model, prompts, GenerationConfig(max_new_tokens=12)) == expected
    assert [generate(model, [p], GenerationConfig(max_new_tokens=12))[0] for p in prompts] == expected


def test_limits_eos_and_stops(model: Sphinx, prompts: list[Prompt]) -> None:
    full = generate(model, prompts, GenerationConfig(max_new_tokens=12))[0]
    prompt = prompts[0]
    prompts[1].max_new_tokens = 3
    assert [len(ids) for ids in generate(model, prompts, GenerationConfig(max_new_tokens=5))] == [5, 3, 5, 5]
    [cut] = generate(model, [prompt], GenerationConfig(max_new_tokens=12, eos_id=full[4]))
    assert cut == full[: full.index(full[4])]
    [cut] = generate(model, [prompt], GenerationConfig(max_new_tokens=12, stop=[[511, 511], full[3:6]]))
    assert cut == full[:3]


def test_seeds(model: Sphinx, prompts: list[Prompt]) -> None:
    def sample_with(seed: int, top_p: float = 1.0) -> list[list[int]]:
        config = GenerationConfig(max_new_tokens=8, temperature=1.0, top_p=top_p, seed=seed)
        return generate(model, prompts, config)

    assert sample_with(1) == sample_with(1)
    assert sample_with(1) != sample_with(2)
    assert sample_with(1, top_p=1e-6) == generate(model, prompts, GenerationConfig(max_new_tokens=8))


def test_mode_is_restored_and_nothing_gives_nothing(model: Sphinx, prompts: list[Prompt]) -> None:
    model.freeze(["clip"])
    model.train()
    generate(model, prompts[:1], GenerationConfig(max_new_tokens=1))
    assert model.decoder.training
    assert model.mixer is not None
    assert not model.mixer.towers["clip"].training
    assert generate(model, [], GenerationConfig()) == []


def test_bad_prompts_and_settings_are_one_line(model: Sphinx, prompts: list[Prompt]) -> None:
    with pytest.raises(UserError, match="prompt 0: 26 image slots for images of 27 tokens"):
        generate(model, [Prompt(prompts[0].ids[2:], prompts[0].pixels)], GenerationConfig())
    with pytest.raises(UserError, match="max_positions"):
        generate(model, [Prompt([1] * 1000)], GenerationConfig(max_new_tokens=25))
    with pytest.raises(UserError, match="empty sequence"):
        GenerationConfig(stop=[[]])
    with pytest.raises(UserError, match="top_p"):
        GenerationConfig(top_p=0)
