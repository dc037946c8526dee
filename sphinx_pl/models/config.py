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
from sphinx_pl.models.encoders.base import ENCODERS, JOINS, EncoderConfig, ViewScheme, usable_key
from sphinx_pl.models.encoders.resamplers import resampler_config
from sphinx_pl.utils.config import build, unknown_key
from sphinx_pl.utils.errors import UserError, suggest

_ENCODERS = "model.vision.encoders"
IMAGE_POSITIONS = ("after_bos", "inline")
MERGE_MODES = ("none", "mean", "shuffle")
PROJECTIONS = ("linear", "mlp")
ALIGNMENTS = ("bilinear", "shuffle")
ALIGN_GRIDS = ("largest", "first")


ROPE_SCALINGS = ("linear", "llama3", "yarn", "longrope")
QK_NORM_OVER = ("head", "width")
NORM_POSITIONS = ("before", "after")


@dataclass
class RopeScaling:
    """How rotary frequencies are changed for positions beyond those of the first training.

    linear: all frequencies are divided by `factor` (Chen et al. 2023). llama3: only the low ones,
    with a smooth passage (Grattafiori et al. 2024). yarn: low ones are divided, high ones kept, and
    attention is sharpened (Peng et al. 2023). longrope: each frequency has a factor of its own, in
    short and in long sequences (Ding et al. 2024).
    """

    kind: str = "linear"
    factor: float = 1.0
    # Positions of the first training, in tokens; linear does not use it.
    original_positions: int = 0
    # llama3: wavelengths beyond original_positions / low_freq_factor are stretched, those below
    # original_positions / high_freq_factor are kept.
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    # yarn: frequencies that turn more often than beta_fast over original_positions are kept, those
    # that turn less often than beta_slow divided.
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    # yarn: whether the two borders are rounded to whole channels.
    truncate: bool = True
    # longrope: divisors of the frequencies, one for each pair of rotary channels.
    short_factor: list[float] = field(default_factory=list)
    long_factor: list[float] = field(default_factory=list)
    # Queries and keys are multiplied by it. None: as the paper of yarn or longrope derives it from
    # `factor`.
    attention_factor: Optional[float] = None

    def __post_init__(self) -> None:
        section = "model.decoder.rope_scaling"
        require(self.kind in ROPE_SCALINGS, f"{section}.kind='{self.kind}': {suggest(self.kind, ROPE_SCALINGS)}")
        positive(section, self, "factor")
        require(
            self.kind == "linear" or self.original_positions > 1,
            f"{section}.original_positions={self.original_positions} must be above 1",
        )
        require(
            self.high_freq_factor > self.low_freq_factor > 0,
            f"{section}.low_freq_factor={self.low_freq_factor} must be above 0 and below "
            f"high_freq_factor={self.high_freq_factor}",
        )


