"""Released weights of vision encoders, read into ours from every layout that they are published in.

The file of a kind (`sphinx_pl.models.encoders`) has the names under which it is published, and what
published files hold beyond it: anything else is an error. The layout of a file is told from its
keys, not from its name. Names of models lead to files in the Hugging Face cache, which are then
read like local ones.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sphinx_pl.checkpoints.folder import read_json, read_weight_map
from sphinx_pl.checkpoints.tensors import SafetensorsFile, compare, copy_into
from sphinx_pl.checkpoints.torch_shards import TorchShards
from sphinx_pl.models.encoders.base import Encoder
from sphinx_pl.models.placement import allocate
from sphinx_pl.models.published import HUB, PublishedLayout, Source
from sphinx_pl.utils.errors import UserError, suggest
from sphinx_pl.utils.files import user_path

log = logging.getLogger(__name__)

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


class EncoderFiles:
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


def _shards(encoder: Encoder, index: Path) -> list[str]:
    """The files that `index` lists and that hold more than what the encoder leaves out."""
    weight_map = read_weight_map(index)
    layouts = encoder.published
    return sorted({s for name, s in weight_map.items() if not any(layout.leaves_out(name) for layout in layouts)})


def _local_files(encoder: Encoder, path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if name := next((name for name in (*_FILES, *_OPEN_CLIP_FILES) if (path / name).is_file()), None):
        return [path / shard for shard in _shards(encoder, path / name)] if name.endswith(_INDEX) else [path / name]
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
        declared: the entry of open_clip's table about the weights: `mean`, `std` and more.
    """

    id: str
    files: tuple[str, ...]
    declared: Mapping[str, Any] | None = None


def repository(encoder: Encoder, source: str) -> Repository | None:
    """Where `hf-hub:OWNER/NAME`, open_clip's or timm's names, or `OWNER/NAME` lead; None: nowhere."""
    files = (*_FILES, *_OPEN_CLIP_FILES) if encoder.open_clip_model else _FILES
    if source.startswith(HUB):
        return Repository(source.removeprefix(HUB), files)
    if encoder.open_clip_model:
        import open_clip

        architecture, _, tag = source.rpartition("/")
        declared = open_clip.get_pretrained_cfg(architecture or encoder.open_clip_model, tag)
        if hub := declared.get("hf_hub"):
            owner, name = hub.split("/")[:2]
            file = hub.split("/", 2)[2]
            return Repository(f"{owner}/{name}", (file,) if file else (*_OPEN_CLIP_FILES, *_FILES), declared)
        if architecture in open_clip.list_models():
            return None
    if encoder.timm_models and "/" not in source:
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


def _known_names(encoder: Encoder) -> list[str]:
    """The names of released weights of this encoder's architecture."""
    names = list(encoder.hub_models)
    if encoder.open_clip_model:
        import open_clip

        names += open_clip.list_pretrained_tags_by_model(encoder.open_clip_model)
    if encoder.timm_models:
        import timm

        names += timm.list_pretrained(encoder.timm_models)
    return names


def _hub_files(encoder: Encoder, found: Repository) -> list[Path]:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = [try_to_load_from_cache(found.id, name) for name in found.files]
    except HFValidationError as error:
        raise UserError(f"'{found.id}' is no name on the Hugging Face hub: it has the form OWNER/NAME") from error
    # What is cached is taken as it is: the same run has the same weights, with a network and without.
    first = next((Path(file) for file in cached if isinstance(file, str)), None) or _download(found.id, found.files)
    _fetch_settings(encoder, found.id, first)
    if not first.name.endswith(_INDEX):
        return [first]
    return [_download(found.id, [shard]) for shard in _shards(encoder, first)]


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


def find_files(encoder: Encoder, source: str) -> list[Path]:
    """The files that `source` stands for, downloaded where that is needed and possible.

    Args:
        source: a name that open_clip or timm know, a local file or folder, or `OWNER/NAME` on the Hugging Face hub.

    Raises:
        UserError: there are none.
    """
    path = user_path(source)
    found = repository(encoder, source)
    if found is not None and found.declared is not None:
        _check_trained_with(encoder, {"model_cfg": found.declared})
        _check_normalisation(encoder, found.declared)
    # A library's own name goes before a folder that happens to be called the same; OWNER/NAME is a folder first.
    if path.exists() and (found is None or found.id == source):
        return _local_files(encoder, path)
    if found is None:
        if path.suffix in (".safetensors", *_TORCH) or source.startswith(("/", ".", "~")):
            raise UserError("no such file: check the path, or leave `load` null for new weights")
        name = source if encoder.hub_models else source.rpartition("/")[2]
        raise UserError(f"neither a file nor a model's name, {suggest(name, _known_names(encoder))}")
    return _hub_files(encoder, found)


# -- how released weights were trained --------------------------------------------------------------------------------


