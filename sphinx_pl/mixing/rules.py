"""Which weights a tensor gets: by its part of the model, a pattern of its name, its layer.

The first rule wins.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Any, Optional

from rich.text import Text

from sphinx_pl.checkpoints.tensors import encoder_of
from sphinx_pl.utils.config import build
from sphinx_pl.utils.console import Table
from sphinx_pl.utils.errors import UserError, suggest

# Ours and those of Llama's relatives, GPT-2 and BLOOM (h), GPT-NeoX (layers), MPT (blocks), T5
# (block).
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks?)\.(\d+)\.")
_NORM = re.compile(r"_proj\.1\.|(^|[._])(norm|layernorm|rmsnorm|ln)([._\d]|$)|layernorm|_norm\.", re.IGNORECASE)
# What a tensor belongs to is what one of its parents is, wherever that lies in the model. Words of
# one path element:
_ENCODER = re.compile(
    r"(vision|visual|image|img|audio|speech|sound|video|acoustic)"
    r"(_?(tower|model|backbone|encoder|transformer|processor|embed_tokens|vit|net|branch|trunk))?(_\d|_aux)?"
    r"|vit|vpm|apm|sam(_model|_vision)?|siglip\w*|clip\w*|dino\w*|eva\w*|whisper\w*|vq_?model|vqvae|gen_vision\w*"
    r"|q_?former|query_tokens|conformer|high_res\w*|low_res\w*|(vision|image|img|high|low)_\w*encoder\w*"
)
_PROJECTION = re.compile(
    r"(multi_?modal|mm|modality|modalities|vision|visual|image|img|audio|speech|video|language|qformer|vl|v2t)_"
    r"(mm_)?(proj(ect(or|ion)s?)?|connector|adapt[eo]r|aligner|mlp|resampler|merger|abstractor|language_adapter|bridge)\w*"
    r"|(mm_|img_|image_|vision_)?projector\w*|linear_proj|connector|(gen_)?aligner|(perceiver_)?resampler"
    r"|perceiver\w*|abstractor|merger|(deepstack_)?merger_list|patch_merger|mlp1|embed_(vision|audio|image)"
    r"|(image_|view_|sub_|glb_|video_)?(newline|seperator|separator|gn)|modality_projection|mlp_?AR"
    r"|image_(pooling_2d|projection|to_text_projection)|vit_(large_)?proj\w*|resampler_model",
    re.IGNORECASE,
)
_EMBEDDING = r"tok_embeddings|embed_tokens|wte|wpe|word_embeddings|embed_in|embed_out|lm_head"
_EMBEDDINGS = re.compile(
    rf"(^|\.)({_EMBEDDING})\.|^((decoder|language_model|llm)\.)?output\.|^transformer\.output_layer\."
)
# Parents of a decoder's layers, from the model's root on, and what may lie beside these layers.
_ROOT = (
    r"(?:(?:base_model|module|model|language_model|language|text_model|text_decoder|decoder|transformer|gpt_neox"
    r"|llm|lm|thinker|backbone|rwkv|mpt)\.)+"
)
_BESIDE = (
    rf"{_EMBEDDING}|embedding|embeddings|embed_positions|position_embeddings|tokens_embed|shared|output|output_layer|head"
    r"|(final_?)?(layer_?norm|norm|ln|rms_?norm)(_f|_out|_embeddings?)?|ln_\w+|norm_f|emb_ln|rope|rotary\w*"
    r"|word_embeddings_layernorm|embedding_norm|embed_tokens_per_layer|project_(in|out)|per_layer_\w+"
)
_LAYERS = r"(?:(?:\w+_)?layers|h|blocks?|layer)\.\d+\."
_DECODER = re.compile(
    # ChatGLM calls its decoder an encoder.
    rf"{_ROOT}({_LAYERS}|({_BESIDE})(\.|$))|(h|layers)\.\d+\.|transformer\.encoder\.({_LAYERS}|final_layernorm\.)"
    r"|decoder\.",
    re.IGNORECASE,
)


def _is_projection(name: str) -> bool:
    if name.startswith("mixer."):
        return not encoder_of(name)
    return any(_PROJECTION.fullmatch(word) for word in name.split("."))


def _is_encoder(name: str) -> bool:
    return bool(encoder_of(name)) or (
        not name.startswith("mixer.")
        and not _is_projection(name)
        and any(_ENCODER.fullmatch(word) for word in name.split("."))
    )


def _is_decoder(name: str) -> bool:
    return bool(_DECODER.match(name)) and not _is_encoder(name) and not _is_projection(name)


OTHER = "other"
# A tensor is in at most one of encoders, projections and decoder. The other parts cut across them.
PARTS: dict[str, Callable[[str], bool]] = {
    "encoders": _is_encoder,
    "projections": _is_projection,
    "embeddings": lambda name: bool(_EMBEDDINGS.search(name)) and not _is_encoder(name) and not _is_projection(name),
    "decoder": _is_decoder,
    "norms": lambda name: bool(_NORM.search(name)),
    "attention": lambda name: bool(re.search(r"attention\.|\.(self_)?attn\.", name)),
    "feed_forward": lambda name: any(
        word in name for word in (".feed_forward.", ".mlp.", ".ffn.", ".block_sparse_moe.")
    ),
    "all": lambda name: True,
}

_RENAMED = {"towers": "encoders"}
"""An old name of a part -> its new name."""


def part_of(name: str) -> str:
    """Return the part of a tensor: an encoder's key, projections, embeddings, decoder or other."""
    if encoder := encoder_of(name):
        return encoder
    return next((part for part in ("encoders", "projections", "embeddings", "decoder") if PARTS[part](name)), OTHER)


