"""The four vision encoders behind one protocol: CLIP ViT, CLIP ConvNeXt, DINOv2 ViT, BLIP-2's Q-Former.

Sizes come from the configuration alone. Building loads no weights and works on the meta device;
`sphinx_pl.checkpoints.encoders` reads released ones, explicitly. A tower holds no parameter that its forward pass does
not use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sphinx_pl.models.config import ClipViTConfig, ConvNextConfig, Dinov2Config, QFormerConfig, VisionConfig
from sphinx_pl.models.views import CLIP_MEAN, CLIP_STD, resize
from sphinx_pl.utils.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Of residual branches in towers that train from scratch; pretrained weights replace it. Values below 1 are for deep
# nets and long schedules: a shallow one does not begin to learn with them.
LAYER_SCALE = 1.0


class Tower(nn.Module, ABC):
    """An encoder: [N, 3, s, s] views, normalised with CLIP's mean and deviation -> [N, tokens, width].

    Channel towers give 1 + patch_grid^2 tokens, class token first; the Q-Former gives its queries. The mixer gives it
    views of `view_size`; what has another size than `image_size` is resized first.
    """

    key: ClassVar[str]
    resize_mode: ClassVar[str] = "bicubic"

    def __init__(self, width: int, image_size: int, half_resize: bool) -> None:
        super().__init__()
        self.width = width
        self.image_size = image_size
        self.view_size = image_size
        self.half_resize = half_resize

    def forward(self, pixels: Tensor) -> Tensor:
        sized = resize(pixels, self.image_size, self.resize_mode, self.half_resize)
        return self.encode(sized.to(next(self.parameters()).dtype))

    def init_weights(self) -> None:
        """New weights with deviation 1 / sqrt(inputs), whatever the width.

        The libraries' own 0.02 is that of wide layers: in narrow ones it all but switches the residual branches off.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """[N, 3, image_size, image_size] -> [N, tokens, width]."""

    @abstractmethod
    def blocks(self) -> Iterable[nn.Module]:
        """The layers that it consists of, in the order of the forward pass: what sharding gathers one at a time."""

    @abstractmethod
    def flops(self) -> float:
        """Of the forward pass of one view: matrix multiplications and convolutions."""


def _vit_flops(grid: int, patch: int, width: int, layers: int, mlp_weights: int) -> float:
    tokens = 1 + grid**2
    embedding = 2 * grid**2 * 3 * patch**2 * width
    return float(embedding + layers * (2 * tokens * (4 * width**2 + mlp_weights) + 4 * tokens**2 * width))


class ClipViT(Tower):
    """CLIP's ViT (Radford et al. 2021) by open_clip: the final norm on all tokens, no projection."""

    key = "clip"

    def __init__(self, config: ClipViTConfig, half_resize: bool = False) -> None:
        super().__init__(config.width, config.image_size, half_resize)
        from open_clip.transformer import QuickGELU, VisionTransformer

        self.config = config
        self.model = VisionTransformer(
            image_size=config.image_size,
            patch_size=config.patch_size,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            output_dim=1,
            act_layer=QuickGELU if config.quick_gelu else nn.GELU,
        )
        self.model.proj = None

    def encode(self, pixels: Tensor) -> Tensor:
        out = self.model.forward_intermediates(
            pixels,
            indices=[self.config.layers - 1],
            normalize_intermediates=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        return torch.cat([out["image_intermediates_prefix"][0], out["image_intermediates"][0]], dim=1)

    def blocks(self) -> Iterable[nn.Module]:
        return list(self.model.transformer.resblocks)

    def flops(self) -> float:
        c = self.config
        return _vit_flops(c.grid, c.patch_size, c.width, c.layers, int(2 * c.mlp_ratio * c.width**2))


class ConvNext(Tower):
    """CLIP's ConvNeXt trunk (Liu et al. 2022; Cherti et al. 2023) by timm, its map repeated onto the patch grid.

    The mean of the repeated map stands in front as the class token.
    """

    key = "convnext"
    resize_mode = "nearest"

    def __init__(
        self, config: ConvNextConfig, patch_grid: int, half_resize: bool = False, half_input: bool = False
    ) -> None:
        super().__init__(config.width, config.image_size, half_resize)
        self.view_size = config.view_size or config.image_size
        self.half_input = half_input
        from timm.models.convnext import ConvNeXt

        stages = len(config.dims)
        if config.stem == 2 or stages > 4 or config.stride > 32:
            raise UserError(
                f"model.vision.convnext: timm's ConvNeXt has no stem={config.stem} with {stages} stages: "
                "use at most 4 stages, a stem other than 2 and a total stride of at most 32"
            )
        self.config = config
        self.repeats = patch_grid // config.grid
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

    def forward(self, pixels: Tensor) -> Tensor:
        if self.half_input:
            pixels = pixels.half().to(pixels.dtype)
        return super().forward(pixels)

    def encode(self, pixels: Tensor) -> Tensor:
        # Channels last: timm's blocks are written for it (norms and linears on the last axis).
        return map_to_tokens(self.model(pixels.contiguous(memory_format=torch.channels_last)), self.repeats)

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


def map_to_tokens(features: Tensor, repeats: int) -> Tensor:
    """[N, C, g, g] -> [N, 1 + (g * repeats)^2, C]: every place repeated on both axes, behind the mean of all."""
    places = features.permute(0, 2, 3, 1).repeat_interleave(repeats, dim=1).repeat_interleave(repeats, dim=2)
    tokens = places.flatten(1, 2)
    return torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)


