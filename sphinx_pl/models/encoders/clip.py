"""CLIP's ViT (Radford et al. 2021) by open_clip: the final norm on all tokens, no projection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sphinx_pl.models.encoders.base import Encoder, ViewScheme, ViTConfig, register, vit_flops
from sphinx_pl.models.published import OURS, Names, OriginalNames, PublishedLayout, Source, behind, joined, same

_TRANSFORMERS = Names(
    {
        "class_embedding": "vision_model.embeddings.class_embedding",
        "positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "conv1": "vision_model.embeddings.patch_embedding",
        "ln_pre": "vision_model.pre_layrnorm",
        "ln_post": "vision_model.post_layernorm",
    },
    "vision_model.encoder.layers",
    {
        "ln_1": "layer_norm1",
        "attn.in_proj_weight": "self_attn.{}_proj.weight",
        "attn.in_proj_bias": "self_attn.{}_proj.bias",
        "attn.out_proj": "self_attn.out_proj",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    },
)
_TIMM = Names(
    {
        "class_embedding": "cls_token",
        "positional_embedding": "pos_embed",
        "conv1": "patch_embed.proj",
        "ln_pre": "norm_pre",
        "ln_post": "norm",
    },
    "blocks",
    {
        "ln_1": "norm1",
        "attn.in_proj_weight": "attn.qkv.weight",
        "attn.in_proj_bias": "attn.qkv.bias",
        "attn.out_proj": "attn.proj",
        "ln_2": "norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    },
)


def _transformers(name: str, encoder: ClipViT) -> Source:
    theirs = _TRANSFORMERS(name.removeprefix("model."))
    if "{}" not in theirs:
        return Source((theirs,))
    return Source(tuple(theirs.format(part) for part in "qkv"), joined)


def _timm(name: str, encoder: ClipViT) -> Source:
    theirs = _TIMM(name.removeprefix("model."))
    if theirs == "cls_token":
        return Source((theirs,), lambda token: token.flatten())
    return Source((theirs,), (lambda positions: positions.squeeze(0)) if theirs == "pos_embed" else same)


_RESBLOCK = r"transformer\.resblocks\.\d+\.(ln_[12]|attn\.out_proj|mlp\.c_fc|mlp\.c_proj)\.(weight|bias)"
TEXT_SIDE = (
    r"(text\.)?(positional_embedding|text_projection|attn_mask|token_embedding\.weight|ln_final\.(weight|bias))",
    rf"(text\.)?{_RESBLOCK}",
    r"(text\.)?transformer\.resblocks\.\d+\.attn\.in_proj_(weight|bias)",
    r"logit_scale|logit_bias",
    r"input_resolution|context_length|vocab_size",
)
"""open_clip's text encoder, in its newer models behind `text.`. OpenAI's files have the last three."""


@dataclass
class ClipViTConfig(ViTConfig):
    """The sizes of CLIP's ViT. Defaults: ViT-L/14."""

    free = ("quick_gelu",)

    mlp_ratio: float = 4.0
    quick_gelu: bool = True


@register("clip", ClipViTConfig)
class ClipViT(Encoder):
    open_clip_model = "ViT-L-14"
    timm_models = "vit_large_patch14_clip*"
    settings_files = ("open_clip_config.json", "config.json")
    published = (
        OURS,
        PublishedLayout("open_clip", behind("visual."), (r"visual\.proj", *TEXT_SIDE)),
        PublishedLayout(
            "transformers",
            _transformers,
            (r"text_model\..+", r"(text|visual)_projection\.weight", "logit_scale", r".+\.position_ids"),
        ),
        PublishedLayout("timm", _timm, (r"head\.(weight|bias)",)),
    )
    original = OriginalNames(
        "llma.clip.visual.",
        "model.",
        unused={
            "llma.clip.positional_embedding": (77, 768),
            "llma.clip.text_projection": (768, 768),
            "llma.clip.logit_scale": (),
            "llma.clip.token_embedding.weight": (49408, 768),
            "llma.clip.ln_final.weight": (768,),
            "llma.clip.ln_final.bias": (768,),
            "llma.clip.visual.proj": (1024, 768),
        },
        config={"quick_gelu": False},
        note="CLIP gets exact GELU as in the original's own inference; its weights were trained with QuickGELU: "
        "model.vision.encoders.clip.quick_gelu=true (docs/original.md has the difference)",
    )

    config: ClipViTConfig

    def __init__(self, config: ClipViTConfig, scheme: ViewScheme | None = None) -> None:
        super().__init__(config, scheme)
        from open_clip.transformer import QuickGELU, VisionTransformer

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

    def encode(self, views: Tensor) -> Tensor:
        out = self.model.forward_intermediates(
            views,
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
        return vit_flops(c.grid, c.patch_size, c.width, c.layers, int(2 * c.mlp_ratio * c.width**2))

    @staticmethod
    def trained_with(settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """The activation, which open_clip's or transformers' configuration names."""
        if isinstance(model := settings.get("model_cfg"), Mapping):
            return {"quick_gelu": bool(model.get("quick_gelu", False))}
        vision = settings.get("vision_config", settings)
        activation = vision.get("hidden_act") if isinstance(vision, Mapping) else None
        return {"quick_gelu": activation == "quick_gelu"} if activation in ("quick_gelu", "gelu") else {}
