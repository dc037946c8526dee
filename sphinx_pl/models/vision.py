"""Mixed visual embeddings (SPHINX, section 3.2): tokens of several encoders as one sequence.

Shapes: N images, V views of each, L tokens of an image, C joined channels, D decoder width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sphinx_pl.models.attention import training_kernel
from sphinx_pl.models.config import VisionConfig
from sphinx_pl.models.encoders.base import ENCODERS, Encoder, EncoderConfig
from sphinx_pl.models.encoders.resamplers import RESAMPLERS, Resampler


def merge_patches(tokens: Tensor, mode: str, factor: int) -> Tensor:
    """Fewer patch tokens: [M, 1 + g*g, C] -> [M, 1 + (g/factor)^2, C'], class token first.

    "none": unchanged. "mean": of factor x factor neighbours, C' = C. "shuffle": their channels side
    by side (row, column, channel), C' = factor^2 * C; the class token is repeated to that width.
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


def align_map(tokens: Tensor, grid: int, how: str) -> Tensor:
    """A feature map on another grid: [M, 1 + g*g, C] -> [M, 1 + grid*grid, C'], class token first.

    "bilinear": interpolated between the centres of patches, C' = C. "shuffle": the channels of
    neighbours side by side for a coarser grid, as `merge_patches` has them, or the inverse for a
    finer one; the class token is then the mean of its parts.
    """
    side = round((tokens.shape[1] - 1) ** 0.5)
    if side == grid:
        return tokens
    if how == "shuffle" and side > grid:
        return merge_patches(tokens, "shuffle", side // grid)
    first, patches = tokens[:, :1], tokens[:, 1:]
    if how == "shuffle":
        factor = grid // side
        blocks = patches.reshape(len(tokens), side, side, factor, factor, -1).transpose(2, 3)
        mean = first.reshape(len(tokens), 1, factor**2, -1).mean(dim=2)
        return torch.cat([mean, blocks.reshape(len(tokens), grid**2, -1)], dim=1)
    image = torch.unflatten(patches.transpose(1, 2), 2, (side, side))
    resized = F.interpolate(image.float(), size=(grid, grid), mode="bilinear").to(tokens.dtype)
    return torch.cat([first, resized.flatten(2).transpose(1, 2)], dim=1)


def build_encoder(config: VisionConfig, key: str) -> Encoder:
    """One of the configured encoders, with new weights."""
    section = config.encoders[key]
    encoder = ENCODERS[section.kind](section, config.scheme)
    encoder.init_weights()
    return encoder


def build_encoders(config: VisionConfig) -> dict[str, Encoder]:
    """The configured encoders by key, with new weights."""
    return {key: build_encoder(config, key) for key in config.encoders}


def build_resampler(config: EncoderConfig) -> Resampler:
    """The resampler of an encoder that has one, with new weights."""
    grid = config.grid if config.has_grid else None
    return RESAMPLERS[config.resampler.kind](config.resampler, config.width, grid)


class MixedVisionEncoder(nn.Module):
    """Encoders, their joining by channel and by sequence, and projections to the decoder's width."""

    def __init__(self, config: VisionConfig, width: int) -> None:
        super().__init__()
        self.config = config
        # Names of modules are names of tensors on disk. They stay `mixer.towers.KEY.…`, so that
        # all checkpoints can be read.
        self.towers = nn.ModuleDict(build_encoders(config))
        self.visual_proj = self._projection(config.joined_width, width) if config.channel_encoders else None
        for encoder in config.sequence_encoders:
            self.add_module(f"{encoder.part}_proj", self._projection(encoder.sequence_width, width))
        resampled = [encoder for encoder in config.sequence_encoders if encoder.resampler is not None]
        self.resamplers = nn.ModuleDict({encoder.part: build_resampler(encoder) for encoder in resampled})
        self.start_img = nn.Parameter(torch.randn(width) * 0.02)
        self.end_img = nn.Parameter(torch.randn(width) * 0.02)
        if config.skip_padding:
            self.skip_token = nn.Parameter(torch.randn(width) * 0.02)

    def _projection(self, inputs: int, outputs: int) -> nn.Sequential:
        if self.config.projection == "mlp":
            return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))
        return nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs, eps=1e-5))

    @property
    def encoders(self) -> dict[str, Encoder]:
        """The encoders by key, in order."""
        return dict(self.towers.items())  # type: ignore[arg-type]

    @property
    def sequence_projections(self) -> dict[str, nn.Module]:
        """The projection of each encoder that is joined by sequence, by key."""
        return {encoder.part: self.get_submodule(f"{encoder.part}_proj") for encoder in self.config.sequence_encoders}

    @property
    def projections(self) -> list[nn.Module]:
        """All projections and resamplers: that of the joined channels first, if there is one."""
        first = [self.visual_proj] if self.visual_proj is not None else []
        return [*first, *self.sequence_projections.values(), *self.resamplers.values()]

    def forward(self, pixels: Tensor, kept_NV: Tensor | None = None) -> Tensor:
        """uint8 [N, 3, S, S] -> [N, L, D]; of each view: start, sequence encoders, class and patches, end.

        Args:
            kept_NV: bool, the views that the encoders see; each of the others is one skip token. The
                result is then [L, D] with the tokens of all images in a row, since their numbers
                differ.
        """
        tokens = {kind: self.encode(encoder, pixels, kept_NV) for kind, encoder in self.encoders.items()}
        if kept_NV is not None:
            return self._with_skipped(tokens, kept_NV)
        by_view = {kind: torch.unflatten(own, 0, (len(pixels), -1)) for kind, own in tokens.items()}
        projected, first = [], 0
        for views, merge in self.config.view_groups:
            group = {kind: own[:, first : first + views].flatten(0, 1) for kind, own in by_view.items()}
            projected.append(torch.unflatten(self._project(group, merge), 0, (len(pixels), views)).flatten(1, 2))
            first += views
        return torch.cat(projected, dim=1)

    def _with_skipped(self, tokens: dict[str, Tensor], kept_NV: Tensor) -> Tensor:
        """Tokens of the views that are kept, [M, tokens, width] of each encoder -> [L, D]."""
        lengths_NV = torch.where(kept_NV, torch.tensor(self.config.view_tokens, device=kept_NV.device), 1)
        starts_M = (lengths_NV.flatten().cumsum(0) - lengths_NV.flatten())[kept_NV.flatten()]
        view_M = torch.arange(kept_NV.shape[1], device=kept_NV.device).expand_as(kept_NV)[kept_NV]
        out_LD = self.skip_token.expand(int(lengths_NV.sum()), -1)  # which so takes part in every backward pass
        first = 0
        for views, merge in self.config.view_groups:
            chosen = (view_M >= first) & (view_M < first + views)
            projected = self._project({kind: own[chosen] for kind, own in tokens.items()}, merge)
            slots = starts_M[chosen][:, None] + torch.arange(projected.shape[1], device=starts_M.device)
            out_LD = out_LD.index_copy(0, slots.flatten(), projected.flatten(0, 1))
            first += views
        return out_LD

    def encode(self, encoder: Encoder, pixels: Tensor, kept_NV: Tensor | None = None) -> Tensor:
        """One encoder's tokens: uint8 [N, 3, S, S] -> [M, tokens, width] of M views that are kept."""
        trains = any(parameter.requires_grad for parameter in encoder.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()), training_kernel(pixels.device):
            views = encoder.views(pixels)
            return torch.as_tensor(encoder(views.flatten(0, 1) if kept_NV is None else views[kept_NV]))

    def _project(self, tokens: dict[str, Tensor], merge: str) -> Tensor:
        """The encoders' [M, tokens, width] of M views -> [M, tokens of a view, D]."""
        views = len(next(iter(tokens.values())))
        parts = [self.start_img.expand(views, 1, -1)]
        for key, projection in self.sequence_projections.items():
            own = self.resamplers[key](tokens[key]) if key in self.resamplers else tokens[key]
            parts.append(projection(own))
        if self.visual_proj is not None:
            joined = torch.cat(
                [self._on_grid(tokens[encoder.part]) for encoder in self.config.channel_encoders], dim=-1
            )
            parts.append(self.visual_proj(merge_patches(joined, merge, self.config.merge_factor)))
        parts.append(self.end_img.expand(views, 1, -1))
        return torch.cat([part.to(self.start_img.dtype) for part in parts], dim=1)

    def _on_grid(self, tokens: Tensor) -> Tensor:
        """A channel encoder's tokens on the common grid."""
        how = self.config.align
        return tokens if how is None else align_map(tokens, self.config.patch_grid, how)

    def flops(self, images: float = 1, views: float | None = None) -> float:
        """FLOPs of a forward pass over `images` images with `views` kept views (None: all)."""
        config, width = self.config, len(self.start_img)
        views = images * config.views if views is None else views
        per_view = sum(encoder.flops() for encoder in self.encoders.values())
        second = width if config.projection == "mlp" else 0  # its other matrix
        for section in config.sequence_encoders:
            per_view += 2 * section.sequence_tokens * (section.sequence_width + second) * width
        for key, resampler in self.resamplers.items():
            per_view += resampler.flops(config.encoder_tokens(config.encoders[key]))  # type: ignore[operator]
        # The overview, which is never skipped, may be merged otherwise than the rest.
        (_, first), (_, rest) = config.view_groups[0], config.view_groups[-1]
        patches = images * config.patch_tokens(first) + (views - images) * config.patch_tokens(rest)
        inputs = config.joined_width + second if config.channel_encoders else 0
        return float(views * per_view + 2 * patches * inputs * width)
