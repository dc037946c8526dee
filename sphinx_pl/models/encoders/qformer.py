"""BLIP-2's ViT and Q-Former (Li et al. 2023) by transformers: queries that read the ViT's tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sphinx_pl.models.checks import divides, positive
from sphinx_pl.models.encoders.base import Encoder, EncoderConfig, ViewScheme, init_linear, register, vit_flops
from sphinx_pl.models.encoders.resamplers import Resampler, ResamplerConfig, resampler
from sphinx_pl.models.published import Names, OriginalNames, PublishedLayout, Source, own_name

_LAVIS_VIT = Names(
    {
        "vision_model.embeddings.class_embedding": "cls_token",
        "vision_model.embeddings.position_embedding": "pos_embed",
        "vision_model.embeddings.patch_embedding": "patch_embed.proj",
    },
    "blocks",
    {
        "layer_norm1": "norm1",
        "self_attn.qkv": "attn.qkv",
        "self_attn.projection": "attn.proj",
        "layer_norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
)


def _lavis(name: str, encoder: QFormer, vit: str = "visual_encoder.") -> Source:
    """The names of LAVIS, of which BLIP-2 is a part. Its ViT has biases for queries and values only.

    Args:
        vit: what stands before the ViT's names; nothing in eva_vit_g.pth, a file of its own.
    """
    if name == "query_tokens":
        return Source((name,))
    if name.startswith("vision_model.post_layernorm."):
        return Source((name.replace("vision_model.post_layernorm", "ln_vision"),))
    if name.startswith("vision_model."):
        theirs = vit + _LAVIS_VIT(name)
        if theirs.endswith("attn.qkv.bias"):
            stem = theirs.removesuffix("qkv.bias")
            return Source((f"{stem}q_bias", f"{stem}v_bias"), lambda q, v: torch.cat([q, torch.zeros_like(v), v]))
        return Source((theirs,))
    bert = name.removeprefix("qformer.")
    if bert.startswith("layernorm."):
        return Source((f"Qformer.bert.embeddings.{bert.replace('layernorm', 'LayerNorm')}",))
    return Source((f"Qformer.bert.{bert.replace('attention.attention.', 'attention.self.')}",))


_LAVIS_UNUSED = (
    r"Qformer\.bert\.embeddings\.(position_ids|(word|position)_embeddings\.weight)",
    r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\.(dense|LayerNorm)\.(weight|bias)",  # of text
    r"Qformer\.cls\..+",
    r"(vision_proj|text_proj|itm_head|opt_proj|t5_proj|llm_proj)\.(weight|bias)",
    r"temp",
    r"(opt_model|t5_model|llm_model)\..+",
)


@dataclass
class QFormerConfig(EncoderConfig):
    """The sizes of BLIP-2's ViT and Q-Former. Defaults: ViT-g/14 and the 12-layer Q-Former."""

    patch_size: int = 14
    vision_width: int = 1408
    vision_layers: int = 39
    vision_heads: int = 16
    vision_ffn_width: int = 6144
    queries: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    ffn_width: int = 3072
    cross_attention_every: int = 2

    def __post_init__(self) -> None:
        positive(self.section, self, "image_size", "patch_size", "queries", "width", "layers", "heads")
        positive(self.section, self, "vision_width", "vision_layers", "vision_heads", "cross_attention_every")
        divides(self.section, self, "heads", "width")
        divides(self.section, self, "vision_heads", "vision_width")
        divides(self.section, self, "patch_size", "image_size")

    @property
    def tokens(self) -> int:
        return self.queries


