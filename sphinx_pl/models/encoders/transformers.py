"""Any vision model of transformers: SigLIP 2, DINOv2 and DINOv3, InternViT, CLIP, ViT and others."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sphinx_pl.models.encoders.base import IMAGENET_MEAN, IMAGENET_STD, ViewScheme, register
from sphinx_pl.models.encoders.library import LibraryConfig, LibraryEncoder, flat, reason
from sphinx_pl.models.encoders.timm import unused_names
from sphinx_pl.models.published import HUB, OURS, PublishedLayout, Source
from sphinx_pl.utils.errors import UserError

_NORMS = ("post_layernorm", "layernorm", "norm")
_CLASS_TOKENS = ("cls_token", "class_embedding")
_INSIDE = ("vision_model.", "vision_tower.", "model.vision_tower.", "vision_tower.vision_model.")
"""What stands before the names of a vision model that is a part of another model."""


@dataclass
class TransformersConfig(LibraryConfig):
    """`name` is a folder with a config.json, or OWNER/NAME on the hub; null takes it from `load`.

    `config` is the content of that file instead, with its `model_type`. A checkpoint holds it, so
    that it needs neither the folder nor the hub.
    """

    config: dict[str, Any] = field(default_factory=dict)

    def resolve(self) -> None:
        from huggingface_hub import constants
        from transformers import AutoConfig

        source = (self.name or self.load or "").removeprefix(HUB)
        try:
            if self.config:
                values = dict(self.config)
                config = AutoConfig.for_model(values.pop("model_type", None), **values)
            else:
                config = AutoConfig.from_pretrained(source, trust_remote_code=False, cache_dir=constants.HF_HUB_CACHE)
        except Exception as error:  # of many libraries and models
            what = "config" if self.config else f"name={source}"
            raise UserError(f"{self.section}.{what} is no configuration of transformers ({reason(error)})") from error
        config = getattr(config, "vision_config", config)
        self.config = {key: value for key, value in config.to_diff_dict().items() if key != "transformers_version"}
        size = getattr(config, "image_size", None) or int(getattr(config, "num_patches", 0) ** 0.5) * config.patch_size
        self.image_size = self.image_size or int(size[0] if isinstance(size, list | tuple) else size)
        if self.mean is None or self.std is None:
            mean, std = _normalisation(source, config.model_type)
            self.mean, self.std = self.mean or mean, self.std or std


def _normalisation(source: str, model_type: str) -> tuple[list[float], list[float]]:
    """Mean and deviation of the preprocessor's file beside a model, else of its image processor."""
    import transformers
    from huggingface_hub import constants
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    kind = model_type.removesuffix("_model").removesuffix("_vision")
    classes = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or IMAGE_PROCESSOR_MAPPING_NAMES.get(kind) or {}
    names = classes.values() if isinstance(classes, Mapping) else ()
    values: Mapping[str, Any] = {}
    if source:
        try:
            values, _ = transformers.ImageProcessingMixin.get_image_processor_dict(
                source, cache_dir=constants.HF_HUB_CACHE
            )
        except Exception:  # the file is not there, or no network is
            values = {}
    processor = next((getattr(transformers, name, None) for name in names if name), None)
    mean = values.get("image_mean") or getattr(processor, "image_mean", None) or IMAGENET_MEAN
    std = values.get("image_std") or getattr(processor, "image_std", None) or IMAGENET_STD
    return list(mean), list(std)