def layer_of(name: str) -> int | None:
    """The decoder layer that a tensor belongs to, from 0 on."""
    match = _LAYER.search(name) if PARTS["decoder"](name) else None
    return int(match[1]) if match else None


@dataclass
class MixRule:
    """One entry of `rules`: a part or a glob pattern of names, perhaps some of the decoder's
    layers, and weights.

    Attributes:
        match: a part (`PARTS`), a pattern of names, or a list of them. Names are ours where the
            layout is known (decoder.layers.0.attention.wq.weight), else the file's; patterns fit
            either.
        layers: of the decoder, such as "8-15", "0-7,24-31" or "20-"; null: all tensors.
        weights: one for each checkpoint; or a list of such lists, a gradient over the layers (see
            `beta`).
        beta: the first of two weights; or a list: values at layers spread evenly from the first to
            the last layer that the rule fits, and straight lines between them. A gradient fits
            tensors of layers only.
    """

    match: Any = "all"
    layers: Optional[str] = None
    weights: Optional[list[Any]] = None
    beta: Any = None

    def anchors(self, where: str, check: Callable[[Sequence[float]], list[float]]) -> list[list[float]]:
        """The weights at points of a gradient, or those that hold everywhere.

        Raises:
            UserError: neither or both are given, or what they hold is no weights.
        """
        if (self.weights is None) == (self.beta is None):
            raise UserError(f"{where}: give either weights or beta")
        given: Any = self.weights
        if self.beta is not None:
            betas = self.beta if isinstance(self.beta, list) else [self.beta]
            if not betas or not all(_is_number(beta) for beta in betas):
                raise UserError(f"{where}.beta={self.beta} must be a number, or a list of numbers over the layers")
            given = [[beta, complement(beta)] for beta in betas]
        elif not given or not isinstance(given[0], list):
            given = [given]
        if not all(isinstance(point, list) and all(_is_number(value) for value in point) for point in given):
            raise UserError(f"{where}.weights={self.weights} must be numbers, or lists of them over the layers")
        try:
            return [check(point) for point in given]
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def complement(beta: float) -> float:
    """1 - beta as one would write it: 0.3 of 0.7, where binary numbers have 0.30000000000000004.

    Sums of 16-bit numbers often lie on ties, so the other 0.3 would round elsewhere: a mixture
    would depend on which of two checkpoints is named first.
    """
    return float(1 - Decimal(repr(float(beta))))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _layers(layers: str | None, where: str) -> Callable[[int | None], bool]:
    if layers is None:
        return lambda layer: True
    ranges = []
    for part in str(layers).split(","):
        if not (match := re.fullmatch(r"\s*(\d+)?\s*(?:(-)\s*(\d+)?\s*)?", part)) or not (match[1] or match[3]):
            raise UserError(f"{where}.layers='{layers}' must be layers of the decoder, such as 0-7,24-31 or 20-")
        low = int(match[1] or 0)
        high = int(match[3]) if match[3] else (math.inf if match[2] else low)
        if low > high:
            raise UserError(f"{where}.layers='{layers}': {low} is after {high:g}")
        ranges.append((low, high))
    return lambda layer: layer is not None and any(low <= layer <= high for low, high in ranges)


def _listed(match: Any) -> list[Any]:
    return match if isinstance(match, list) else [match]


