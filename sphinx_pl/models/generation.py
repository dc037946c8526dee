"""Batched generation with a key/value cache: greedy or sampled, with stop sequences.

Prompts of different length are padded on the left, so that all rows grow at the same end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sphinx_pl.data.record import IMAGE_SLOT
from sphinx_pl.errors import UserError
from sphinx_pl.models.decoder import KVCache
from sphinx_pl.models.sphinx import Sphinx


@dataclass(slots=True)
class Prompt:
    """Token ids with `IMAGE_SLOT` where visual tokens stand, and the images in the order of their slots."""

    ids: list[int]
    pixels: Optional[Tensor] = None  # [n, 3, S, S] uint8
    max_new_tokens: Optional[int] = None  # instead of the configuration's
    seen: Sequence[Sequence[bool]] = ()  # of each image the views that are not skipped, where the model skips any

    def slots(self, view_tokens: Sequence[int]) -> int:
        """Visual tokens of all images, from those of each view."""
        if self.seen:
            return sum(n if s else 1 for views in self.seen for n, s in zip(view_tokens, views, strict=True))
        return 0 if self.pixels is None else len(self.pixels) * sum(view_tokens)


@dataclass(slots=True)
class GenerationConfig:
    """How to pick tokens, and when to end.

    `temperature` 0 is greedy. `top_p` keeps the smallest set of tokens with at least that probability. `stop`:
    token sequences that end an answer without being part of it, as `eos_id` does.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    eos_id: Optional[int] = None
    stop: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"generation.max_new_tokens must be positive, not {self.max_new_tokens}")
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:  # NaN is neither
            raise UserError(
                f"generation.temperature={self.temperature} must be >= 0 and generation.top_p={self.top_p} in (0, 1]"
            )
        if any(not sequence for sequence in self.stop):
            raise UserError("generation.stop holds an empty sequence, which would end every answer at once: remove it")


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

    The lists grow in place; the end of one that is not finished may be the beginning of a stop sequence.
    """
    if not prompts:
        return
    limits = [prompt.max_new_tokens or config.max_new_tokens for prompt in prompts]
    check_prompts(model, prompts, limits)
    was_training = model.training
    model.eval()
    try:
        yield from _steps(model, prompts, limits, config)
    finally:
        model.train(was_training)


def check_prompts(model: Sphinx, prompts: Sequence[Prompt], limits: Sequence[int]) -> None:
    """Refuse what the model cannot go through: `limits` are the tokens behind each prompt.

    Raises:
        UserError: slots that do not match the images, or a prompt too long for the decoder.
    """
    vision, room = model.config.vision, model.config.decoder.max_positions
    for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        slots, needed = prompt.ids.count(IMAGE_SLOT), prompt.slots(vision.view_tokens if vision else [])
        if slots != needed or (vision and vision.skip_padding and prompt.pixels is not None and not prompt.seen):
            raise UserError(
                f"prompt {number}: {slots} image slots for images of {needed} tokens: was it made for another model?"
            )
        if not prompt.ids or len(prompt.ids) + limit > room:
            raise UserError(
                f"prompt {number}: {len(prompt.ids)} tokens and {limit} new ones must be 1 to {room} "
                "(model.decoder.max_positions): change the prompt or max_new_tokens"
            )


@torch.no_grad()  # on a generator it holds while this runs, not while the caller does
def _steps(
    model: Sphinx, prompts: Sequence[Prompt], limits: list[int], config: GenerationConfig
) -> Iterator[list[list[int]]]:
    decoder = model.decoder
    device = decoder.tok_embeddings.weight.device
    ids_BT = pad_sequence([torch.tensor(p.ids) for p in prompts], batch_first=True, padding_side="left").to(device)
    rows, length = ids_BT.shape
    starts_B = torch.tensor([length - len(prompt.ids) for prompt in prompts], device=device)
    columns = torch.arange(length + max(limits), device=device)
    real_BS = columns >= starts_B[:, None]
    padded = min(len(prompt.ids) for prompt in prompts) < length

    x_BTD = decoder.embed(ids_BT.clamp(min=0))
    x_BTD = place_images(model, x_BTD, ids_BT, prompts)

    here = columns[:length]
    # Padding attends to itself, so that no row of the softmax is empty.
    itself = torch.eye(length, dtype=torch.bool, device=device)
    mask = (here <= here[:, None]) & real_BS[:, None, None, :length] | itself if padded else None
    cache = KVCache(model.config.decoder.layers, length + max(limits))
    positions_BT = (here - starts_B[:, None]).clamp(min=0)
    hidden_BTD = decoder(x_BTD, positions_BT, mask, cache)

    generator = torch.Generator().manual_seed(config.seed)
    answers: list[list[int]] = [[] for _ in range(rows)]
    done = [False] * rows
    while True:
        chosen = _choose(decoder.logits(hidden_BTD[:, -1]).float().cpu(), config, generator)
        for row, token in enumerate(chosen.tolist()):
            if not done[row]:
                done[row] = _append(answers[row], token, limits[row], config)
        yield answers
        if all(done):
            return
        positions_BT = (cache.length - starts_B)[:, None]
        x_BTD = decoder.embed(chosen.to(device)[:, None])
        mask = real_BS[:, None, None, : cache.length + 1] if padded else None
        hidden_BTD = decoder(x_BTD, positions_BT, mask, cache)


def place_images(model: Sphinx, x_BTD: Tensor, ids_BT: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Embeddings with the visual tokens of all prompts in their slots."""
    images = [prompt.pixels for prompt in prompts if prompt.pixels is not None and len(prompt.pixels)]
    if not images:
        return x_BTD
    seen = [views for prompt in prompts for views in prompt.seen]
    tokens = model.embed_images(
        torch.cat(images).to(x_BTD.device), torch.tensor(seen, device=x_BTD.device) if seen else None
    )
    return x_BTD.masked_scatter((ids_BT == IMAGE_SLOT)[..., None], tokens.to(x_BTD.dtype))


def _append(answer: list[int], token: int, limit: int, config: GenerationConfig) -> bool:
    """Add `token`; True if that ends the answer, which then loses the sequence that ended it."""
    if token == config.eos_id:
        return True
    answer.append(token)
    for sequence in config.stop:
        if answer[-len(sequence) :] == sequence:
            del answer[-len(sequence) :]
            return True
    return len(answer) >= limit


def _choose(logits_BV: Tensor, config: GenerationConfig, generator: torch.Generator) -> Tensor:
    """One token of each row, [B]. On the CPU in float32, so that a seed means the same on every device."""
    if config.temperature == 0:
        return logits_BV.argmax(dim=-1)
    probabilities, order = (logits_BV / config.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before >= config.top_p, 0.0)
    return order.gather(1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(1)
