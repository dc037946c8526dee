"""Mixed visual embeddings (SPHINX, section 3.2): four encoders' tokens as one sequence of decoder embeddings.

Shapes: N images, V views of each, L tokens of an image, C joined channels, D decoder width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from sphinx_pl.models.attention import training_kernel
from sphinx_pl.models.config import VisionConfig
from sphinx_pl.models.encoders import Tower, build_towers
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
        if config.skip_padding:
            self.skip_token = nn.Parameter(torch.randn(width) * 0.02)

    @staticmethod
    def _projection(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs, eps=1e-5))

    def forward(self, pixels: Tensor, seen_NV: Tensor | None = None) -> Tensor:
        """[N, 3, S, S], normalised -> [N, L, D]; of each view: start, Q-Former queries, class and patches, end.

        Args:
            seen_NV: bool, the views that the towers look at; each of the others is one skip token. The result is then
                [L, D] with the tokens of all images in a row, since they differ in number.
        """
        tokens = {key: self.encode(cast(Tower, tower), pixels, seen_NV) for key, tower in self.towers.items()}
        if seen_NV is not None:
            return self._with_skipped(tokens, seen_NV)
        by_view = {key: torch.unflatten(seen, 0, (len(pixels), -1)) for key, seen in tokens.items()}
        projected, first = [], 0
        for views, merge in self.config.view_groups:
            group = {key: seen[:, first : first + views].flatten(0, 1) for key, seen in by_view.items()}
            projected.append(torch.unflatten(self._project(group, merge), 0, (len(pixels), views)).flatten(1, 2))
            first += views
        return torch.cat(projected, dim=1)

    def _with_skipped(self, tokens: dict[str, Tensor], seen_NV: Tensor) -> Tensor:
        """Tokens of the views that were seen, [M, tokens, width] of each tower -> [L, D]."""
        lengths_NV = torch.where(seen_NV, torch.tensor(self.config.view_tokens, device=seen_NV.device), 1)
        starts_M = (lengths_NV.flatten().cumsum(0) - lengths_NV.flatten())[seen_NV.flatten()]
        view_M = torch.arange(seen_NV.shape[1], device=seen_NV.device).expand_as(seen_NV)[seen_NV]
        out_LD = self.skip_token.expand(int(lengths_NV.sum()), -1)  # which so takes part in every backward pass
        first = 0
        for views, merge in self.config.view_groups:
            chosen = (view_M >= first) & (view_M < first + views)
            projected = self._project({key: seen[chosen] for key, seen in tokens.items()}, merge)
            slots = starts_M[chosen][:, None] + torch.arange(projected.shape[1], device=starts_M.device)
            out_LD = out_LD.index_copy(0, slots.flatten(), projected.flatten(0, 1))
            first += views
        return out_LD

    def encode(self, tower: Tower, pixels: Tensor, seen_NV: Tensor | None = None) -> Tensor:
        """What one of the towers makes of normalised images: [N, 3, S, S] -> [M, tokens, width] of the views seen."""
        trains = any(parameter.requires_grad for parameter in tower.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()), training_kernel(pixels.device):
            views = split_views(pixels, tower.view_size, self.config.grid, self.config.half_resize)
            return torch.as_tensor(tower(views.flatten(0, 1) if seen_NV is None else views[seen_NV]))

    def _project(self, seen: dict[str, Tensor], merge: str) -> Tensor:
        """The towers' [M, tokens, width] of M views -> [M, tokens of a view, D]."""
        views = len(next(iter(seen.values())))
        parts = [self.start_img.expand(views, 1, -1)]
        if self.qformer_proj is not None:
            parts.append(self.qformer_proj(seen["qformer"]))
        if self.visual_proj is not None:
            joined = torch.cat([seen[key] for key in CHANNEL_TOWERS if key in seen], dim=-1)
            parts.append(self.visual_proj(merge_patches(joined, merge, self.config.merge_factor)))
        parts.append(self.end_img.expand(views, 1, -1))
        return torch.cat([part.to(self.start_img.dtype) for part in parts], dim=1)

    def flops(self, images: float = 1, views: float | None = None) -> float:
        """Of the forward pass of so many images, whose overviews and others make `views` that are not skipped (None:
        no view is skipped)."""
        config, width = self.config, len(self.start_img)
        views = images * config.views if views is None else views
        per_view = sum(cast(Tower, tower).flops() for tower in self.towers.values())
        if config.qformer:
            per_view += 2 * config.qformer.queries * config.qformer.width * width
        # The overview, which is never skipped, may be merged otherwise than the rest.
        (_, first), (_, rest) = config.view_groups[0], config.view_groups[-1]
        patches = images * config.patch_tokens(first) + (views - images) * config.patch_tokens(rest)
        return float(views * per_view + 2 * patches * config.joined_width * width)
