"""What a kind of vision encoder consists of, and the registry of kinds.

Sizes come from the configuration alone. An encoder is built with new weights, on the meta device
too; `sphinx_pl.checkpoints.encoders` reads released ones. It holds no parameter that its forward
pass does not use.
"""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Optional, TypeVar

from torch import Tensor, nn

from sphinx_pl.models.checks import divides, positive
from sphinx_pl.models.published import OURS, OriginalNames, PublishedLayout
from sphinx_pl.models.views import normalise, resize, split_views
from sphinx_pl.utils.registry import Registry

Colour = tuple[float, float, float]
CLIP_MEAN: Colour = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Colour = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Colour = (0.485, 0.456, 0.406)
IMAGENET_STD: Colour = (0.229, 0.224, 0.225)
LAYER_SCALE = 1.0
"""The scale that residual branches of new encoders begin with; pretrained weights replace it.

Values below 1 are for deep nets and long schedules: a shallow net does not begin to learn with them.
"""


JOINS = ("channel", "sequence")


@dataclass
class EncoderConfig:
    """The keys that every kind has: how large its views are, what it loads, and how it is joined.

    `load` names released weights. `join` is `channel` or `sequence`; null is the kind's own way. A
    `resampler` turns its tokens into fewer, which are joined by sequence.
    """

    kind: ClassVar[str]
    free: ClassVar[tuple[str, ...]] = ()
    """Keys that a run may choose anew for weights that were trained with another value."""

    image_size: int = 224
    load: Optional[str] = field(default=None, kw_only=True)
    join: Optional[str] = field(default=None, kw_only=True)
    resampler: Any = field(default=None, kw_only=True)
    key: str = field(default="", kw_only=True, metadata={"hidden": True})
    """Its key in the configuration, which no section holds; "" stands for the kind."""

    @property
    def part(self) -> str:
        """The name of this part of the model: its key in the configuration."""
        return self.key or self.kind

    @property
    def section(self) -> str:
        """The name of its section in a configuration, for messages."""
        return f"model.vision.encoders.{self.part}"

    @property
    def width(self) -> int:
        """Channels of a token."""
        raise NotImplementedError

    @property
    def grid(self) -> int:
        """Patches a side of the feature map, of a kind that has one."""
        raise NotImplementedError

    @property
    def tokens(self) -> int:
        """Tokens that the encoder gives for a view."""
        return 1 + self.grid**2

    @property
    def has_grid(self) -> bool:
        """Whether its tokens are patches of a map, behind tokens without a place."""
        return ENCODERS[self.kind].join == "channel"

    @property
    def by_channel(self) -> bool:
        """Whether it is joined by channel; its tokens otherwise stand in front of the others."""
        if self.resampler is not None:
            return False
        return (self.join or ENCODERS[self.kind].join) == "channel"

    @property
    def sequence_tokens(self) -> int:
        """Tokens of a view that stand in front of the others, of an encoder joined by sequence."""
        return int(self.resampler.tokens) if self.resampler is not None else self.tokens

    @property
    def sequence_width(self) -> int:
        """Channels of these tokens."""
        return int(self.resampler.width_of(self.width)) if self.resampler is not None else self.width

    def to_dict(self) -> dict[str, Any]:
        """The section that builds an equal configuration."""
        values = dataclasses.asdict(self)
        del values["key"]
        return values if self.part == self.kind else {"kind": self.kind} | values


@dataclass
class ViTConfig(EncoderConfig):
    """A ViT: one token for the class and one for each patch."""

    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16

    def __post_init__(self) -> None:
        positive(self.section, self, "image_size", "patch_size", "width", "layers", "heads")
        divides(self.section, self, "heads", "width")
        divides(self.section, self, "patch_size", "image_size")

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class ViewScheme:
    """What all encoders of a model share.

    Args:
        grid: n > 1 adds n x n sub-images to the overview.
        patch_grid: patches a side of the feature map that channel encoders are joined on; None: the
            encoder's own.
        half_resize: images are resized in float16, as the original does.
    """

    grid: int = 1
    patch_grid: int | None = None
    half_resize: bool = False


