"""What a kind of vision encoder consists of, and the registry of kinds.

Sizes come from the configuration alone. An encoder is built with new weights, on the meta device
too; `sphinx_pl.checkpoints.encoders` reads released ones. It holds no parameter that its forward
pass does not use.
"""

from __future__ import annotations

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


@dataclass
class EncoderConfig:
    """The keys that every kind has: the size of its views, and released weights to `load`."""

    kind: ClassVar[str]
    free: ClassVar[tuple[str, ...]] = ()
    """Keys that a run may choose anew for weights that were trained with another value."""

    image_size: int = 224
    load: Optional[str] = field(default=None, kw_only=True)

    @property
    def section(self) -> str:
        """The name of its section in a configuration, for messages."""
        return f"model.vision.encoders.{self.kind}"

    @property
    def width(self) -> int:
        """Channels of a token."""
        raise NotImplementedError

    @property
    def grid(self) -> int:
        """Patches a side of the feature map of an encoder that is joined by channel."""
        raise NotImplementedError

    @property
    def tokens(self) -> int:
        """Tokens of a view of an encoder that is joined by sequence."""
        raise NotImplementedError


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

    One that is joined by channel gives 1 + patch_grid^2 tokens, class token first. One that is
    joined by sequence gives `config.tokens`, which stand in front of the others.
    """

    config: EncoderConfig
    kind: ClassVar[str]
    config_class: ClassVar[type[EncoderConfig]]
    join: ClassVar[Literal["channel", "sequence"]] = "channel"
    repeats: ClassVar[bool] = False
    """It repeats its feature map onto the larger grid of the encoders that it is joined with."""
    mean: ClassVar[Colour] = CLIP_MEAN
    std: ClassVar[Colour] = CLIP_STD
    resize_mode: ClassVar[str] = "bicubic"

    published: ClassVar[tuple[PublishedLayout, ...]] = (OURS,)
    """Layouts of released weights. The first one is taken of those that fit equally."""
    original: ClassVar[OriginalNames | None] = None
    """Its tensors in the released SPHINX weights; None: they do not have it."""
    open_clip_model: ClassVar[str] = ""
    """open_clip's architecture that a tag alone belongs to; "": open_clip does not have it."""
    timm_models: ClassVar[str] = ""
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
        """New weights with deviation 1 / sqrt(inputs), whatever the width.

        The libraries' own 0.02 is that of wide layers: in narrow ones it all but switches the
        residual branches off.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)

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


def register(kind: str, config: type[EncoderConfig]) -> Callable[[Kind], Kind]:
    """A class decorator: the encoder is built for the key `kind` of `model.vision.encoders`.

    Args:
        kind: also the name of a part of the model, in `train_parts` for instance.
        config: the dataclass of its keys, of this kind alone.
    """
    if kind in _TAKEN:
        raise ValueError(f"an encoder cannot be called '{kind}': a part of the model has this name")
    if "kind" in vars(config):
        raise ValueError(f"{config.__name__} is the configuration of '{config.kind}': make a subclass of it")

    def add(encoder: Kind) -> Kind:
        encoder.kind = config.kind = kind
        encoder.config_class = config
        ENCODERS.register(kind, encoder)
        return encoder

    return add


def vit_flops(grid: int, patch: int, width: int, layers: int, mlp_weights: int) -> float:
    """FLOPs of a ViT's forward pass over one view of grid x grid patches and a class token."""
    tokens = 1 + grid**2
    embedding = 2 * grid**2 * 3 * patch**2 * width
    return float(embedding + layers * (2 * tokens * (4 * width**2 + mlp_weights) + 4 * tokens**2 * width))
