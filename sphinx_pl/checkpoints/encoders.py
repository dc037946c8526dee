"""Released weights of the towers, read into ours from every layout that they are published in.

A layout is a rule from our names to those of its files. Which one a file has is told from its keys, not from its name;
what it holds beyond the tower (a text encoder, a classifier, a language model) is named here too, so that anything else
is an error. Names of models resolve through the Hugging Face cache to files, which are then read like local ones.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphinx_pl.checkpoints.folder import read_json, read_weight_map
from sphinx_pl.checkpoints.hub import HUB
from sphinx_pl.checkpoints.tensors import SafetensorsFile, Source, compare, copy_into
from sphinx_pl.checkpoints.torch_shards import TorchShards
from sphinx_pl.models.encoders import ClipViT, Dinov2, QFormer, Tower, resample_positions
from sphinx_pl.models.views import CLIP_MEAN, CLIP_STD
from sphinx_pl.utils.errors import UserError, suggest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """One way in which a tower is published.

    Args:
        name: for messages.
        source: (our name, tower) -> their names.
        unused: regular expressions for what their files hold beyond the tower.
    """

    name: str
    source: Callable[[str, Any], Source]
    unused: tuple[str, ...] = ()

    def leaves_out(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.unused)


# -- names -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """Renames a transformer's tensors, ours -> theirs, by whole names or by what stands before `.weight`."""

    top: Mapping[str, str]
    block: str
    parts: Mapping[str, str]

    def __call__(self, name: str) -> str:
        if match := re.search(r"(?:blocks|layers)\.(\d+)\.(.+)", name):
            return f"{self.block}.{match[1]}.{_renamed(match[2], self.parts)}"
        return _renamed(name, self.top)


def _renamed(name: str, table: Mapping[str, str]) -> str:
    stem, _, leaf = name.rpartition(".")
    return table[name] if name in table else f"{table[stem]}.{leaf}"


def _own(name: str, tower: Tower) -> Source:
    return Source((name,))


def _behind(prefix: str) -> Callable[[str, Tower], Source]:
    """`model.x` of ours is `<prefix>x` of theirs."""
    return lambda name, tower: Source((prefix + name.removeprefix("model."),))


# -- CLIP ------------------------------------------------------------------------------------------------------------

