"""CLIP's ConvNeXt trunk (Liu et al. 2022; Cherti et al. 2023) by timm, repeated onto the patch grid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor, nn

from sphinx_pl.models.checks import positive, require
from sphinx_pl.models.encoders.base import LAYER_SCALE, Encoder, EncoderConfig, ViewScheme, register
from sphinx_pl.models.encoders.clip import TEXT_SIDE
from sphinx_pl.models.published import OURS, OriginalNames, PublishedLayout, behind
from sphinx_pl.utils.errors import UserError


@dataclass
class ConvNextConfig(EncoderConfig):
    """The sizes of CLIP's ConvNeXt trunk. Defaults: XXL.

    Where `view_size` is given, it gets the views of that size, enlarged to `image_size` by
    repeating pixels.
    """

    image_size: int = 256
    view_size: Optional[int] = None
    depths: list[int] = field(default_factory=lambda: [3, 4, 30, 3])
    dims: list[int] = field(default_factory=lambda: [384, 768, 1536, 3072])
    stem: int = 4

    def __post_init__(self) -> None:
        positive(self.section, self, "image_size", "stem")
        require(
            self.view_size is None or self.view_size > 0,
            f"{self.section}.view_size must be positive or null, not {self.view_size}",
        )
        require(
            len(self.depths) == len(self.dims) > 0 and min(self.dims) > 0 and min(self.depths) >= 0,
            f"{self.section}.depths has {len(self.depths)} stages but dims has {len(self.dims)}: "
            "give one number per stage, none of them negative",
        )
        require(
            self.image_size % self.stride == 0,
            f"{self.section}.image_size={self.image_size} is not a multiple of the stride {self.stride}",
        )

    @property
    def stride(self) -> int:
        return int(self.stem * 2 ** (len(self.dims) - 1))

    @property
    def width(self) -> int:
        return self.dims[-1]

    @property
    def grid(self) -> int:
        return self.image_size // self.stride


@register("convnext", ConvNextConfig)
class ConvNext(Encoder):
    """The mean of the repeated map stands in front as the class token."""

    repeats = True
    resize_mode = "nearest"
    open_clip_model = "convnext_xxlarge"
    timm_models = "convnext_xxlarge*"
    published = (
        OURS,
        PublishedLayout(
            "open_clip",
            behind("visual.trunk."),
            (r"visual\.head\.(proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)", *TEXT_SIDE),
        ),
        PublishedLayout("timm", behind(""), (r"head\.(fc|pre_logits\.fc)\.(weight|bias)",)),
    )
    original = OriginalNames("llma.openclip_convnext_xxl.", "model.")

    config: ConvNextConfig

    def __init__(self, config: ConvNextConfig, scheme: ViewScheme | None = None) -> None:
        super().__init__(config, scheme)
        self.view_size = config.view_size or config.image_size
        from timm.models.convnext import ConvNeXt

        stages = len(config.dims)
        if config.stem == 2 or stages > 4 or config.stride > 32:
            raise UserError(
                f"{config.section}: timm's ConvNeXt has no stem={config.stem} with {stages} stages: "
                "use at most 4 stages, a stem other than 2 and a total stride of at most 32"
            )
        self.times = (self.scheme.patch_grid or config.grid) // config.grid
        missing = 4 - stages  # timm always builds four stages: empty ones are added, then cut off
        self.model = ConvNeXt(
            num_classes=0,
            global_pool="",
            patch_size=config.stem,
            depths=(*config.depths, *[0] * missing),
            dims=(*config.dims, *[config.width] * missing),
            ls_init_value=LAYER_SCALE,
            norm_eps=1e-5,
        )
        self.model.stages = self.model.stages[:stages]

    def forward(self, views: Tensor) -> Tensor:
        # The original sends this encoder's overview through a float16 resize even if the size fits.
        if self.scheme.half_resize and self.scheme.grid == 1:
            views = views.half().to(views.dtype)
        return super().forward(views)

    def encode(self, views: Tensor) -> Tensor:
        # Channels last: timm's blocks are written for it (norms and linears on the last axis).
        return map_to_tokens(self.model(views.contiguous(memory_format=torch.channels_last)), self.times)

    def blocks(self) -> Iterable[nn.Module]:
        return [block for stage in self.model.stages for block in stage.blocks]

    def flops(self) -> float:
        side, before, total = self.config.image_size // self.config.stem, 3, 0.0
        for stage, (depth, width) in enumerate(zip(self.config.depths, self.config.dims, strict=True)):
            side = side // 2 if stage else side
            kernel = 2 if stage else self.config.stem
            total += 2 * side**2 * (kernel**2 * before * width + depth * (49 * width + 8 * width**2))
            before = width
        return total


def map_to_tokens(features: Tensor, times: int) -> Tensor:
    """[N, C, g, g] -> [N, 1 + (g * times)^2, C]: each place repeated on both axes, behind their mean."""
    places = features.permute(0, 2, 3, 1).repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)
    tokens = places.flatten(1, 2)
    return torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