def _matcher(match: Any, where: str) -> Callable[[str, str], bool]:
    """(our name, the file's name) -> whether it fits."""
    wanted = _listed(match)
    for item in wanted:
        if not isinstance(item, str):
            raise UserError(f"{where}.match={match} must be a part, a pattern of names, or a list of them")
        if item in _RENAMED:
            raise UserError(f"{where}.match={item} is called {_RENAMED[item]} now")
        if item not in PARTS and not set(item) & set("*?[."):
            raise UserError(f"{where}.match='{item}' is no part of a model and no pattern: {suggest(item, PARTS)}")
    return lambda name, key: any(
        PARTS[item](name) if item in PARTS else fnmatchcase(name, item) or fnmatchcase(key, item) for item in wanted
    )


@dataclass(frozen=True)
class RuleRow:
    """The result of one rule, or of the weights that hold for the rest."""

    label: str
    weights: tuple[list[float], ...]  # of a gradient those of the first and the last layer
    keys: tuple[str, ...]
    parts: bool = False  # whether it goes by parts of a model


def resolve(
    rules: Sequence[Mapping[str, Any]],
    otherwise: Sequence[float] | None,
    names: Mapping[str, str],
    check: Callable[[Sequence[float]], list[float]],
    said_as: str = "rules",
) -> tuple[dict[str, list[float]], list[RuleRow]]:
    """The weights of every tensor, and the table of where they come from.

    Args:
        otherwise: weights of tensors that no rule fits; None: every tensor must be fitted by one.
        names: the tensors' keys and our names of them.
        check: weights -> weights that may be used, or a `UserError`.
        said_as: the key that the user gave them as.

    Raises:
        UserError: a rule that cannot be, one that fits nothing (the ones before it take
            everything), a tensor that no rule fits.
    """
    chosen: dict[str, list[float]] = {}
    rows = []
    for number, values in enumerate(rules):
        where = f"{said_as}[{number}]"
        if not isinstance(values, Mapping):
            raise UserError(f"{where}={values} must be keys and values, such as {{match: norms, beta: 0.2}}")
        rule = build(MixRule, values, where)
        anchors, fits, layers = rule.anchors(where, check), _matcher(rule.match, where), _layers(rule.layers, where)
        gradient = len(anchors) > 1
        matched = [
            key
            for key, name in names.items()
            if fits(name, key) and layers(layer := layer_of(name)) and not (gradient and layer is None)
        ]
        keys = [key for key in matched if key not in chosen]
        if not keys:
            why = "rules before it take all of them" if matched else "no tensor is there"
            raise UserError(f"{where} (match={rule.match}, layers={rule.layers}) fits nothing: {why}")
        depths = [layer for key in matched if (layer := layer_of(names[key])) is not None]
        for key in keys:
            chosen[key] = _between(anchors, layer_of(names[key]), depths) if gradient else anchors[0]
        match = ", ".join(map(str, _listed(rule.match)))
        label = match if rule.layers is None else f"{match}, layers {rule.layers}"
        by_parts = rule.layers is not None or bool({*_listed(rule.match)} & (PARTS.keys() - {"all"}))
        rows.append(RuleRow(label, tuple(anchors if gradient else anchors[:1]), tuple(keys), by_parts))
    rest = [key for key in names if key not in chosen]
    if rest and otherwise is None:
        raise UserError(f"no rule fits '{rest[0]}' and {len(rest) - 1} more tensors: give weights or beta for the rest")
    if rest:
        assert otherwise is not None
        chosen |= {key: list(otherwise) for key in rest}
        rows.append(RuleRow("the rest" if rules else "everything", (list(otherwise),), tuple(rest)))
    return chosen, rows


def _between(anchors: list[list[float]], layer: int | None, depths: list[int]) -> list[float]:
    """Weights between anchors that lie evenly from the first to the last of `depths`."""
    assert layer is not None
    first, last = min(depths), max(depths)
    place = (layer - first) / (last - first) * (len(anchors) - 1) if last > first else 0.0
    index = min(int(place), len(anchors) - 2)
    share = place - index
    return [(1 - share) * a + share * b for a, b in zip(anchors[index], anchors[index + 1], strict=True)]


def rules_table(rows: Sequence[RuleRow], parameters: Mapping[str, int], models: int) -> Table:
    """The rules as they were understood; a gradient by its first and its last layer."""
    table = Table("tensors", title="Weights", title_justify="left")
    for model in range(models):
        table.add_column(str(model), justify="right")
    table.add_column("number", justify="right")
    table.add_column("parameters", justify="right")
    for row in rows:
        cells = [" → ".join(f"{point[i]:.4g}" for point in row.weights) for i in range(models)]
        count = sum(parameters[key] for key in row.keys)
        table.add_row(Text(row.label), *cells, f"{len(row.keys):,}", f"{count:,}")
    return table