_HF_CLIP = Names(
    {
        "class_embedding": "vision_model.embeddings.class_embedding",
        "positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "conv1": "vision_model.embeddings.patch_embedding",
        "ln_pre": "vision_model.pre_layrnorm",
        "ln_post": "vision_model.post_layernorm",
    },
    "vision_model.encoder.layers",
    {
        "ln_1": "layer_norm1",
        "attn.in_proj_weight": "self_attn.{}_proj.weight",
        "attn.in_proj_bias": "self_attn.{}_proj.bias",
        "attn.out_proj": "self_attn.out_proj",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    },
)
_TIMM_CLIP = Names(
    {
        "class_embedding": "cls_token",
        "positional_embedding": "pos_embed",
        "conv1": "patch_embed.proj",
        "ln_pre": "norm_pre",
        "ln_post": "norm",
    },
    "blocks",
    {
        "ln_1": "norm1",
        "attn.in_proj_weight": "attn.qkv.weight",
        "attn.in_proj_bias": "attn.qkv.bias",
        "attn.out_proj": "attn.proj",
        "ln_2": "norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    },
)


def _huggingface_clip(name: str, tower: ClipViT) -> Source:
    theirs = _HF_CLIP(name.removeprefix("model."))
    if "{}" not in theirs:
        return Source((theirs,))
    return Source(tuple(theirs.format(kind) for kind in "qkv"), _joined)


def _timm_clip(name: str, tower: ClipViT) -> Source:
    theirs = _TIMM_CLIP(name.removeprefix("model."))
    if theirs == "cls_token":
        return Source((theirs,), lambda token: token.flatten())
    return Source((theirs,), (lambda positions: positions.squeeze(0)) if theirs == "pos_embed" else _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _joined(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


_RESBLOCK = r"transformer\.resblocks\.\d+\.(ln_[12]|attn\.out_proj|mlp\.c_fc|mlp\.c_proj)\.(weight|bias)"
# open_clip's text encoder, by itself or (its newer models) behind `text.`; the last three are in OpenAI's files.
_TEXT_SIDE = (
    r"(text\.)?(positional_embedding|text_projection|attn_mask|token_embedding\.weight|ln_final\.(weight|bias))",
    rf"(text\.)?{_RESBLOCK}",
    r"(text\.)?transformer\.resblocks\.\d+\.attn\.in_proj_(weight|bias)",
    r"logit_scale|logit_bias",
    r"input_resolution|context_length|vocab_size",
)

# -- DINOv2 ----------------------------------------------------------------------------------------------------------


def _positions(tower: Dinov2) -> Callable[[Tensor], Tensor]:
    """Onto the patches' grid, once, where the configuration gives the embedding no grid of its own."""
    config = tower.config
    return _same if config.position_grid else lambda positions: resample_positions(positions, config.grid)


def _timm_dinov2(name: str, tower: Dinov2) -> Source:
    theirs = name.removeprefix("model.")
    return Source((theirs,), _positions(tower) if theirs == "pos_embed" else _same)


def _meta_dinov2(name: str, tower: Dinov2) -> Source:
    source = _timm_dinov2(name, tower)
    theirs = source.names[0].replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3.")
    return Source((theirs,), source.make)


_HF_DINOV2 = Names(
    {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    },
    "encoder.layer",
    {
        "norm1": "norm1",
        "attn.qkv": "attention.attention.{}",
        "attn.proj": "attention.output.dense",
        "ls1.gamma": "layer_scale1.lambda1",
        "norm2": "norm2",
        "mlp.fc1": "mlp.weights_in",
        "mlp.fc2": "mlp.weights_out",
        "ls2.gamma": "layer_scale2.lambda1",
    },
)


def _huggingface_dinov2(name: str, tower: Dinov2) -> Source:
    theirs = _HF_DINOV2(name.removeprefix("model."))
    if "{}" in theirs:
        return Source(tuple(theirs.format(kind) for kind in ("query", "key", "value")), _joined)
    return Source((theirs,), _positions(tower) if name == "model.pos_embed" else _same)


# -- BLIP-2 ----------------------------------------------------------------------------------------------------------

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


def _lavis(name: str, tower: QFormer, vit: str = "visual_encoder.") -> Source:
    """LAVIS, of which BLIP-2 is a part. Its ViT has biases for queries and values only.

    Args:
        vit: what stands before the ViT's names: nothing in eva_vit_g.pth, which LAVIS's own files leave it in.
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

# The first of equals is taken.
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "clip": (
        Layout("ours", _own),
        Layout("open_clip", _behind("visual."), (r"visual\.proj", *_TEXT_SIDE)),
        Layout(
            "transformers",
            _huggingface_clip,
            (r"text_model\..+", r"(text|visual)_projection\.weight", "logit_scale", r".+\.position_ids"),
        ),
        Layout("timm", _timm_clip, (r"head\.(weight|bias)",)),
    ),
    "convnext": (
        Layout("ours", _own),
        Layout(
            "open_clip",
            _behind("visual.trunk."),
            (r"visual\.head\.(proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)", *_TEXT_SIDE),
        ),
        Layout("timm", _behind(""), (r"head\.(fc|pre_logits\.fc)\.(weight|bias)",)),
    ),
    "dinov2": (
        Layout("ours", _own),
        Layout("timm", _timm_dinov2, ("mask_token",)),
        Layout("Meta", _meta_dinov2, ("mask_token",)),
        Layout("transformers", _huggingface_dinov2, (r"embeddings\.mask_token",)),
    ),
    "qformer": (
        # Ours, and transformers', whose modules the tower is made of.
        Layout("transformers", _own, (r"language_model\..+", r"language_projection\.(weight|bias)")),
        Layout("LAVIS", _lavis, _LAVIS_UNUSED),
        Layout("LAVIS with eva_vit_g.pth", partial(_lavis, vit=""), _LAVIS_UNUSED),
    ),
}

# -- files -----------------------------------------------------------------------------------------------------------

_OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_INDEX = ".index.json"
_FILES = (
    "model.safetensors",
    f"model.safetensors{_INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{_INDEX}",
)
_TORCH = (".bin", ".pt", ".pth")


class TowerFiles:
    """The tensors of one or more files by name, mapped into memory and read one at a time.

    Raises:
        UserError: a file is damaged or holds something else than tensors, or two hold the same name.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._readers: dict[str, Callable[[str], Tensor]] = {}
        for path in files:
            if path.suffix == ".safetensors":
                shards = SafetensorsFile(path)
                found = {name: shards.info(name).shape for name in shards.keys}
                reader = shards.tensor
            else:
                saved = TorchShards([path], _state_dict)
                found = {name: saved.info(name).shape for name in saved}
                reader = saved.tensor
            if twice := sorted(found.keys() & self.shapes.keys()):
                raise UserError(f"'{path}' holds '{twice[0]}', as another file does: give one of them")
            self.shapes |= found
            self._readers |= dict.fromkeys(found, reader)

    def tensor(self, name: str) -> Tensor:
        return self._readers[name](name)


def _state_dict(content: Any) -> Any:
    """What a training checkpoint wraps around the tensors is taken off."""
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if isinstance(content, dict) and content and all(str(name).startswith("module.") for name in content):
        return {name.removeprefix("module."): value for name, value in content.items()}
    return content


def _shards(tower: Tower, index: Path) -> list[str]:
    """Those that `index` lists and that hold more than what the tower leaves out."""
    weight_map = read_weight_map(index)
    layouts = LAYOUTS[tower.key]
    return sorted({s for name, s in weight_map.items() if not any(layout.leaves_out(name) for layout in layouts)})


def _local_files(tower: Tower, path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if name := next((name for name in (*_FILES, *_OPEN_CLIP_FILES) if (path / name).is_file()), None):
        return [path / shard for shard in _shards(tower, path / name)] if name.endswith(_INDEX) else [path / name]
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", *_TORCH))
    if not files:
        raise UserError(f"no weights in this folder: expected {', '.join(_FILES)}, or *.safetensors, *.pth")
    return files


# -- names of models -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Repository:
    """Where on the Hugging Face hub a name leads.

    Args:
        files: in the order in which they are looked for.
        declared: what open_clip's table says about the weights: `quick_gelu`, `mean`, `std`.
    """

    id: str
    files: tuple[str, ...]
    declared: Mapping[str, Any] | None = None


def repository(tower: Tower, source: str) -> Repository | None:
    """Of `hf-hub:OWNER/NAME`, of a tag in open_clip's or timm's own tables, else of `OWNER/NAME`; None: not a name."""
    by_open_clip = tower.key in ("clip", "convnext")
    files = (*_FILES, *_OPEN_CLIP_FILES) if by_open_clip else _FILES
    if source.startswith(HUB):
        return Repository(source.removeprefix(HUB), files)
    if by_open_clip:
        import open_clip

        architecture, _, tag = source.rpartition("/")
        declared = open_clip.get_pretrained_cfg(architecture or "ViT-L-14", tag)
        if hub := declared.get("hf_hub"):
            owner, name = hub.split("/")[:2]
            file = hub.split("/", 2)[2]
            return Repository(f"{owner}/{name}", (file,) if file else (*_OPEN_CLIP_FILES, *_FILES), declared)
        if architecture in open_clip.list_models():
            return None
    if tower.key != "qformer" and "/" not in source:
        import timm

        try:
            config = timm.get_pretrained_cfg(source)
        except RuntimeError:  # the model is one of timm's, the tag is not
            return None
        if config is not None and config.hf_hub_id:
            return Repository(config.hf_hub_id, (config.hf_hub_filename,) if config.hf_hub_filename else files)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and Path(source).suffix not in (".safetensors", *_TORCH):
        return Repository(source, files)
    return None


def _known_names(tower: Tower) -> list[str]:
    """What the libraries have under this tower's architecture."""
    if tower.key == "clip":
        import open_clip

        return list(open_clip.list_pretrained_tags_by_model("ViT-L-14"))
    if tower.key == "qformer":
        return ["Salesforce/blip2-opt-2.7b", "Salesforce/blip2-flan-t5-xl"]
    import timm

    pattern = {"convnext": "convnext_xxlarge*", "dinov2": "vit_giant_patch14_dinov2*"}[tower.key]
    return list(timm.list_pretrained(pattern))


def _hub_files(tower: Tower, found: Repository) -> list[Path]:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = [try_to_load_from_cache(found.id, name) for name in found.files]
    except HFValidationError as error:
        raise UserError(f"'{found.id}' is no name on the Hugging Face hub: it has the form OWNER/NAME") from error
    # What is cached is taken as it is: the same run has the same weights, with a network and without.
    first = next((Path(file) for file in cached if isinstance(file, str)), None) or _download(found.id, found.files)
    if tower.key == "clip":
        _fetch_configs(found.id, first)
    if not first.name.endswith(_INDEX):
        return [first]
    return [_download(found.id, [shard]) for shard in _shards(tower, first)]


def _download(repo: str, names: Sequence[str]) -> Path:
    """The first of `names` that the repository has, in the cache or downloaded to it."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    reason = "it has none of these files"
    for name in names:
        try:
            return Path(hf_hub_download(repo, name))
        except LocalEntryNotFoundError:
            reason = "no network, or HF_HUB_OFFLINE is set"
            break
        except EntryNotFoundError:
            continue
        except Exception as error:  # of many libraries: no such model, no access, a connection that breaks off
            reason = type(error).__name__
            break
    what = names[0] if len(names) == 1 else "--include '*.safetensors' '*.json'"
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    raise UserError(
        f"looked for {' or '.join(names)} of {repo}: neither in the cache, {folder}, nor downloadable ({reason}): "
        f'run "hf download {repo} {what}" where there is a network and copy that folder here, '
        "or give the path of a local file"
    )


def find_files(tower: Tower, source: str) -> list[Path]:
    """The files that `source` stands for, downloaded where that is needed and possible.

    Args:
        source: a name that open_clip or timm know, a local file or folder, or `OWNER/NAME` on the Hugging Face hub.

    Raises:
        UserError: there are none.
    """
    path = Path(source).expanduser()
    found = repository(tower, source)
    if found is not None and found.declared is not None:
        _check_declared(tower, found.declared)
    # A library's own name goes before a folder that happens to be called the same; OWNER/NAME is a folder first.
    if path.exists() and (found is None or found.id == source):
        return _local_files(tower, path)
    if found is None:
        if path.suffix in (".safetensors", *_TORCH) or source.startswith(("/", ".", "~")):
            raise UserError("no such file: check the path, or leave `load` null for new weights")
        name = source if tower.key == "qformer" else source.rpartition("/")[2]
        raise UserError(f"neither a file nor a model's name, {suggest(name, _known_names(tower))}")
    return _hub_files(tower, found)


# -- CLIP's activation and normalisation -----------------------------------------------------------------------------

_CONFIGS = ("open_clip_config.json", "config.json")


def _fetch_configs(repo: str, weights: Path) -> None:
    """Beside weights from the hub: they say which activation CLIP was trained with. Not all repositories have them."""
    from huggingface_hub import hf_hub_download

    for name in _CONFIGS:
        if (weights.parent / name).exists():
            return
        try:
            hf_hub_download(repo, name)
        except Exception as error:  # as in `_download`; the weights can be used without
            log.debug("%s of %s: %s", name, repo, error)


def _trained_with_quick_gelu(folder: Path) -> bool | None:
    """What open_clip's or transformers' configuration beside the weights says; None: nothing."""
    open_clip, transformers = (folder / name for name in _CONFIGS)
    if open_clip.is_file() and isinstance(config := read_json(open_clip).get("model_cfg"), dict):
        return bool(config.get("quick_gelu", False))
    if transformers.is_file():
        config = read_json(transformers)
        config = config.get("vision_config", config)
        activation = config.get("hidden_act") if isinstance(config, dict) else None
        return activation == "quick_gelu" if activation in ("quick_gelu", "gelu") else None
    return None


def _check_gelu(tower: ClipViT, trained_with: bool) -> None:
    if tower.config.quick_gelu != trained_with:
        raise UserError(
            f"these weights were trained with {'QuickGELU' if trained_with else 'exact GELU'}: "
            f"set model.vision.clip.quick_gelu={str(trained_with).lower()}"
        )


def _check_declared(tower: Tower, declared: Mapping[str, Any]) -> None:
    if isinstance(tower, ClipViT):
        _check_gelu(tower, declared.get("quick_gelu", False))
    if any(tuple(declared.get(key, ours)) != ours for key, ours in (("mean", CLIP_MEAN), ("std", CLIP_STD))):
        log.warning(
            "model.vision.%s.load: these weights were trained on images normalised with mean %s and deviation %s, "
            "but towers here get CLIP's", tower.key, declared["mean"], declared["std"],
        )  # fmt: skip


# -- into the tower --------------------------------------------------------------------------------------------------


def recognise(tower: Tower, names: Iterable[str]) -> Layout:
    """The layout that most of `names` belong to.

    Raises:
        UserError: none of them belongs to any.
    """
    found, own = set(names), list(tower.state_dict())

    def matching(layout: Layout) -> int:
        return len(found & {theirs for name in own for theirs in layout.source(name, tower).names})

    layouts = LAYOUTS[tower.key]
    best = max(layouts, key=matching)
    if not matching(best):
        known = ", ".join(f"'{layout.source(own[0], tower).names[0]}' ({layout.name})" for layout in layouts)
        some = min(found, default="")
        raise UserError(f"no key of these weights is this tower's: one is '{some}', expected were such as {known}")
    return best


def match(tower: Tower, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Source]:
    """Our name -> where it comes from.

    Args:
        shapes: of all tensors of the weights.

    Raises:
        UserError: a key is missing, of another shape, or of nothing that the layout has.
    """
    layout = recognise(tower, shapes)
    sources = {name: layout.source(name, tower) for name in tower.state_dict()}
    used = {theirs for source in sources.values() for theirs in source.names}
    found = {name: shape for name, shape in shapes.items() if name in used or not layout.leaves_out(name)}
    wanted: dict[str, tuple[int, ...]] = {}
    for name, value in tower.state_dict().items():
        names = sources[name].names
        wanted |= {theirs: found.get(theirs, ()) for theirs in names}
        if all(theirs in found for theirs in names):
            made = sources[name].shape([found[theirs] for theirs in names])
            if made != tuple(value.shape):
                wanted[names[0]] = tuple(value.shape)
    if problem := compare(wanted, found):
        raise UserError(f"these weights, in {layout.name}'s layout, are not this tower's: {problem}")
    return sources


def check_pretrained(tower: Tower, source: str) -> tuple[TowerFiles, dict[str, Source]]:
    """What `load_pretrained` would read into `tower`, which may be on the meta device. Raises as that does."""
    try:
        files = find_files(tower, source)
        if isinstance(tower, ClipViT) and (trained_with := _trained_with_quick_gelu(files[0].parent)) is not None:
            _check_gelu(tower, trained_with)
        weights = TowerFiles(files)
        return weights, match(tower, weights.shapes)
    except UserError as error:
        raise UserError(f"model.vision.{tower.key}.load={source}: {error}") from error


def pretrained_values(tower: Tower, source: str) -> Callable[[str], Tensor]:
    """Name of a tensor of `tower` (which may be on the meta device) -> its released value, read when it is asked for.

    Arguments and errors are those of `load_pretrained`.
    """
    weights, sources = check_pretrained(tower, source)

    def value(name: str) -> Tensor:
        return sources[name].make(*(weights.tensor(theirs) for theirs in sources[name].names))

    return value


def load_pretrained(tower: Tower, source: str) -> None:
    """Fill `tower` (its meta tensors too, on the CPU then) with released weights, one tensor at a time.

    Nothing is written before all names and shapes are known to be right.

    Args:
        source: see `find_files`; the layouts are `LAYOUTS`.

    Raises:
        UserError: nothing found under `source`, a file that is damaged or holds more than tensors, or weights that are
            not this tower's.
    """
    value = pretrained_values(tower, source)
    if any(tensor.is_meta for tensor in tower.state_dict().values()):
        tower.to_empty(device="cpu")
    copy_into(tower.state_dict(), ((name, value(name)) for name in tower.state_dict()))
