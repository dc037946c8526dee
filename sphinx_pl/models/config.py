"""The typed configuration of a model. `conf/model/*.yaml` are instances of `SphinxConfig`.

Every size that the modules use is here, and whatever does not fit together is refused here, in one line,
before anything is built. Sizes are in tokens, channels or pixels as named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import DictConfig, OmegaConf

from sphinx_pl.models.checks import divides, positive, require
from sphinx_pl.models.encoders.base import ENCODERS, EncoderConfig, ViewScheme
from sphinx_pl.utils.config import build, unknown_key
from sphinx_pl.utils.errors import UserError, suggest

_ENCODERS = "model.vision.encoders"
IMAGE_POSITIONS = ("after_bos", "inline")
MERGE_MODES = ("none", "mean", "shuffle")


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
        positive("model.decoder", self, "vocab_size", "width", "layers", "heads", "kv_heads", "ffn_width")
        require(
            self.experts == 0 or 0 < self.experts_per_token <= self.experts,
            f"model.decoder.experts_per_token={self.experts_per_token} must be 1 to experts={self.experts}",
        )
        require(self.balance_weight >= 0, f"model.decoder.balance_weight={self.balance_weight} must not be negative")
        divides("model.decoder", self, "heads", "width")
        divides("model.decoder", self, "kv_heads", "heads")
        require(
            self.head_dim % 2 == 0, f"model.decoder.width/heads = {self.head_dim} must be even for rotary embeddings"
        )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass
class VisionConfig:
    """Mixed visual embeddings (SPHINX, section 3.2) and the view scheme (section 3.3).

    `encoders` has the configuration of each encoder under its kind; a kind that is null is absent.
    Encoders are joined in the order of the kinds' names, whatever the order of the keys.

    The padded square image has `image_size` pixels a side; `grid` n > 1 adds n x n sub-images to
    the overview. Each encoder gets all views at its own size, cut from the whole image.
    """

    encoders: dict[str, Any] = field(default_factory=dict)
    image_size: int = 224
    grid: int = 1
    # Fewer patch tokens before the projection: the mean of, or all channels of, merge_factor^2
    # neighbours.
    merge: str = "none"
    merge_factor: int = 2
    # False: the overview keeps all of its patch tokens, only sub-images are merged.
    merge_overview: bool = True
    # A sub-image that shows only padding is one learned token, which no encoder sees (SPHINX-X,
    # Gao et al. 2024).
    skip_padding: bool = False
    # The original resizes images inside the model in float16. True reproduces the released
    # weights' inputs.
    half_resize: bool = False

    def __post_init__(self) -> None:
        self.encoders = _encoders(self.encoders)
        positive("model.vision", self, "image_size", "grid", "merge_factor")
        divides("model.vision", self, "grid", "image_size")
        require(self.merge in MERGE_MODES, f"model.vision.merge='{self.merge}': {suggest(self.merge, MERGE_MODES)}")
        require(
            bool(self.encoders),
            f"model.vision.encoders is empty: choose among {', '.join(sorted(ENCODERS))}, or set model.vision=null",
        )
        require(
            self.merge_overview or self.merge != "shuffle",
            "model.vision.merge=shuffle changes the width of tokens: it needs merge_overview=true",
        )
        require(
            self.grid > 2 or not self.skip_padding,
            f"model.vision.skip_padding=true never skips anything with grid={self.grid}: an image lies in the middle "
            "of its padding and so crosses all of 2 x 2 sub-images; set model.vision.grid to 3 or more",
        )
        self._check_grids()

    def _check_grids(self) -> None:
        """Raises: UserError: the feature maps of the channel encoders cannot be joined or merged."""
        for config in self.channel_encoders:
            if ENCODERS[config.kind].repeats:
                require(
                    self.patch_grid % config.grid == 0,
                    f"{config.section}: its {config.grid}x{config.grid} grid does not divide the "
                    f"other encoders' {self.patch_grid}x{self.patch_grid}: change {config.section}.image_size",
                )
            else:
                other = self._map_owner()
                require(
                    config.grid == self.patch_grid,
                    f"model.vision.encoders: {other.kind} has a {other.grid}x{other.grid} grid but {config.kind} "
                    f"{config.grid}x{config.grid}: "
                    "joining by channel needs equal grids, change an image_size or patch_size",
                )
        if self.channel_encoders:
            require(
                self.patch_grid % self.merge_factor == 0 or self.merge == "none",
                f"model.vision.merge_factor={self.merge_factor} does not divide the "
                f"{self.patch_grid}x{self.patch_grid} patch grid",
            )

    @property
    def channel_encoders(self) -> list[EncoderConfig]:
        """The encoders whose tokens are joined by channel, in order."""
        return [config for kind, config in self.encoders.items() if ENCODERS[kind].join == "channel"]

    @property
    def sequence_encoders(self) -> list[EncoderConfig]:
        """The encoders whose tokens stand in front of the others, in order."""
        return [config for kind, config in self.encoders.items() if ENCODERS[kind].join == "sequence"]

    def _map_owner(self) -> EncoderConfig:
        """The encoder onto whose grid the others' feature maps are repeated."""
        fixed = [config for config in self.channel_encoders if not ENCODERS[config.kind].repeats]
        return fixed[0] if fixed else max(self.channel_encoders, key=lambda config: config.grid)

    @property
    def patch_grid(self) -> int:
        """Patches a side of the channel-joined feature map, before merging; 0 without channel encoders."""
        return self._map_owner().grid if self.channel_encoders else 0

    @property
    def views(self) -> int:
        return 1 if self.grid == 1 else 1 + self.grid**2

    @property
    def scheme(self) -> ViewScheme:
        return ViewScheme(self.grid, self.patch_grid or None, self.half_resize)

    def patch_tokens(self, merge: str) -> int:
        """Channel-joined tokens of a view: one class token and the (merged) patches."""
        if not self.channel_encoders:
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
        return factor * sum(config.width for config in self.channel_encoders)

    @property
    def view_tokens(self) -> list[int]:
        """Tokens of each view: start embedding, sequence encoders, patch tokens, end embedding."""
        others = 2 + sum(config.tokens for config in self.sequence_encoders)
        return [others + self.patch_tokens(merge) for views, merge in self.view_groups for _ in range(views)]

    @property
    def tokens_per_image(self) -> int:
        """Tokens of an image none of whose views is skipped."""
        return sum(self.view_tokens)