@dataclass
class DecoderConfig:
    """A LLaMA-family decoder (Touvron et al. 2023, table 1; grouped queries: Ainslie et al. 2023)."""

    vocab_size: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    # Channels of a head; 0: width / heads. Qwen 3 and Mistral Nemo have others.
    head_size: int = 0
    ffn_width: int = 11008
    norm_eps: float = 1e-5
    # before: norms of the inputs of attention and feed-forward (LLaMA); after: of their outputs
    # (OLMo 2).
    norm_position: str = "before"
    rope_theta: float = 10000.0
    rope_scaling: Optional[RopeScaling] = None
    # Channels of a head that are rotated; 0: all of them. Phi-4-mini rotates three quarters.
    rotary_size: int = 0
    # Layers whose queries and keys are not rotated, by index (SmolLM3).
    unrotated_layers: list[int] = field(default_factory=list)
    # A position sees itself and `window` - 1 positions before it (Mistral's sliding window); 0: all before it.
    window: int = 0
    # Layers that have the window, by index; None: all of them.
    window_layers: Optional[list[int]] = None
    max_positions: int = 4096
    # Biases of queries, keys and values (Qwen 2).
    qkv_bias: bool = False
    # RMSNorm on queries and keys. Off in LLaMA; small models learn faster with it.
    qk_norm: bool = False
    # head: each head has its own mean square (Qwen 3); width: all heads have one (OLMo 2).
    qk_norm_over: str = "head"
    tie_embeddings: bool = False
    # Sparse feed-forward (Mixtral, Jiang et al. 2024): each token goes to `experts_per_token` of so many; 0: dense.
    experts: int = 0
    experts_per_token: int = 2
    # Whether the weights of a token's experts add up to 1.
    normalise_experts: bool = True
    # Of the load-balancing loss in the training loss.
    balance_weight: float = 0.0
    # Weights to start from: a checkpoint folder (Meta's, Hugging Face's or ours), a GGUF file or
    # `hf-hub:OWNER/NAME[@REVISION]`.
    load: Optional[str] = None

    def __post_init__(self) -> None:
        section = "model.decoder"
        positive(section, self, "vocab_size", "width", "layers", "heads", "kv_heads", "ffn_width")
        require(
            self.experts == 0 or 0 < self.experts_per_token <= self.experts,
            f"{section}.experts_per_token={self.experts_per_token} must be 1 to experts={self.experts}",
        )
        require(self.balance_weight >= 0, f"{section}.balance_weight={self.balance_weight} must not be negative")
        divides(section, self, "kv_heads", "heads")
        if self.head_size == 0:
            divides(section, self, "heads", "width")
        origin = "head_size" if self.head_size else "width/heads"
        require(
            self.head_dim > 0 and self.head_dim % 2 == 0,
            f"{section}.{origin} = {self.head_dim} must be even for rotary embeddings",
        )
        require(
            0 < self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0,
            f"{section}.rotary_size={self.rotary_size} must be even and at most the head's {self.head_dim} channels",
        )
        # One way to say each: configurations are compared.
        self.rotary_size = 0 if self.rotary_size == self.head_dim else self.rotary_size
        self.head_size = 0 if self.head_size * self.heads == self.width else self.head_size
        require(self.window >= 0, f"{section}.window={self.window} must not be negative")
        for key in ("unrotated_layers", "window_layers"):
            for layer in getattr(self, key) or ():
                require(0 <= layer < self.layers, f"{section}.{key}: there is no layer {layer} of {self.layers}")
        for key, choices in (("qk_norm_over", QK_NORM_OVER), ("norm_position", NORM_POSITIONS)):
            value = getattr(self, key)
            require(value in choices, f"{section}.{key}='{value}': {suggest(value, choices)}")
        if (scaling := self.rope_scaling) is not None and scaling.kind == "longrope":
            for key in ("short_factor", "long_factor"):
                count = len(getattr(scaling, key))
                require(
                    count == self.rotary_dim // 2,
                    f"{section}.rope_scaling.{key} has {count} numbers, not one for each of {self.rotary_dim // 2} "
                    "pairs of rotary channels",
                )

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.head_size or self.width // self.heads

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""
        return self.rotary_size or self.head_dim

    def has_window(self, layer: int) -> bool:
        """Whether attention in that layer ends `window` positions back."""
        return self.window > 0 and (self.window_layers is None or layer in self.window_layers)

    def shallow(self, layers: int) -> DecoderConfig:
        """The same decoder with only its first layers."""
        kept = {
            key: value if value is None else [layer for layer in value if layer < layers]
            for key, value in (("unrotated_layers", self.unrotated_layers), ("window_layers", self.window_layers))
        }
        return dataclasses.replace(self, layers=layers, **kept)  # type: ignore[arg-type]