@register("transformers", TransformersConfig)
class Transformers(LibraryEncoder):
    """The last hidden state of a vision model, or the output of one of its blocks."""

    config: TransformersConfig

    def __init__(self, config: TransformersConfig, scheme: ViewScheme | None = None) -> None:
        super().__init__(config, scheme)
        model: Any = self.model
        own = tuple(name for name in self.state_dict())
        renamed = _published_names(model, [name.removeprefix("model.") for name in own])
        others = unused_names(frozenset(_published_names(model, sorted(self.removed)).values()))
        others += (r"(.+\.)?position_ids", r"(text|language)_model\..+", r"(text|visual)_projection\.weight")
        others += ("logit_scale", "logit_bias", r"(classifier|head|pooler)\..+")
        prefixes = dict.fromkeys(["", f"{model.base_model_prefix}.", *_INSIDE])

        def layout(prefix: str) -> PublishedLayout:
            def source(name: str, encoder: Any) -> Source:
                return Source((prefix + renamed[name.removeprefix("model.")],))

            outside = (f"(?!{prefix}).+",) if prefix else ()
            return PublishedLayout(
                f"transformers ({prefix}…)" if prefix else "transformers",
                source,
                (*outside, *(f"{prefix}{name}" for name in others), *others),
            )

        self.published = (OURS, *(layout(prefix) for prefix in prefixes))

    @classmethod
    def construct(cls, config: TransformersConfig) -> nn.Module:
        from transformers import AutoConfig, AutoModel

        values = dict(config.config)
        settings = AutoConfig.for_model(values.pop("model_type"), **values)
        if config.layer is not None:
            count = getattr(settings, "num_hidden_layers", 0)
            index = config.layer + count if config.layer < 0 else config.layer
            if not 0 <= index < count:
                raise UserError(f"{config.section}.layer={config.layer}: this model has {count} layers to choose from")
            settings.num_hidden_layers = index + 1
        if hasattr(settings, "vision_use_head"):
            settings.vision_use_head = False
        return AutoModel.from_config(settings)  # type: ignore[no-any-return]

    @classmethod
    def features(cls, model: Any, config: LibraryConfig, views: Tensor) -> tuple[Tensor, Tensor]:
        settings, options = model.config, {}
        patch = getattr(settings, "patch_size", None) or 0
        patch = patch[0] if isinstance(patch, list | tuple) else patch
        own = getattr(settings, "image_size", config.image_size)
        if config.image_size != (own[0] if isinstance(own, list | tuple) else own):
            options["interpolate_pos_encoding"] = True
        outputs: list[Tensor] = []
        handle = None
        if config.layer is not None:
            handle = _layers(model)[-1].register_forward_hook(
                lambda module, inputs, output: outputs.append(output[0] if isinstance(output, tuple) else output)
            )
        inputs: dict[str, Any] = {"pixel_values": views} | options
        if settings.model_type == "siglip2_vision_model":
            inputs = _patches(views, patch)
        try:
            tokens = model(**inputs).last_hidden_state
        finally:
            if handle is not None:
                handle.remove()
            if isinstance(views, FakeTensor):  # which a plan computes with, and a run must not meet again
                _clear_caches(model)
        if outputs:
            tokens = outputs[0]
            if config.norm:
                tokens = next(getattr(model, name) for name in _NORMS if hasattr(model, name))(tokens)
        if tokens.dim() == 4:
            tokens = flat(tokens)
        patches = (config.image_size // patch) ** 2 if patch else tokens.shape[1]
        count = max(0, tokens.shape[1] - patches)
        return tokens[:, :count], tokens[:, count:]

    @classmethod
    def has_class_token(cls, model: Any) -> bool:
        return any(name.rpartition(".")[2] in _CLASS_TOKENS for name, _ in model.named_parameters())


def _clear_caches(model: nn.Module) -> None:
    """Forget what functions of the model's module have computed, such as coordinates of patches."""
    for function in vars(sys.modules[type(model).__module__]).values():
        for cell in getattr(function, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


def _patches(views: Tensor, size: int) -> dict[str, Any]:
    """What a SigLIP 2 of variable shape reads: patches [N, g*g, size*size*3], row by row."""
    grid = views.shape[-1] // size
    blocks = views.reshape(len(views), 3, grid, size, grid, size).permute(0, 2, 4, 3, 5, 1)
    shapes = torch.tensor([[grid, grid]] * len(views), device="cpu")  # positions are resized on the host's word
    return {"pixel_values": blocks.flatten(3).flatten(1, 2), "pixel_attention_mask": None, "spatial_shapes": shapes}


def _layers(model: Any) -> nn.ModuleList:
    """The model's blocks."""
    count = model.config.num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return lists[0]


def _published_names(model: Any, names: list[str]) -> dict[str, str]:
    """Our names of a model's tensors -> those of files, as all versions of transformers write them."""
    from transformers.core_model_loading import revert_weight_conversion

    value = torch.empty(0, device="meta")
    published = {}
    for name in names:
        [published[name]] = revert_weight_conversion(model, {name: value})
    return published
