"""The typed configuration of a model. `conf/model/*.yaml` are instances of `SphinxConfig`.

Every size that the modules use is here, and whatever does not fit together is refused here, in one line,
before anything is built. Sizes are in tokens, channels or pixels as named.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Optional

from sphinx_pl.utils.config import build
from sphinx_pl.utils.errors import UserError, suggest

IMAGE_POSITIONS = ("after_bos", "inline")
MERGE_MODES = ("none", "mean", "shuffle")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _positive(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"{section}.{name} must be positive, not {value}")


def _divides(section: str, config: object, part: str, whole: str) -> None:
    a, b = getattr(config, part), getattr(config, whole)
    _require(b % a == 0, f"{section}.{part}={a} does not divide {section}.{whole}={b}: change one of them")


@dataclass
class DecoderConfig:
    """A LLaMA-family decoder (Touvron et al. 2023, table 1; grouped queries: Ainslie et al. 2023)."""

    vocab_size: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    ffn_width: int = 11008
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_positions: int = 4096
    # RMSNorm on queries and keys per head (Qwen3, OLMo 2). Off in LLaMA; small models learn faster with it.
    qk_norm: bool = False
    tie_embeddings: bool = False
    # Sparse feed-forward (Mixtral, Jiang et al. 2024): each token goes to `experts_per_token` of so many; 0: dense.
    experts: int = 0
    experts_per_token: int = 2
    # Of the load-balancing loss in the training loss.
    balance_weight: float = 0.0
    # Weights to start from: a checkpoint folder (Meta's, Hugging Face's or ours) or `hf-hub:OWNER/NAME`.
    load: Optional[str] = None

    def __post_init__(self) -> None:
        _positive("model.decoder", self, "vocab_size", "width", "layers", "heads", "kv_heads", "ffn_width")
        _require(
            self.experts == 0 or 0 < self.experts_per_token <= self.experts,
            f"model.decoder.experts_per_token={self.experts_per_token} must be 1 to experts={self.experts}",
        )
        _require(self.balance_weight >= 0, f"model.decoder.balance_weight={self.balance_weight} must not be negative")
        _divides("model.decoder", self, "heads", "width")
        _divides("model.decoder", self, "kv_heads", "heads")
        _require(
            self.head_dim % 2 == 0, f"model.decoder.width/heads = {self.head_dim} must be even for rotary embeddings"
        )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass
class ClipViTConfig:
    """CLIP's ViT, built by open_clip. Defaults: ViT-L/14.

    `load`, here and in the other towers: released weights, a name or a path (docs/configuration.md has both).
    """

    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0
    quick_gelu: bool = True
    load: Optional[str] = None

    def __post_init__(self) -> None:
        _positive("model.vision.clip", self, "image_size", "patch_size", "width", "layers", "heads")
        _divides("model.vision.clip", self, "heads", "width")
        _divides("model.vision.clip", self, "patch_size", "image_size")

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size


@dataclass
class ConvNextConfig:
    """CLIP's ConvNeXt trunk, built by timm. Defaults: XXL.

    Where `view_size` is given, it gets the views of that size, enlarged to `image_size` by repeating pixels.
    """

    image_size: int = 256
    view_size: Optional[int] = None
    depths: list[int] = field(default_factory=lambda: [3, 4, 30, 3])
    dims: list[int] = field(default_factory=lambda: [384, 768, 1536, 3072])
    stem: int = 4
    load: Optional[str] = None

    def __post_init__(self) -> None:
        _positive("model.vision.convnext", self, "image_size", "stem")
        _require(
            self.view_size is None or self.view_size > 0,
            f"model.vision.convnext.view_size must be positive or null, not {self.view_size}",
        )
        _require(
            len(self.depths) == len(self.dims) > 0 and min(self.dims) > 0 and min(self.depths) >= 0,
            f"model.vision.convnext.depths has {len(self.depths)} stages but dims has {len(self.dims)}: "
            "give one number per stage, none of them negative",
        )
        _require(
            self.image_size % self.stride == 0,
            f"model.vision.convnext.image_size={self.image_size} is not a multiple of the stride {self.stride}",
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


@dataclass
class Dinov2Config:
    """DINOv2's ViT, built by timm. Defaults: g/14 with SwiGLU."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1536
    layers: int = 40
    heads: int = 24
    # Of the fused gate and value, as timm counts it: 2.66667 * 2 * 1536 = 8192.
    mlp_ratio: float = 2.66667 * 2
    # Grid of the position embedding, resampled to the patches' in every pass; null: theirs. Released weights have 37.
    position_grid: Optional[int] = None
    load: Optional[str] = None

    def __post_init__(self) -> None:
        _positive("model.vision.dinov2", self, "image_size", "patch_size", "width", "layers", "heads")
        _divides("model.vision.dinov2", self, "heads", "width")
        _divides("model.vision.dinov2", self, "patch_size", "image_size")

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size


