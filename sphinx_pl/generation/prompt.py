"""The model's input, and the decoder's state after reading it.

Shapes: B rows, S positions of the cache, T new positions, D width. Prompts of different lengths are
padded on the left, so that all rows grow at the same end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sphinx_pl.data.schema import IMAGE_SLOT
from sphinx_pl.models.decoder import KVCache
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError


@dataclass(slots=True)
class Prompt:
    """Token ids with `IMAGE_SLOT` in place of visual tokens, and the images in the order of their
    slots.
    """

    ids: list[int]
    pixels: Optional[Tensor] = None  # [n, 3, S, S] uint8
    max_new_tokens: Optional[int] = None  # instead of the configuration's
    kept_views: Sequence[Sequence[bool]] = ()  # of each image the views that are not skipped, where the model skips any

    def slots(self, view_tokens: Sequence[int]) -> int:
        """Visual tokens of all images, from those of each view."""
        if self.kept_views:
            return sum(n if s else 1 for views in self.kept_views for n, s in zip(view_tokens, views, strict=True))
        return 0 if self.pixels is None else len(self.pixels) * sum(view_tokens)


def check_prompts(model: Sphinx, prompts: Sequence[Prompt], limits: Sequence[int]) -> None:
    """Check that each prompt can be answered with `limits` new tokens.

    Raises:
        UserError: the slots do not match the images, or a prompt is too long for the decoder.
    """
    vision, room = model.config.vision, model.config.decoder.max_positions
    for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        slots, needed = prompt.ids.count(IMAGE_SLOT), prompt.slots(vision.view_tokens if vision else [])
        if slots != needed or (vision and vision.skip_padding and prompt.pixels is not None and not prompt.kept_views):
            raise UserError(
                f"prompt {number}: {slots} image slots for images of {needed} tokens: was it made for another model?"
            )
        if not prompt.ids or len(prompt.ids) + limit > room:
            raise UserError(
                f"prompt {number}: {len(prompt.ids)} tokens and {limit} new ones must be 1 to {room} "
                "(model.decoder.max_positions): change the prompt or max_new_tokens"
            )


def place_images(model: Sphinx, x_BTD: Tensor, ids_BT: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Return the embeddings with the visual tokens of all prompts in their slots."""
    images = [prompt.pixels for prompt in prompts if prompt.pixels is not None and len(prompt.pixels)]
    if not images:
        return x_BTD
    kept_views = [views for prompt in prompts for views in prompt.kept_views]
    tokens = model.embed_images(
        torch.cat(images).to(x_BTD.device), torch.tensor(kept_views, device=x_BTD.device) if kept_views else None
    )
    return x_BTD.masked_scatter((ids_BT == IMAGE_SLOT)[..., None], tokens.to(x_BTD.dtype))


class Prefix:
    """Prompts that the decoder has read, with room for further tokens.

    It is used without gradients.

    `last_BD` are the hidden states after each prompt, `length` is the length of the longest, and
    `images_BS` marks the positions of visual tokens.
    """

    def __init__(self, model: Sphinx, prompts: Sequence[Prompt], room: int) -> None:
        self.decoder = decoder = model.decoder
        self.device = device = decoder.tok_embeddings.weight.device
        ids_BT = pad_sequence([torch.tensor(p.ids) for p in prompts], batch_first=True, padding_side="left").to(device)
        self.length = length = ids_BT.shape[1]
        self.images_BS = ids_BT == IMAGE_SLOT
        self._starts_B = torch.tensor([length - len(prompt.ids) for prompt in prompts], device=device)
        self._columns = torch.arange(length + room, device=device)
        self._real_BS = self._columns >= self._starts_B[:, None]
        self._padded = min(len(prompt.ids) for prompt in prompts) < length

        x_BTD = decoder.embed(ids_BT.clamp(min=0))
        x_BTD = place_images(model, x_BTD, ids_BT, prompts)
        here = self._columns[:length]
        # Padding attends to itself, so that no row of the softmax is empty.
        itself = torch.eye(length, dtype=torch.bool, device=device)
        mask = (here <= here[:, None]) & self._real_BS[:, None, None, :length] | itself if self._padded else None
        self.cache = KVCache(model.config.decoder.layers, length + room)
        positions_BT = (here - self._starts_B[:, None]).clamp(min=0)
        self.last_BD = decoder(x_BTD, positions_BT, mask, self.cache)[:, -1]

    def select(self, rows: Tensor) -> None:
        """Replace row i by row `rows[i]`. There may be more rows than before."""
        self.cache.select(rows)
        self._starts_B, self._real_BS = self._starts_B[rows], self._real_BS[rows]
        self.images_BS, self.last_BD = self.images_BS[rows], self.last_BD[rows]

    def follow(self, ids_BT: Tensor) -> Tensor:
        """Return the hidden states [B, T, D] of further tokens.

        Each token sees the tokens before it.
        """
        start, count = self.cache.length, ids_BT.shape[1]
        positions_BT = self._columns[start : start + count] - self._starts_B[:, None]
        mask = None
        if self._padded:
            mask = self._real_BS[:, None, None, : start + count]
            if count > 1:
                mask = mask & (self._columns[: start + count] <= self._columns[start : start + count, None])
        return torch.as_tensor(self.decoder(self.decoder.embed(ids_BT), positions_BT, mask, self.cache))

    def fork(self, ids_BT: Tensor) -> Tensor:
        """Return the hidden states of T alternatives for one token.

        Each sees only the prefix and itself.

        All of them are in the cache afterwards; `KVCache.keep` keeps one.
        """
        start, count = self.cache.length, ids_BT.shape[1]
        past = self._real_BS[:, None, None, :start].expand(-1, -1, count, -1)
        itself = torch.eye(count, dtype=torch.bool, device=self.device).expand(len(past), 1, -1, -1)
        positions_BT = (start - self._starts_B)[:, None].expand(-1, count)
        mask = torch.cat([past, itself], dim=-1)
        return torch.as_tensor(self.decoder(self.decoder.embed(ids_BT), positions_BT, mask, self.cache))
