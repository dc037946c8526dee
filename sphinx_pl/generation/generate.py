"""Batched generation with a key/value cache and stop sequences: greedy, sampled or with beam
search.
"""

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
    """Return the new token ids of each prompt, without eos or stop sequence.

    The model's mode is restored.

    Raises:
        UserError: the slots do not match the images, or a prompt is too long for the decoder.
    """
    answers: list[list[int]] = []
    for answers in stream(model, prompts, config):  # noqa: B007
        pass
    return answers


def stream(model: Sphinx, prompts: Sequence[Prompt], config: GenerationConfig) -> Iterator[list[list[int]]]:
    """Yield all answers so far after each token. See `generate`.

    The lists grow in place. The end of an unfinished answer may be the beginning of a stop
    sequence. A beam search yields once, at its end, since another beam may win until then.
    """
    if not prompts:
        return
    limits = [prompt.max_new_tokens or config.max_new_tokens for prompt in prompts]
    check_prompts(model, prompts, limits)
    was_training = model.training
    model.eval()
    try:
        if config.opera is not None:
            # Each prompt has its own search, since each goes back to another place.
            pairs = zip(prompts, limits, strict=True)
            yield [opera_search(model, prompt, limit, config, config.opera) for prompt, limit in pairs]
        elif config.num_beams > 1:
            yield beam_search(model, prompts, limits, config)
        else:
            yield from _steps(model, prompts, limits, config)
    finally:
        model.train(was_training)


@torch.no_grad()  # on a generator it applies only while this code runs
def _steps(
    model: Sphinx, prompts: Sequence[Prompt], limits: list[int], config: GenerationConfig
) -> Iterator[list[list[int]]]:
    prefix = Prefix(model, prompts, max(limits))
    hidden_BD = prefix.last_BD
    generator = torch.Generator().manual_seed(config.seed)
    answers: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    while True:
        tokens = _choose(model.decoder.logits(hidden_BD).float().cpu(), config, generator)
        for row, token in enumerate(tokens.tolist()):
            if not done[row]:
                done[row] = append(answers[row], token, limits[row], config)
        yield answers
        if all(done):
            return
        hidden_BD = prefix.follow(tokens.to(prefix.device)[:, None])[:, -1]


def _choose(logits_BV: Tensor, config: GenerationConfig, generator: torch.Generator) -> Tensor:
    """Return one token of each row, [B].

    It runs on the CPU in float32, so a seed means the same on every device.
    """
    if config.temperature == 0:
        return logits_BV.argmax(dim=-1)
    probabilities, order = (logits_BV / config.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before >= config.top_p, 0.0)
    return order.gather(1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(1)