class Dinov2(Tower):
    """DINOv2's ViT with SwiGLU (Oquab et al. 2023) by timm: the final norm on class and patch tokens."""

    key = "dinov2"

    def __init__(self, config: Dinov2Config, half_resize: bool = False) -> None:
        super().__init__(config.width, config.image_size, half_resize)
        import timm

        self.config = config
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

    def encode(self, pixels: Tensor) -> Tensor:
        # (x * clip_std + clip_mean - mean) / std as one multiplication and addition
        scale = pixels.new_tensor([a / b for a, b in zip(CLIP_STD, IMAGENET_STD, strict=True)])
        shift = pixels.new_tensor([(a - b) / c for a, b, c in zip(CLIP_MEAN, IMAGENET_MEAN, IMAGENET_STD, strict=True)])
        patches = self.model.patch_embed(pixels * scale[:, None, None] + shift[:, None, None])
        tokens = torch.cat([self.model.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        # timm's own forward pass resamples positions differently.
        tokens = tokens + resample_positions(self.model.pos_embed, self.config.grid).to(tokens.dtype)
        return torch.as_tensor(self.model.norm(self.model.blocks(tokens)))

    def blocks(self) -> Iterable[nn.Module]:
        return list(self.model.blocks)

    def flops(self) -> float:
        c = self.config
        fused = int(c.mlp_ratio * c.width)
        return _vit_flops(c.grid, c.patch_size, c.width, c.layers, c.width * fused + c.width * fused // 2)


def resample_positions(positions: Tensor, grid: int) -> Tensor:
    """[1, 1 + g*g, D] -> [1, 1 + grid*grid, D] as DINOv2's own code does, which timm's resampling does not.

    Bicubic by the *scale factor* (grid + 0.1) / g: the 0.1 guards a division, and also shifts every sample.
    """
    own = int((positions.shape[1] - 1) ** 0.5)
    if own == grid:
        return positions
    patches = torch.unflatten(positions[:, 1:].float(), 1, (own, own)).permute(0, 3, 1, 2)
    factor = (grid + 0.1) / own
    patches = F.interpolate(patches, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([positions[:, :1].float(), patches.flatten(2).transpose(1, 2)], dim=1)


class QFormer(Tower):
    """BLIP-2's ViT and Q-Former (Li et al. 2023) by transformers: learned queries that read the ViT's tokens.

    Without dropout: the original leaves 0.1 active in its frozen Q-Former while training, which is a defect.
    """

    key = "qformer"

    def __init__(self, config: QFormerConfig, half_resize: bool = False) -> None:
        super().__init__(config.width, config.image_size, half_resize)
        from transformers import Blip2QFormerConfig, Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel

        self.config = config
        self.vision_model = Blip2VisionModel(
            Blip2VisionConfig(
                hidden_size=config.vision_width,
                intermediate_size=config.vision_ffn_width,
                num_hidden_layers=config.vision_layers,
                num_attention_heads=config.vision_heads,
                image_size=config.image_size,
                patch_size=config.patch_size,
                initializer_range=0.02,  # its default, 1e-10, is for weights that will be overwritten
            )
        )
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                intermediate_size=config.ffn_width,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                cross_attention_frequency=config.cross_attention_every,
                encoder_hidden_size=config.vision_width,
            )
        )
        self.query_tokens = nn.Parameter(torch.empty(1, config.queries, config.width))
        nn.init.normal_(self.query_tokens, std=0.02)  # equal queries would stay equal

    def encode(self, pixels: Tensor) -> Tensor:
        seen = self.vision_model(pixel_values=pixels).last_hidden_state
        queries = self.query_tokens.expand(len(pixels), -1, -1)
        return torch.as_tensor(self.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state)

    def blocks(self) -> Iterable[nn.Module]:
        return [*self.vision_model.encoder.layers, *self.qformer.encoder.layer]

    def flops(self) -> float:
        c = self.config
        grid = c.image_size // c.patch_size
        seen = 1 + grid**2
        vision = _vit_flops(
            grid, c.patch_size, c.vision_width, c.vision_layers, 2 * c.vision_width * c.vision_ffn_width
        )
        layer = 2 * c.queries * (4 * c.width**2 + 2 * c.width * c.ffn_width) + 4 * c.queries**2 * c.width
        cross = (
            2 * c.queries * 2 * c.width**2 + 2 * seen * 2 * c.vision_width * c.width + 4 * c.queries * seen * c.width
        )
        crossing = len(range(0, c.layers, c.cross_attention_every))
        return vision + c.layers * layer + crossing * cross


def build_tower(config: VisionConfig, key: str) -> Tower:
    """One of the configured towers, with new weights."""
    tower: Tower
    if key == "clip":
        assert config.clip
        tower = ClipViT(config.clip, config.half_resize)
    elif key == "convnext":
        assert config.convnext
        # The original sends this tower's overview through a float16 resize even where the size fits.
        half_input = config.half_resize and config.grid == 1
        tower = ConvNext(config.convnext, config.patch_grid, config.half_resize, half_input)
    elif key == "dinov2":
        assert config.dinov2
        tower = Dinov2(config.dinov2, config.half_resize)
    else:
        assert config.qformer
        tower = QFormer(config.qformer, config.half_resize)
    tower.init_weights()
    return tower


def build_towers(config: VisionConfig) -> nn.ModuleDict:
    """The configured towers, in the order clip, convnext, dinov2, qformer, with new weights."""
    return nn.ModuleDict({key: build_tower(config, key) for key in config.towers})
