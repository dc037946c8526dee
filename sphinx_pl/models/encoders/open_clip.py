"""The image side of any of open_clip's models (Ilharco et al. 2021), by name or by its JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

from sphinx_pl.models.encoders.base import CLIP_MEAN, CLIP_STD, ViewScheme, register
from sphinx_pl.models.encoders.clip import TEXT_SIDE
from sphinx_pl.models.encoders.library import LibraryConfig, LibraryEncoder, flat
from sphinx_pl.models.encoders.timm import timm_features, unused_names
from sphinx_pl.models.published import HUB, OURS, PublishedLayout, Source
from sphinx_pl.utils.errors import UserError, suggest

_SETTINGS = "open_clip_config.json"


@dataclass
class OpenClipConfig(LibraryConfig):
    """`name` is open_clip's, a folder with an open_clip_config.json, or `hf-hub:OWNER/NAME`.

    `config` is the content of such a file instead: `embed_dim` and `vision_cfg`. A checkpoint holds
    it, so that it needs neither the name nor the folder. `quick_gelu` null: as it says.
    """

    config: dict[str, Any] = field(default_factory=dict)
    quick_gelu: Optional[bool] = None

    def resolve(self) -> None:
        settings = {"model_cfg": self.config} if self.config else self._settings()
        model = settings["model_cfg"]
        if not isinstance(model.get("vision_cfg"), Mapping):
            raise UserError(
                f"{self.section}.config has no vision_cfg: it is the content of {_SETTINGS}, or model_cfg in it"
            )
        if self.quick_gelu is None:
            self.quick_gelu = bool(model.get("quick_gelu", False))
        self.config = {"embed_dim": model.get("embed_dim", 1), "vision_cfg": dict(model["vision_cfg"])}
        size = model["vision_cfg"].get("image_size", 224)
        self.image_size = self.image_size or int(size[0] if isinstance(size, list | tuple) else size)
        declared = settings.get("preprocess_cfg", {})
        self.mean = self.mean or list(declared.get("mean", CLIP_MEAN))
        self.std = self.std or list(declared.get("std", CLIP_STD))

    def _settings(self) -> Mapping[str, Any]:
        import open_clip

        if (model := open_clip.get_model_config(self.name) if "/" not in self.name else None) is not None:
            tags = open_clip.list_pretrained_tags_by_model(self.name)
            wanted = str(self.load or "").rpartition("/")[2]
            tag = wanted if wanted in tags else next(iter(tags), "")
            return {"model_cfg": model, "preprocess_cfg": open_clip.get_pretrained_cfg(self.name, tag)}
        source = self.name or self.load or ""
        path = Path(source).expanduser() / _SETTINGS
        if source.startswith(HUB):
            from huggingface_hub import hf_hub_download

            try:
                path = Path(hf_hub_download(source.removeprefix(HUB), _SETTINGS))
            except Exception as error:  # of many libraries
                reason = type(error).__name__
                raise UserError(
                    f"{self.section}.name={source}: no {_SETTINGS} in the cache or on the hub ({reason})"
                ) from error
        if not path.is_file():
            raise UserError(
                f"{self.section}.name={source}: neither one of open_clip's models nor a folder with {_SETTINGS}, "
                f"{suggest(source, open_clip.list_models(), 'open_clip.list_models()')}"
            )
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            return {
                "model_cfg": settings.get("model_cfg", settings),
                "preprocess_cfg": settings.get("preprocess_cfg", {}),
            }
        except (ValueError, AttributeError) as error:
            raise UserError(f"'{path}' cannot be read ({error}): restore the file from its source") from None


@register("open_clip", OpenClipConfig)
class OpenClip(LibraryEncoder):
    """The features of an open_clip image encoder; those of a ViT are behind its final norm."""

    settings_files = (_SETTINGS, "config.json")
    config: OpenClipConfig

    def __init__(self, config: OpenClipConfig, scheme: ViewScheme | None = None) -> None:
        super().__init__(config, scheme)
        self.open_clip_model = config.name or config.kind
        others = (*(f"visual\\.{name}" for name in unused_names(self.removed)), *TEXT_SIDE)
        others += (r"visual\.head\..+", r"text\..+", r"logit_bias")
        self.published = (OURS, PublishedLayout("open_clip", _open_clip, others))

    @classmethod
    def construct(cls, config: OpenClipConfig) -> nn.Module:
        from open_clip.model import CLIPVisionCfg, _build_vision_tower

        values = {**config.config["vision_cfg"], "image_size": config.image_size, "timm_model_pretrained": False}
        size, gelu = config.config["embed_dim"], bool(config.quick_gelu)
        model: nn.Module = _build_vision_tower(size, CLIPVisionCfg(**values), gelu)
        return model

    @classmethod
    def features(cls, model: Any, config: LibraryConfig, views: Tensor) -> tuple[Tensor, Tensor]:
        if hasattr(model, "trunk"):
            return timm_features(model.trunk, config, views)
        try:
            out = model.forward_intermediates(
                views,
                indices=[-1 if config.layer is None else config.layer],
                stop_early=True,
                normalize_intermediates=config.norm or config.layer is None,
                intermediates_only=True,
                output_fmt="NCHW",
                output_extra_tokens=True,
            )
        except (AssertionError, IndexError) as error:
            raise UserError(f"{config.section}.layer={config.layer}: there is no such layer ({error})") from error
        patches = flat(out["image_intermediates"][0])
        prefix = out.get("image_intermediates_prefix")
        return prefix[0] if prefix else patches[:, :0], patches

    @classmethod
    def has_class_token(cls, model: Any) -> bool:
        trunk = getattr(model, "trunk", None)
        return hasattr(model, "class_embedding") if trunk is None else getattr(trunk, "cls_token", None) is not None

    @staticmethod
    def trained_with(settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """The activation, which open_clip's configuration names; timm's models have their own."""
        model = settings.get("model_cfg")
        if not isinstance(model, Mapping) or "timm_model_name" in (model.get("vision_cfg") or {}):
            return {}
        return {"quick_gelu": bool(model.get("quick_gelu", False))}


def _open_clip(name: str, encoder: OpenClip) -> Source:
    own = name.removeprefix("model.")
    model: Any = encoder.model

    def resampled(positions: Tensor) -> Tensor:
        from types import SimpleNamespace

        from open_clip.model import resize_pos_embed

        state = {"visual.positional_embedding": positions}
        if positions.shape != model.positional_embedding.shape and positions.dim() == 2:
            resize_pos_embed(state, SimpleNamespace(visual=model))
        return torch.as_tensor(state["visual.positional_embedding"])

    theirs = (f"visual.{own}",)
    return Source(theirs, resampled) if own == "positional_embedding" else Source(theirs)