@register("qformer", QFormerConfig)
class QFormer(Encoder):
    """It has no dropout. The original leaves 0.1 active in its frozen Q-Former, which is a defect."""

    join = "sequence"
    hub_models = ("Salesforce/blip2-opt-2.7b", "Salesforce/blip2-flan-t5-xl")
    published = (
        # Ours, and transformers', whose modules the encoder is made of.
        PublishedLayout("transformers", own_name, (r"language_model\..+", r"language_projection\.(weight|bias)")),
        PublishedLayout("LAVIS", _lavis, _LAVIS_UNUSED),
        PublishedLayout("LAVIS with eva_vit_g.pth", partial(_lavis, vit=""), _LAVIS_UNUSED),
    )
    original = OriginalNames("llma.qformer.")

    config: QFormerConfig

    def __init__(self, config: QFormerConfig, scheme: ViewScheme | None = None) -> None:
        super().__init__(config, scheme)
        from transformers import Blip2VisionConfig, Blip2VisionModel

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
        self.qformer = _transformer(config, config.vision_width)
        self.query_tokens = _queries(config)

    def encode(self, views: Tensor) -> Tensor:
        patches = self.vision_model(pixel_values=views).last_hidden_state
        return _read(self, patches)

    def blocks(self) -> Iterable[nn.Module]:
        return [*self.vision_model.encoder.layers, *self.qformer.encoder.layer]

    def flops(self) -> float:
        c = self.config
        grid = c.image_size // c.patch_size
        patches = 1 + grid**2
        vision = vit_flops(grid, c.patch_size, c.vision_width, c.vision_layers, 2 * c.vision_width * c.vision_ffn_width)
        return vision + _flops(c, patches, c.vision_width)


def _transformer(config: Any, inputs: int) -> Any:
    """The Q-Former itself, behind tokens of `inputs` channels."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    settings = Blip2QFormerConfig(
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.ffn_width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        cross_attention_frequency=config.cross_attention_every,
        encoder_hidden_size=inputs,
    )
    return Blip2QFormerModel(settings)


def _queries(config: Any) -> nn.Parameter:
    queries = nn.Parameter(torch.empty(1, config.queries, config.width))
    nn.init.normal_(queries, std=0.02)  # equal queries would stay equal
    return queries


def _read(module: Any, tokens: Tensor) -> Tensor:
    """What a module's queries read in tokens, [M, tokens, inputs] -> [M, queries, width]."""
    queries = module.query_tokens.expand(len(tokens), -1, -1)
    return torch.as_tensor(module.qformer(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state)


def _flops(config: Any, tokens: int, inputs: int) -> float:
    """FLOPs of a Q-Former that reads `tokens` of `inputs` channels."""
    c = config
    layer = 2 * c.queries * (4 * c.width**2 + 2 * c.width * c.ffn_width) + 4 * c.queries**2 * c.width
    cross = 2 * c.queries * 2 * c.width**2 + 2 * tokens * 2 * inputs * c.width
    cross += 4 * c.queries * tokens * c.width
    crossing = len(range(0, c.layers, c.cross_attention_every))
    return float(c.layers * layer + crossing * cross)


@dataclass
class QFormerResamplerConfig(ResamplerConfig):
    """The sizes of a Q-Former behind another encoder. Defaults: BLIP-2's."""

    queries: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    ffn_width: int = 3072
    cross_attention_every: int = 2

    @property
    def tokens(self) -> int:
        return self.queries

    def width_of(self, width: int) -> int:
        return self.width

    def check(self, section: str, grid: int | None) -> None:
        positive(section, self, "queries", "width", "layers", "heads", "ffn_width", "cross_attention_every")
        divides(section, self, "heads", "width")


@resampler("qformer", QFormerResamplerConfig)
class QFormerResampler(Resampler):
    """Queries that read all tokens of an encoder, those without a place too. Its weights are new."""

    def __init__(self, config: QFormerResamplerConfig, width: int, grid: int | None) -> None:
        super().__init__(config, width, grid)
        self.config, self.inputs = config, width
        self.qformer = _transformer(config, width)
        self.query_tokens = _queries(config)
        init_linear(self)

    def forward(self, tokens: Tensor) -> Tensor:
        return _read(self, tokens)

    def flops(self, tokens: int) -> float:
        return _flops(self.config, tokens, self.inputs)