class Encoder(nn.Module, ABC):
    """An encoder: [N, 3, s, s] views, normalised as it was trained -> [N, tokens, width].

    A kind with a feature map gives 1 + grid^2 tokens, class token first, where it is joined by
    channel; `scheme.patch_grid` may enlarge the grid. Otherwise it gives `config.tokens`.
    """

    config: EncoderConfig
    kind: ClassVar[str]
    config_class: ClassVar[type[EncoderConfig]]
    join: ClassVar[Literal["channel", "sequence"]] = "channel"
    """How it is joined unless its configuration says otherwise."""
    repeats: ClassVar[bool] = False
    """It repeats its feature map onto the larger grid of the encoders that it is joined with."""
    mean: Colour = CLIP_MEAN
    std: Colour = CLIP_STD
    resize_mode: ClassVar[str] = "bicubic"

    published: tuple[PublishedLayout, ...] = (OURS,)
    """Layouts of released weights. The first one is taken of those that fit equally."""
    original: ClassVar[OriginalNames | None] = None
    """Its tensors in the released SPHINX weights; None: they do not have it."""
    open_clip_model: str = ""
    """open_clip's architecture that a tag alone belongs to; "": open_clip does not have it."""
    timm_models: str = ""
    """timm's names of it, a pattern; "": timm does not have it."""
    hub_models: ClassVar[tuple[str, ...]] = ()
    """Repositories on the Hugging Face hub that a message suggests."""
    settings_files: ClassVar[tuple[str, ...]] = ()
    """Files beside released weights that say how they were trained; see `trained_with`."""

    def __init__(self, config: EncoderConfig, scheme: ViewScheme | None = None) -> None:
        super().__init__()
        self.config = config
        self.scheme = scheme or ViewScheme()
        self.width = config.width
        self.image_size = config.image_size
        self.view_size = config.image_size

    def views(self, pixels: Tensor) -> Tensor:
        """uint8 [N, 3, S, S] -> float32 [N, V, 3, view_size, view_size]: overview, then sub-images.

        They are normalised in float32 before they are resized.
        """
        images = normalise(pixels, self.mean, self.std)
        return split_views(images, self.view_size, self.scheme.grid, self.scheme.half_resize)

    def forward(self, views: Tensor) -> Tensor:
        sized = resize(views, self.image_size, self.resize_mode, self.scheme.half_resize)
        return self.encode(sized.to(next(self.parameters()).dtype))

    def init_weights(self) -> None:
        """New weights, whatever the width."""
        init_linear(self)

    @abstractmethod
    def encode(self, views: Tensor) -> Tensor:
        """[N, 3, image_size, image_size] -> [N, tokens, width]."""

    @abstractmethod
    def blocks(self) -> Iterable[nn.Module]:
        """Its layers in the order of the forward pass: sharding gathers one at a time."""

    @abstractmethod
    def flops(self) -> float:
        """FLOPs of the forward pass of one view: matrix multiplications and convolutions."""

    @staticmethod
    def trained_with(settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Keys of the configuration, and the values that released weights were trained with.

        Args:
            settings: the content of one of `settings_files`. The entry of open_clip's table comes
                as `model_cfg`.
        """
        return {}


ENCODERS: Registry[type[Encoder]] = Registry("vision encoder")

Kind = TypeVar("Kind", bound=type[Encoder])
_TAKEN = ("decoder", "projections", "visual")


def usable_key(key: str) -> bool:
    """Whether an encoder may have this key: names of parts, modules and tensors contain it."""
    return bool(re.fullmatch(r"[a-zA-Z]\w*", key)) and key not in _TAKEN and not hasattr(nn.ModuleDict, key)


def register(kind: str, config: type[EncoderConfig]) -> Callable[[Kind], Kind]:
    """A class decorator: the encoder is built for sections of this kind in `model.vision.encoders`.

    Args:
        kind: a section whose key is the kind need not name it.
        config: the dataclass of its keys, of this kind alone.
    """
    if not usable_key(kind):
        raise ValueError(f"an encoder cannot be called '{kind}': a part of the model has this name")
    if "kind" in vars(config):
        raise ValueError(f"{config.__name__} is the configuration of '{config.kind}': make a subclass of it")

    def add(encoder: Kind) -> Kind:
        encoder.kind = config.kind = kind
        encoder.config_class = config
        ENCODERS.register(kind, encoder)
        return encoder

    return add


def init_linear(module: nn.Module) -> None:
    """Draw the weights of all linear layers and convolutions with deviation 1 / sqrt(inputs).

    The libraries' own 0.02 is that of wide layers: in narrow ones it all but switches the residual
    branches off.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)


def vit_flops(grid: int, patch: int, width: int, layers: int, mlp_weights: int) -> float:
    """FLOPs of a ViT's forward pass over one view of grid x grid patches and a class token."""
    tokens = 1 + grid**2
    embedding = 2 * grid**2 * 3 * patch**2 * width
    return float(embedding + layers * (2 * tokens * (4 * width**2 + mlp_weights) + 4 * tokens**2 * width))