@dataclass
class VisionConfig:
    """Mixed visual embeddings (SPHINX, section 3.2) and the view scheme (section 3.3).

    `encoders` has the configuration of each encoder under a key, which names that part of the
    model. A key that is a kind is of that kind; under any other key, the section names its `kind`.
    A section that is null is absent. Encoders are joined in the alphabetical order of their keys.

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
    # To the decoder's width: a linear layer and a norm (the original), or LLaVA's two layers with
    # GELU.
    projection: str = "linear"
    # How feature maps of different grids become equal before they are joined by channel: bilinear
    # interpolation, or a pixel shuffle, which trades places for channels. null: they must be equal.
    align: Optional[str] = None
    # The common grid: `largest`, `first` (of the encoders in order) or patches a side; null:
    # largest.
    align_grid: Any = None

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
            self.projection in PROJECTIONS,
            f"model.vision.projection='{self.projection}': {suggest(self.projection, PROJECTIONS)}",
        )
        require(
            self.align is None or self.align in ALIGNMENTS,
            f"model.vision.align='{self.align}': {suggest(str(self.align), ALIGNMENTS)}, or null",
        )
        require(
            self.align_grid is None
            or (self.align_grid in ALIGN_GRIDS if isinstance(self.align_grid, str) else _is_count(self.align_grid)),
            f"model.vision.align_grid={self.align_grid} must be largest, first or a number of patches a side",
        )
        require(
            self.align is not None or self.align_grid is None,
            f"model.vision.align_grid={self.align_grid} needs model.vision.align: choose bilinear or shuffle",
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
        for config in self.encoders.values():
            _check_joining(config)
        self._check_grids()

    def _check_grids(self) -> None:
        """Raises: UserError: the feature maps of the channel encoders cannot be joined or merged."""
        for config in self.channel_encoders:
            if self.align is not None:
                self._check_aligned(config)
            elif ENCODERS[config.kind].repeats:
                require(
                    self.patch_grid % config.grid == 0,
                    f"{config.section}: its {config.grid}x{config.grid} grid does not divide the "
                    f"other encoders' {self.patch_grid}x{self.patch_grid}: change {config.section}.image_size",
                )
            else:
                other = self._map_owner()
                require(
                    config.grid == self.patch_grid,
                    f"model.vision.encoders: {other.part} has a {other.grid}x{other.grid} grid but {config.part} "
                    f"{config.grid}x{config.grid}: joining by channel needs equal grids, change an image_size or "
                    "patch_size, or set model.vision.align=bilinear",
                )
        if self.channel_encoders:
            require(
                self.patch_grid % self.merge_factor == 0 or self.merge == "none",
                f"model.vision.merge_factor={self.merge_factor} does not divide the "
                f"{self.patch_grid}x{self.patch_grid} patch grid",
            )

    def _check_aligned(self, config: EncoderConfig) -> None:
        """Raises: UserError: a pixel shuffle cannot bring this encoder's map to the common grid."""
        grid, target = config.grid, self.patch_grid
        larger, smaller = max(grid, target), min(grid, target)
        fits = self.align == "bilinear" or larger % smaller == 0
        if self.align == "shuffle" and fits and grid < target:
            fits = config.width % (target // grid) ** 2 == 0
        require(
            fits,
            f"{config.section}: a pixel shuffle cannot bring its {grid}x{grid} grid of {config.width} channels to "
            f"{target}x{target}: set model.vision.align=bilinear, or change model.vision.align_grid or an image_size",
        )

    @property
    def channel_encoders(self) -> list[EncoderConfig]:
        """The encoders whose tokens are joined by channel, in order."""
        return [config for config in self.encoders.values() if config.by_channel]

    @property
    def sequence_encoders(self) -> list[EncoderConfig]:
        """The encoders whose tokens stand in front of the others, in order."""
        return [config for config in self.encoders.values() if not config.by_channel]

    def _map_owner(self) -> EncoderConfig:
        """The encoder onto whose grid the others' feature maps are repeated."""
        fixed = [config for config in self.channel_encoders if not ENCODERS[config.kind].repeats]
        return fixed[0] if fixed else max(self.channel_encoders, key=lambda config: config.grid)

    @property
    def patch_grid(self) -> int:
        """Patches a side of the channel-joined feature map, before merging; 0 without channel encoders."""
        if not self.channel_encoders:
            return 0
        if self.align is None:
            return self._map_owner().grid
        if _is_count(self.align_grid):
            return int(self.align_grid)
        grids = [config.grid for config in self.channel_encoders]
        return grids[0] if self.align_grid == "first" else max(grids)

    def encoder_tokens(self, config: EncoderConfig) -> int:
        """Tokens that the encoder gives for a view, before they are aligned or resampled."""
        repeated = config.by_channel and self.align is None
        return 1 + self.patch_grid**2 if repeated else config.tokens

    def channel_width(self, config: EncoderConfig) -> int:
        """Channels of a channel encoder's tokens on the common grid."""
        if self.align != "shuffle":
            return config.width
        grid, target = config.grid, self.patch_grid
        return config.width * (grid // target) ** 2 if grid > target else config.width // (target // grid) ** 2

    @property
    def views(self) -> int:
        return 1 if self.grid == 1 else 1 + self.grid**2

    @property
    def scheme(self) -> ViewScheme:
        return ViewScheme(self.grid, None if self.align else self.patch_grid or None, self.half_resize)

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
        return factor * sum(self.channel_width(config) for config in self.channel_encoders)

    @property
    def view_tokens(self) -> list[int]:
        """Tokens of each view: start embedding, sequence encoders, patch tokens, end embedding."""
        others = 2 + sum(config.sequence_tokens for config in self.sequence_encoders)
        return [others + self.patch_tokens(merge) for views, merge in self.view_groups for _ in range(views)]

    @property
    def tokens_per_image(self) -> int:
        """Tokens of an image none of whose views is skipped."""
        return sum(self.view_tokens)


def _encoders(sections: Mapping[str, Any]) -> dict[str, EncoderConfig]:
    """The configuration of each encoder that is not null, in the order of the keys.

    Raises:
        UserError: an unknown kind or a key that cannot be used, or as `build`.
    """
    configs: dict[str, EncoderConfig] = {}
    for key, section in sorted(sections.items()):
        if section is None and (key in ENCODERS or usable_key(key)):
            continue
        if isinstance(section, EncoderConfig):
            config = dataclasses.replace(section, key=key)
        else:
            config = _encoder(key, section)
        if config.resampler is not None:
            config.resampler = resampler_config(config.resampler, f"{config.section}.resampler")
        configs[key] = config
    return configs


def _encoder(key: str, section: Any) -> EncoderConfig:
    """The configuration of the encoder under a key, from its section. Raises as `_encoders` does."""
    place = f"{_ENCODERS}.{key}"
    values = dict(section) if isinstance(section, Mapping) else section
    kind = values.pop("kind", None) if isinstance(values, dict) else None
    if kind is None and key not in ENCODERS:
        known = f"{place}.kind={'|'.join(sorted(ENCODERS))}"
        raise UserError(
            f"{unknown_key(place, [f'{_ENCODERS}.{name}' for name in ENCODERS])} A key of your own needs {known}"
        )
    if not usable_key(key):
        raise UserError(f"{place}: an encoder cannot have this key: choose a word of letters, digits and underscores")
    if kind is not None and key in ENCODERS and kind != key:
        raise UserError(
            f"{place}.kind={kind}: '{key}' is a kind itself: choose another key for an encoder of kind {kind}"
        )
    if isinstance(values, dict) and "key" in values:
        raise UserError(f"there is no key {place}.key: the section's own name is the encoder's key")
    encoder = ENCODERS[str(kind or key)]
    return build(encoder.config_class, {**values, "key": key} if isinstance(values, dict) else values, place)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_joining(config: EncoderConfig) -> None:
    """Raises: UserError: an encoder cannot be joined as its configuration says."""
    require(
        config.join is None or config.join in JOINS,
        f"{config.section}.join='{config.join}': {suggest(str(config.join), JOINS)}",
    )
    require(
        config.has_grid or config.join != "channel",
        f"{config.section}.join=channel: its tokens are no map of patches, so they can only be joined by sequence",
    )
    if config.resampler is not None:
        require(
            config.join != "channel",
            f"{config.section}.join=channel: the tokens of a resampler are joined by sequence: remove one of the keys",
        )
        config.resampler.check(f"{config.section}.resampler", config.grid if config.has_grid else None)


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
        values = dataclasses.asdict(self)
        for key, config in (self.vision.encoders if self.vision else {}).items():
            values["vision"]["encoders"][key] = config.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Any) -> SphinxConfig:
        """A validated configuration from a mapping (a DictConfig too), also of an older version.

        Raises:
            UserError: an unknown key, a wrong type or sizes that do not fit, with the key's full name.
        """
        return build(cls, _renamed_keys(values), "model")