@dataclass
class QFormerConfig:
    """BLIP-2's vision model and Q-Former, built by transformers. Defaults: ViT-g/14 and the 12-layer Q-Former."""

    image_size: int = 224
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
    load: Optional[str] = None

    def __post_init__(self) -> None:
        _positive("model.vision.qformer", self, "image_size", "patch_size", "queries", "width", "layers", "heads")
        _positive(
            "model.vision.qformer", self, "vision_width", "vision_layers", "vision_heads", "cross_attention_every"
        )
        _divides("model.vision.qformer", self, "heads", "width")
        _divides("model.vision.qformer", self, "vision_heads", "vision_width")
        _divides("model.vision.qformer", self, "patch_size", "image_size")


@dataclass
class VisionConfig:
    """Mixed visual embeddings (SPHINX, section 3.2) and the view scheme (section 3.3).

    `clip`, `convnext` and `dinov2` are joined by channel in this order, `qformer` by sequence, in front.
    A tower that is null is left out. The padded square image has `image_size` pixels a side; `grid` n > 1 adds
    n x n sub-images to the overview. Each tower gets all views at its own size, cut from the whole image.
    """

    image_size: int = 224
    grid: int = 1
    clip: Optional[ClipViTConfig] = field(default_factory=ClipViTConfig)
    convnext: Optional[ConvNextConfig] = field(default_factory=ConvNextConfig)
    dinov2: Optional[Dinov2Config] = field(default_factory=Dinov2Config)
    qformer: Optional[QFormerConfig] = field(default_factory=QFormerConfig)
    # Fewer patch tokens before the projection: the mean of, or all channels of, merge_factor^2 neighbours.
    merge: str = "none"
    merge_factor: int = 2
    # False: the overview keeps all of its patch tokens, only sub-images are merged.
    merge_overview: bool = True
    # A sub-image that shows only padding is one learned token and no work for the towers (SPHINX-X, Gao et al. 2024).
    skip_padding: bool = False
    # The original resizes images inside the model in float16; on, it reproduces the released weights' inputs.
    half_resize: bool = False

    def __post_init__(self) -> None:
        _positive("model.vision", self, "image_size", "grid", "merge_factor")
        _divides("model.vision", self, "grid", "image_size")
        _require(self.merge in MERGE_MODES, f"model.vision.merge='{self.merge}': {suggest(self.merge, MERGE_MODES)}")
        _require(
            any((self.clip, self.convnext, self.dinov2, self.qformer)),
            "model.vision has no tower: set at least one of clip, convnext, dinov2, qformer, or set model.vision=null",
        )
        _require(
            self.merge_overview or self.merge != "shuffle",
            "model.vision.merge=shuffle changes the width of tokens: it needs merge_overview=true",
        )
        _require(
            self.grid > 2 or not self.skip_padding,
            f"model.vision.skip_padding=true never skips anything with grid={self.grid}: an image lies in the middle "
            "of its padding and so crosses all of 2 x 2 sub-images; set model.vision.grid to 3 or more",
        )
        if self.clip and self.dinov2:
            _require(
                self.clip.grid == self.dinov2.grid,
                f"model.vision: clip has a {self.clip.grid}x{self.clip.grid} grid but dinov2 "
                f"{self.dinov2.grid}x{self.dinov2.grid}: "
                "joining by channel needs equal grids, change an image_size or patch_size",
            )
        if self.channel_towers:
            _require(
                self.patch_grid % self.merge_factor == 0 or self.merge == "none",
                f"model.vision.merge_factor={self.merge_factor} does not divide the "
                f"{self.patch_grid}x{self.patch_grid} patch grid",
            )
        if self.convnext and (self.clip or self.dinov2):
            _require(
                self.patch_grid % self.convnext.grid == 0,
                f"model.vision.convnext: its {self.convnext.grid}x{self.convnext.grid} grid does not divide the "
                f"other towers' {self.patch_grid}x{self.patch_grid}: change convnext.image_size",
            )

    @property
    def towers(self) -> list[str]:
        """Names of the towers there are, as parts of the model."""
        return [name for name in ("clip", "convnext", "dinov2", "qformer") if getattr(self, name)]

    @property
    def channel_towers(self) -> list[Any]:
        return [tower for tower in (self.clip, self.convnext, self.dinov2) if tower]

    @property
    def patch_grid(self) -> int:
        """Patches a side of the channel-joined feature map, before merging; 0 without channel towers."""
        for tower in (self.clip, self.dinov2, self.convnext):
            if tower:
                grid: int = tower.grid
                return grid
        return 0

    @property
    def views(self) -> int:
        return 1 if self.grid == 1 else 1 + self.grid**2

    def patch_tokens(self, merge: str) -> int:
        """Channel-joined tokens of a view: one class token and the (merged) patches."""
        if not self.channel_towers:
            return 0
        side = self.patch_grid // (1 if merge == "none" else self.merge_factor)
        return 1 + side * side

    @property
    def view_groups(self) -> list[tuple[int, str]]:
        """(views, how their patches are merged), in the order of the views."""
        if self.grid == 1 or self.merge_overview:
            return [(self.views, self.merge)]
        return [(1, "none"), (self.views - 1, self.merge)]

    @property
    def joined_width(self) -> int:
        """Channels of a joined token at the projection's input."""
        factor = self.merge_factor**2 if self.merge == "shuffle" else 1
        return factor * sum(int(tower.width) for tower in self.channel_towers)

    @property
    def view_tokens(self) -> list[int]:
        """Of each view: start embedding, Q-Former queries, patch tokens, end embedding."""
        others = 2 + (self.qformer.queries if self.qformer else 0)
        return [others + self.patch_tokens(merge) for views, merge in self.view_groups for _ in range(views)]

    @property
    def tokens_per_image(self) -> int:
        """Of an image none of whose views is skipped."""
        return sum(self.view_tokens)


@dataclass
class SphinxConfig:
    """A whole model: a decoder and, unless null, the vision mixer in front of it."""

    name: str = "sphinx"
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    vision: Optional[VisionConfig] = field(default_factory=VisionConfig)
    # Where one image's tokens stand: right after BOS (the original), or where its <image> stands in the text.
    # Several images always stand inline.
    image_position: str = "after_bos"

    def __post_init__(self) -> None:
        _require(
            self.image_position in IMAGE_POSITIONS,
            f"model.image_position='{self.image_position}': {suggest(self.image_position, IMAGE_POSITIONS)}",
        )

    @property
    def tokens_per_image(self) -> int:
        return self.vision.tokens_per_image if self.vision else 0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> SphinxConfig:
        """Build and validate from a mapping (a DictConfig too).

        Raises:
            UserError: an unknown key, a wrong type or sizes that do not fit, with the key's full name.
        """
        return build(cls, values, "model")
