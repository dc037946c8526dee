"""Mixed visual embeddings (SPHINX, section 3.2): four encoders' tokens as one sequence of decoder embeddings.

Shapes: N images, V views of each, L tokens of an image, C joined channels, D decoder width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from sphinx_pl.models.attention import training_kernel
from sphinx_pl.models.config import VisionConfig
from sphinx_pl.models.towers import Tower, build_towers
from sphinx_pl.models.views import split_views

CHANNEL_TOWERS = ("clip", "convnext", "dinov2")


def merge_patches(tokens: Tensor, mode: str, factor: int) -> Tensor:
    """Fewer patch tokens: [M, 1 + g*g, C] -> [M, 1 + (g/factor)^2, C'], class token first.

    "none": unchanged. "mean": of factor x factor neighbours, C' = C. "shuffle": their channels side by side (row,
    column, channel), C' = factor^2 * C; the class token is repeated to that width.
    """
    if mode == "none":
        return tokens
    first, patches = tokens[:, :1], tokens[:, 1:]
    side = int(patches.shape[1] ** 0.5) // factor
    blocks = torch.unflatten(patches, 1, (side, factor, side, factor)).transpose(
        2, 3
    )  # [M, side, side, factor, factor, C]
    if mode == "mean":
        return torch.cat([first, blocks.mean(dim=(3, 4)).flatten(1, 2)], dim=1)
    return torch.cat([first.repeat(1, 1, factor**2), blocks.flatten(3).flatten(1, 2)], dim=1)


class VisionMixer(nn.Module):
    """Towers, their joining by channel and by sequence, and the projections to the decoder's width."""

    def __init__(self, config: VisionConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.towers = build_towers(config)
        self.visual_proj = self._projection(config.joined_width, width) if config.channel_towers else None
        self.qformer_proj = self._projection(config.qformer.width, width) if config.qformer else None
        self.start_img = nn.Parameter(torch.randn(width) * 0.02)
        self.end_img = nn.Parameter(torch.randn(width) * 0.02)

    @staticmethod
    def _projection(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs, eps=1e-5))

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, S, S], normalised -> [N, L, D]; of each view: start, Q-Former queries, class and patches, end."""
        config = self.config
        seen = {key: self.encode(cast(Tower, tower), pixels) for key, tower in self.towers.items()}
        groups = [views for views, _ in config.view_groups]
        by_group = zip(*(torch.split(tokens, groups, dim=1) for tokens in seen.values()), strict=True)
        return torch.cat(
            [
                self._project(dict(zip(seen, group, strict=True)), merge)
                for group, (_, merge) in zip(by_group, config.view_groups, strict=True)
            ],
            dim=1,
        )

    def encode(self, tower: Tower, pixels: Tensor) -> Tensor:
        """What one of the towers makes of normalised images: [N, 3, S, S] -> [N, V, tokens, width]."""
        trains = any(parameter.requires_grad for parameter in tower.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()), training_kernel(pixels.device):
            views = split_views(pixels, tower.view_size, self.config.grid, self.config.half_resize)
            return torch.as_tensor(tower(views.flatten(0, 1)).unflatten(0, views.shape[:2]))

    def _project(self, seen: dict[str, Tensor], merge: str) -> Tensor:
        """The towers' [N, v, tokens, width] of v views -> [N, v * tokens of a view, D]."""
        images, views = next(iter(seen.values())).shape[:2]
        seen = {key: tokens.flatten(0, 1) for key, tokens in seen.items()}
        parts = [self.start_img.expand(images * views, 1, -1)]
        if self.qformer_proj is not None:
            parts.append(self.qformer_proj(seen["qformer"]))
        if self.visual_proj is not None:
            joined = torch.cat([seen[key] for key in CHANNEL_TOWERS if key in seen], dim=-1)
            parts.append(self.visual_proj(merge_patches(joined, merge, self.config.merge_factor)))
        parts.append(self.end_img.expand(images * views, 1, -1))
        tokens = torch.cat([part.to(self.start_img.dtype) for part in parts], dim=1)
        return tokens.reshape(images, -1, tokens.shape[-1])

    def flops(self) -> float:
        """Of one image's forward pass, all views."""
        config, width = self.config, len(self.start_img)
        per_view = sum(cast(Tower, tower).flops() for tower in self.towers.values())
        if config.qformer:
            per_view += 2 * config.qformer.queries * config.qformer.width * width
        patches = sum(views * config.patch_tokens(merge) for views, merge in config.view_groups)
        return float(config.views * per_view + 2 * patches * config.joined_width * width)