def _encoders(sections: Mapping[str, Any]) -> dict[str, EncoderConfig]:
    """The configuration of each encoder that is not null, in the order of the kinds' names.

    Raises:
        UserError: an unknown kind, or as `build`.
    """
    configs: dict[str, EncoderConfig] = {}
    for kind, section in sorted(sections.items()):
        if kind not in ENCODERS:
            raise UserError(unknown_key(f"{_ENCODERS}.{kind}", [f"{_ENCODERS}.{known}" for known in ENCODERS]))
        if isinstance(section, EncoderConfig):
            configs[kind] = section
        elif section is not None:
            configs[kind] = build(ENCODERS[kind].config_class, section, f"{_ENCODERS}.{kind}")
    return configs


def _renamed_keys(model: Any) -> Any:
    """A model's section with `vision.encoders`; older versions have the kinds in `vision` itself.

    Raises:
        UserError: it has both.
    """
    vision = model.get("vision") if isinstance(model, Mapping | DictConfig) else None
    if not isinstance(vision, Mapping | DictConfig) or not (old := [key for key in vision if key in ENCODERS]):
        return model
    if "encoders" in vision:
        section = vision[old[0]]
        name = f".{next(iter(section))}" if isinstance(section, Mapping | DictConfig) and len(section) else ""
        raise UserError(unknown_key(f"model.vision.{old[0]}{name}", [f"{_ENCODERS}.{old[0]}{name}"]))
    plain: Any = OmegaConf.to_container(vision, resolve=True) if OmegaConf.is_config(vision) else dict(vision)
    encoders = {kind: plain.pop(kind) for kind in old}
    return {key: model[key] for key in model if key != "vision"} | {"vision": plain | {"encoders": encoders}}


@dataclass
class SphinxConfig:
    """A whole model: a decoder and, unless null, mixed visual embeddings in front of it."""

    name: str = "sphinx"
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    vision: Optional[VisionConfig] = None
    # Where one image's tokens stand: right after BOS (the original), or where its <image> stands in the text.
    # Several images always stand inline.
    image_position: str = "after_bos"

    def __post_init__(self) -> None:
        require(
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
        """A validated configuration from a mapping (a DictConfig too), also of an older version.

        Raises:
            UserError: an unknown key, a wrong type or sizes that do not fit, with the key's full name.
        """
        return build(cls, _renamed_keys(values), "model")
