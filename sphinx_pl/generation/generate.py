"""Batched generation with a key/value cache: greedy, sampled or searched with beams, with stop sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sphinx_pl.generation.beam import beam_search
from sphinx_pl.generation.decoding import GenerationConfig, OperaConfig, append
from sphinx_pl.generation.opera import opera_search
from sphinx_pl.generation.prompt import Prefix, Prompt, check_prompts, place_images
from sphinx_pl.models.sphinx import Sphinx

__all__ = ["GenerationConfig", "OperaConfig", "Prompt", "check_prompts", "generate", "place_images", "stream"]


def generate(model: Sphinx, prompts: Sequence[Prompt], config: GenerationConfig) -> list[list[int]]:
    """The new token ids of each prompt, without eos or stop sequence. The model's mode is left as it was.

    Raises:
        UserError: slots that do not match the images, or a prompt too long for the decoder.
    """
    answers: list[list[int]] = []
    for answers in stream(model, prompts, config):  # noqa: B007
        pass
    return answers


def stream(model: Sphinx, prompts: Sequence[Prompt], config: GenerationConfig) -> Iterator[list[list[int]]]:
    """As `generate`, but yields what there is of every answer after each token.

    The lists grow in place; the end of one that is not finished may be the beginning of a stop sequence. A search with
    beams yields once, at its end: until then another beam may win.
    """
    if not prompts:
        return
    limits = [prompt.max_new_tokens or config.max_new_tokens for prompt in prompts]
    check_prompts(model, prompts, limits)
    was_training = model.training
    model.eval()
    try:
        if config.opera is not None:
            # One after the other: each goes back to another place.
            each = zip(prompts, limits, strict=True)
            yield [opera_search(model, prompt, limit, config, config.opera) for prompt, limit in each]
        elif config.num_beams > 1:
            yield beam_search(model, prompts, limits, config)
        else:
            yield from _steps(model, prompts, limits, config)
    finally:
        model.train(was_training)


@torch.no_grad()  # on a generator it holds while this runs, not while the caller does
def _steps(
    model: Sphinx, prompts: Sequence[Prompt], limits: list[int], config: GenerationConfig
) -> Iterator[list[list[int]]]:
    prefix = Prefix(model, prompts, max(limits))
    hidden_BD = prefix.last_BD
    generator = torch.Generator().manual_seed(config.seed)
    answers: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    while True:
        chosen = _choose(model.decoder.logits(hidden_BD).float().cpu(), config, generator)
        for row, token in enumerate(chosen.tolist()):
            if not done[row]:
                done[row] = append(answers[row], token, limits[row], config)
        yield answers
        if all(done):
            return
        hidden_BD = prefix.follow(chosen.to(prefix.device)[:, None])[:, -1]


def _choose(logits_BV: Tensor, config: GenerationConfig, generator: torch.Generator) -> Tensor:
    """One token of each row, [B]. On the CPU in float32, so that a seed means the same on every device."""
    if config.temperature == 0:
        return logits_BV.argmax(dim=-1)
    probabilities, order = (logits_BV / config.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before >= config.top_p, 0.0)
    return order.gather(1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(1)
