"""Hugging Face's folders: which files are the model, and whether two hold weights of one: by their configurations, and
by how they cut text into tokens.

Programs and their versions write the same things differently, and fine-tuning scripts leave traces of their own; what
is compared is what weights depend on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sphinx_pl.checkpoint.format import CONFIG, INDEX, TOKENIZER, differences, read_json, read_weight_map
from sphinx_pl.errors import UserError

WEIGHTS = "model.safetensors"
# Of a config.json: how a model is trained, cut short, shown or stored. None changes what a weight means.
_HARMLESS = (
    *("_*", "name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "auto_map", "unsloth_*"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "use_cache", "max_position_embeddings", "max_length"),
    *("initializer_*", "*drop*", "gradient_checkpointing", "pretraining_tp", "attn_implementation", "output_*"),
    "return_dict",
)
# Files of a model apart from its weights and its card; what a training run or a download left beside them are none.
_FILES = (
    *("*config*.json", "*token*.json", "*.model", "vocab.*", "merges.txt", "*.tiktoken", "tekken.json"),
    *("chat_template*", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)


def belongs(name: str) -> bool:
    """Whether a file of that name goes with the weights."""
    return any(fnmatchcase(name, pattern) for pattern in _FILES)


def weight_files(folder: Path) -> list[str]:
    """The names of its safetensors.

    Raises:
        UserError: its weights are pickles.
    """
    if (folder / INDEX).is_file():
        return sorted(set(read_weight_map(folder / INDEX).values()))
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if pickles and not (folder / WEIGHTS).is_file():
        raise UserError(
            f"'{pickles[0]}' is not read: write the model anew as safetensors, with its class's "
            f"from_pretrained('{folder}').save_pretrained(FOLDER)"
        )
    return [WEIGHTS]


def config_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """In what two contents of config.json describe different models; "" in nothing."""
    differing = differences(_relevant(a), _relevant(b), CONFIG)
    if differing and a["model_type"] == b["model_type"]:
        # One may leave out, or name as of old, what the other says.
        a, b = _complete(a, b)
        differing = differences(_relevant(a), _relevant(b), CONFIG)
    return differing[0] if differing else ""


def _relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        str(key): _relevant(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not any(fnmatchcase(str(key), pattern) for pattern in _HARMLESS)
    }


def _complete(*configs: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """With the defaults and under the key names of the installed transformers, if it knows the model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return [CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict() for config in configs]
    except Exception:  # whatever a configuration class makes of values that somebody else wrote
        return configs


def tokenizer_difference(a: Path, b: Path) -> str:
    """In which file two folders' tokenizers differ; "" if in none. Files that only one has are not compared.

    Raises:
        UserError: a file is damaged.
    """
    readers = {TOKENIZER: Path.read_bytes, "tokenizer.json": _pipeline, "vocab.json": read_json, "merges.txt": _merges}
    names = {file.name for folder in (a, b) for file in folder.glob("*.model")} | {*readers, "vocab.txt"}
    for name in sorted(names):
        if (a / name).is_file() and (b / name).is_file():
            read = readers.get(name, Path.read_bytes)
            if read(a / name) != read(b / name):
                return name
    return ""


def _pipeline(path: Path) -> Any:
    """What a tokenizer.json does with text. What it adds to whole texts, and decoding, are left out."""
    content = read_json(path)
    model, added = content.get("model"), content.get("added_tokens") or []
    try:
        model = {"type": "BPE"} | {key: value for key, value in (model or {}).items() if value not in (None, False)}
        # Of a pair as one word with a space, or as two: by the version.
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges") or ()]
        tokens = sorted((token["id"], token["content"]) for token in added)
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"'{path}' is damaged ({error!r}): fetch it again") from None
    return model | {"merges": merges}, tokens, content.get("normalizer"), content.get("pre_tokenizer")


def _merges(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if not line.startswith("#version")]
