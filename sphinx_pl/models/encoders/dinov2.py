"""DINOv2's ViT with SwiGLU (Oquab et al. 2023) by timm: the final norm on all tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sphinx_pl.models.encoders.base import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LAYER_SCALE,
    Encoder,
    ViewScheme,
    ViTConfig,
    register,
    vit_flops,
)
from sphinx_pl.models.published import OURS, Names, OriginalNames, PublishedLayout, Source, joined, same
from sphinx_pl.models.views import by_channel, normalise, split_views


def _positions(encoder: Dinov2) -> Callable[[Tensor], Tensor]:
    """Resampling onto the patches' grid, once, unless the embedding has a grid of its own."""
    config = encoder.config
    return same if config.position_grid else lambda positions: resample_positions(positions, config.grid)


def _timm(name: str, encoder: Dinov2) -> Source:
    theirs = name.removeprefix("model.")
    return Source((theirs,), _positions(encoder) if theirs == "pos_embed" else same)


_SWIGLU = ((".mlp.w12.", ".mlp.fc1."), (".mlp.w3.", ".mlp.fc2."))
"""Meta's and timm's names of the two matrices of SwiGLU."""


def _meta(name: str, encoder: Dinov2) -> Source:
    source = _timm(name, encoder)
    [theirs] = source.names
    for meta, timm in _SWIGLU:
        theirs = theirs.replace(timm, meta)
    return Source((theirs,), source.make)


_TRANSFORMERS = Names(
    {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    },
    "encoder.layer",
    {
        "norm1": "norm1",
        "attn.qkv": "attention.attention.{}",
        "attn.proj": "attention.output.dense",
        "ls1.gamma": "layer_scale1.lambda1",
        "norm2": "norm2",
        "mlp.fc1": "mlp.weights_in",
        "mlp.fc2": "mlp.weights_out",
        "ls2.gamma": "layer_scale2.lambda1",
    },
)


def _transformers(name: str, encoder: Dinov2) -> Source:
    theirs = _TRANSFORMERS(name.removeprefix("model."))
    if "{}" in theirs:
        return Source(tuple(theirs.format(part) for part in ("query", "key", "value")), joined)
    return Source((theirs,), _positions(encoder) if name == "model.pos_embed" else same)


@dataclass
class Dinov2Config(ViTConfig):
    """The sizes of DINOv2's ViT. Defaults: g/14 with SwiGLU."""

    width: int = 1536
    layers: int = 40
    heads: int = 24
    # Of the fused gate and value, as timm counts it: 2.66667 * 2 * 1536 = 8192.
    mlp_ratio: float = 2.66667 * 2
    # The grid of the position embedding, resampled to the patches' in every pass; null: theirs.
    # Released weights have 37.
    position_grid: Optional[int] = None


@register("dinov2", Dinov2Config)
class Dinov2(Encoder):
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    timm_models = "vit_giant_patch14_dinov2*"
    published = (
        OURS,
        PublishedLayout("timm", _timm, ("mask_token",)),
        PublishedLayout("Meta", _meta, ("mask_token",)),
        PublishedLayout("transformers", _transformers, (r"embeddings\.mask_token",)),
    )
    original = OriginalNames(
        "llma.dinov2_vitg14.", "model.", _SWIGLU, unused={"llma.dinov2_vitg14.mask_token": (1, 1536)}
    )

    config: Dinov2Config

    def __init__(self, config: Dinov2Config, scheme: ViewScheme | None = None) -> None:
        super().__init__(config, scheme)
        import timm

        self.model = timm.create_model(
            "vit_giant_patch14_dinov2",
            pretrained=False,
            num_classes=0,
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depth=config.layers,
            num_heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            init_values=LAYER_SCALE,
        )
        if config.position_grid:
            self.model.pos_embed = nn.Parameter(torch.empty(1, 1 + config.position_grid**2, config.width))
            nn.init.trunc_normal_(self.model.pos_embed, std=0.02)

    def views(self, pixels: Tensor) -> Tensor:
        if not self.scheme.half_resize:
            return super().views(pixels)
        # The original resizes images that have CLIP's normalisation, and exchanges it afterwards.
        views = split_views(normalise(pixels, CLIP_MEAN, CLIP_STD), self.view_size, self.scheme.grid, half=True)
        # (x * clip_std + clip_mean - mean) / std as one multiplication and addition
        scale = [a / b for a, b in zip(CLIP_STD, self.std, strict=True)]
        shift = [(a - b) / c for a, b, c in zip(CLIP_MEAN, self.mean, self.std, strict=True)]
        return views * by_channel(scale, views) + by_channel(shift, views)

    def encode(self, views: Tensor) -> Tensor:
        patches = self.model.patch_embed(views)
        tokens = torch.cat([self.model.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        # timm's own forward pass resamples positions differently.
        tokens = tokens + resample_positions(self.model.pos_embed, self.config.grid).to(tokens.dtype)
        return torch.as_tensor(self.model.norm(self.model.blocks(tokens)))

    def blocks(self) -> Iterable[nn.Module]:
        return list(self.model.blocks)

    def flops(self) -> float:
        c = self.config
        fused = int(c.mlp_ratio * c.width)
        return vit_flops(c.grid, c.patch_size, c.width, c.layers, c.width * fused + c.width * fused // 2)


def resample_positions(positions: Tensor, grid: int) -> Tensor:
    """[1, 1 + g*g, D] -> [1, 1 + grid*grid, D] as DINOv2's own code does; timm's does otherwise.

    It is bicubic by the *scale factor* (grid + 0.1) / g: the 0.1 guards a division, and also
    shifts every sample.
    """
    own = int((positions.shape[1] - 1) ** 0.5)
    if own == grid:
        return positions
    patches = torch.unflatten(positions[:, 1:].float(), 1, (own, own)).permute(0, 3, 1, 2)
    factor = (grid + 0.1) / own
    patches = F.interpolate(patches, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([positions[:, :1].float(), patches.flatten(2).transpose(1, 2)], dim=1)
