"""Any model of timm (Wightman 2019) by name: ViTs, ConvNeXt, EfficientNet, ResNet and many more."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sphinx_pl.models.encoders.base import ViewScheme, register
from sphinx_pl.models.encoders.library import LibraryConfig, LibraryEncoder, flat
from sphinx_pl.models.published import OURS, PublishedLayout, Source
from sphinx_pl.models.published_efficientnet import efficientnet_layout
from sphinx_pl.utils.errors import UserError, suggest


@dataclass
class TimmConfig(LibraryConfig):
    """`name` is timm's, with or without the tag of released weights; null takes it from `load`.

    `args` are passed to `timm.create_model`: sizes of a smaller model, for instance.
    """

    args: dict[str, Any] = field(default_factory=dict)

    def resolve(self) -> None:
        import timm

        name = self.name or self.load or ""
        if not timm.is_model(name):
            known = suggest(name.partition(".")[0], timm.list_models(), "timm.list_models()")
            raise UserError(f"{self.section}.name={name}: timm has no such model, {known}")
        tagged = self.load if self.load and timm.is_model(self.load) else name
        try:
            defaults = timm.get_pretrained_cfg(tagged)
        except RuntimeError:
            raise UserError(f"{self.section}: timm has no weights '{tagged}': check the tag") from None
        self.name = name
        if defaults is not None:
            self.image_size = self.image_size or int(defaults.input_size[-1])
            self.mean = self.mean or list(defaults.mean)
            self.std = self.std or list(defaults.std)


@register("timm", TimmConfig)
class Timm(LibraryEncoder):
    """The features of a timm model. A resized position embedding is resampled as timm does it."""

    config: TimmConfig

    def __init__(self, config: TimmConfig, scheme: ViewScheme | None = None) -> None:
        super().__init__(config, scheme)
        import timm

        architecture = config.name.partition(".")[0]
        self.timm_models = f"{architecture}*"
        classifier: Any = timm.get_pretrained_cfg_value(config.name, "classifier") or ()
        heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        others = (*unused_names(self.removed), *(rf"{re.escape(head)}\.(weight|bias)" for head in heads))
        self.published = (OURS, PublishedLayout("timm", _timm, others), *efficientnet_layout(architecture))

    @classmethod
    def construct(cls, config: TimmConfig) -> nn.Module:
        import timm

        args = dict(config.args)
        if timm.get_pretrained_cfg_value(config.name, "fixed_input_size"):
            args["img_size"] = config.image_size
        model: nn.Module = timm.create_model(config.name, pretrained=False, num_classes=0, **args)
        return model

    @classmethod
    def features(cls, model: Any, config: LibraryConfig, views: Tensor) -> tuple[Tensor, Tensor]:
        return timm_features(model, config, views)

    @classmethod
    def has_class_token(cls, model: Any) -> bool:
        return getattr(model, "cls_token", None) is not None


def timm_features(model: Any, config: LibraryConfig, views: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens without a place and patches of a timm model: see `LibraryEncoder.features`."""
    if config.layer is None:
        features = model.forward_features(views)
        if features.dim() == 3:
            count = int(getattr(model, "num_prefix_tokens", 0))
            return features[:, :count], features[:, count:]
        if getattr(model, "output_fmt", "NCHW") == "NHWC":
            features = features.permute(0, 3, 1, 2)
        patches = flat(features)
        return patches[:, :0], patches
    if config.norm and not isinstance(getattr(model, "norm", None), nn.Module):
        raise UserError(f"{config.section}.norm=true: {config.name} has no final norm for a layer")
    options: dict[str, Any] = {"norm": config.norm, "output_fmt": "NCHW"}
    if "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters:
        options["return_prefix_tokens"] = True
    try:
        [features] = model.forward_intermediates(
            views, indices=[config.layer], stop_early=True, intermediates_only=True, **options
        )
    except (AssertionError, IndexError) as error:
        raise UserError(f"{config.section}.layer={config.layer}: {config.name} has no such layer ({error})") from error
    features, prefix = features if isinstance(features, tuple) else (features, None)
    patches = flat(features)
    return patches[:, :0] if prefix is None else prefix, patches


def unused_names(removed: frozenset[str]) -> tuple[str, ...]:
    """Patterns of names that a library's files have and an encoder does not."""
    return (r"(.+\.)?num_batches_tracked", *(re.escape(name) for name in sorted(removed)))


def _timm(name: str, encoder: Timm) -> Source:
    own = name.removeprefix("model.")
    if own != "pos_embed":
        return Source((own,))
    model: Any = encoder.model

    def resampled(positions: Tensor) -> Tensor:
        from timm.layers.pos_embed import resample_abs_pos_embed

        if positions.shape == model.pos_embed.shape or positions.dim() != 3:
            return positions
        prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
        return torch.as_tensor(
            resample_abs_pos_embed(positions, list(model.patch_embed.grid_size), num_prefix_tokens=prefix)
        )

    return Source((own,), resampled)