def _fetch_settings(encoder: Encoder, repo: str, weights: Path) -> None:
    """Download the first of `settings_files` that the hub has beside the weights."""
    from huggingface_hub import hf_hub_download

    for name in encoder.settings_files:
        if (weights.parent / name).exists():
            return
        try:
            hf_hub_download(repo, name)
        except Exception as error:  # as in `_download`; the weights can be used without
            log.debug("%s of %s: %s", name, repo, error)


def _check_settings(encoder: Encoder, folder: Path) -> None:
    """Raises: UserError: a file says that the weights were trained with another configuration."""
    for name in encoder.settings_files:
        if (folder / name).is_file() and _check_trained_with(encoder, read_json(folder / name)):
            return


def _check_trained_with(encoder: Encoder, settings: Mapping[str, Any]) -> bool:
    """Whether `settings` say something about the encoder's configuration.

    Raises:
        UserError: the weights were trained with another value.
    """
    trained_with = encoder.trained_with(settings)
    for key, value in trained_with.items():
        if getattr(encoder.config, key) != value:
            text = str(value).lower() if isinstance(value, bool) else value
            raise UserError(f"these weights were trained with {key}={text}: set {encoder.config.section}.{key}={text}")
    return bool(trained_with)


def _check_normalisation(encoder: Encoder, declared: Mapping[str, Any]) -> None:
    """Warn of weights that were trained on images with another mean or deviation."""
    ours = {"mean": encoder.mean, "std": encoder.std}
    if any(tuple(declared.get(key, value)) != value for key, value in ours.items()):
        log.warning(
            "%s.load: these weights were trained on images normalised with mean %s and deviation %s, "
            "but this encoder normalises them with %s and %s", encoder.config.section, declared["mean"],
            declared["std"], encoder.mean, encoder.std,
        )  # fmt: skip


# -- into the encoder ------------------------------------------------------------------------------------------------


def recognise(encoder: Encoder, names: Iterable[str]) -> PublishedLayout:
    """The layout that most of `names` belong to.

    Raises:
        UserError: none of them belongs to any.
    """
    found, own = set(names), list(encoder.state_dict())

    def matching(layout: PublishedLayout) -> int:
        return len(found & {theirs for name in own for theirs in layout.source(name, encoder).names})

    layouts = encoder.published
    best = max(layouts, key=matching)
    if not matching(best):
        known = ", ".join(f"'{layout.source(own[0], encoder).names[0]}' ({layout.name})" for layout in layouts)
        some = min(found, default="")
        raise UserError(f"no key of these weights is this encoder's: one is '{some}', expected were such as {known}")
    return best


def match(encoder: Encoder, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Source]:
    """Our name -> where it comes from.

    Args:
        shapes: of all tensors of the weights.

    Raises:
        UserError: a key is missing, of another shape, or of nothing that the layout has.
    """
    layout = recognise(encoder, shapes)
    sources = {name: layout.source(name, encoder) for name in encoder.state_dict()}
    used = {theirs for source in sources.values() for theirs in source.names}
    found = {name: shape for name, shape in shapes.items() if name in used or not layout.leaves_out(name)}
    wanted: dict[str, tuple[int, ...]] = {}
    for name, value in encoder.state_dict().items():
        names = sources[name].names
        wanted |= {theirs: found.get(theirs, ()) for theirs in names}
        if all(theirs in found for theirs in names):
            made = sources[name].shape([found[theirs] for theirs in names])
            if made != tuple(value.shape):
                wanted[names[0]] = tuple(value.shape)
    if problem := compare(wanted, found):
        raise UserError(f"these weights, in {layout.name}'s layout, are not this encoder's: {problem}")
    return sources


def check_pretrained(encoder: Encoder, source: str) -> tuple[EncoderFiles, dict[str, Source]]:
    """What `load_pretrained` would read into `encoder`, also on the meta device. Raises as it does."""
    try:
        files = find_files(encoder, source)
        _check_settings(encoder, files[0].parent)
        weights = EncoderFiles(files)
        return weights, match(encoder, weights.shapes)
    except UserError as error:
        raise UserError(f"{encoder.config.section}.load={source}: {error}") from error


def pretrained_values(encoder: Encoder, source: str) -> Callable[[str], Tensor]:
    """Name of a tensor of `encoder`, also on the meta device -> its released value, read then.

    Arguments and errors are those of `load_pretrained`.
    """
    weights, sources = check_pretrained(encoder, source)

    def value(name: str) -> Tensor:
        return sources[name].make(*(weights.tensor(theirs) for theirs in sources[name].names))

    return value


def load_pretrained(encoder: Encoder, source: str) -> None:
    """Fill `encoder` with released weights, a tensor at a time; its meta tensors get to the CPU.

    Nothing is written before all names and shapes are known to be right.

    Args:
        source: see `find_files`; the layouts are `Encoder.published`.

    Raises:
        UserError: nothing found under `source`, a file that is damaged or holds more than tensors, or weights that are
            not this encoder's.
    """
    value = pretrained_values(encoder, source)
    if any(tensor.is_meta for tensor in encoder.state_dict().values()):
        allocate(encoder, "cpu")
    copy_into(encoder.state_dict(), ((name, value(name)) for name in encoder.state_dict()))
