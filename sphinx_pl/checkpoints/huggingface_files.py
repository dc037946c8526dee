"""Hugging Face's folders: which files are the model, and whether two hold weights of one: by their
configurations, and by how they cut text into tokens.

Programs and their versions write the same things differently, and fine-tuning scripts leave traces
of their own; what is compared is what weights depend on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sphinx_pl.checkpoints.families.keys import HARMLESS
from sphinx_pl.checkpoints.folder import CONFIG, INDEX, PROVENANCE, read_json, read_weight_map
from sphinx_pl.checkpoints.format import differences
from sphinx_pl.checkpoints.tokenizer_json import PROBES
from sphinx_pl.checkpoints.unreadable import why_no_weights
from sphinx_pl.utils.errors import UserError

WEIGHTS = "model.safetensors"
_OF = re.compile(r"-of-0*(\d+)\.")
# Beside the weights and the card, what a training run or a download left in the folder: files and
# folders.
_LEFTOVERS = (
    *("*.safetensors", "*.bin", "*.pth", "*.pt", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.index.json"),
    *("README*", PROVENANCE, "trainer_state.json", "*_results.json", "*.log", "*.zip", "*.tar", "*.tar.*"),
    *("*.tgz", "*.tfevents.*", ".*", "trainer_log.jsonl", "training_args.*", "latest", "zero_to_fp32.py"),
    *("checkpoint-*", "runs", "logs", "global_step*"),
)
# What cuts text, besides `_ALIKE`: compared byte by byte.
_VOCABULARIES = ("*.model", "*.spm", "*.tiktoken", "vocab.txt", "vocab.bpe", "bpe.codes", "tekken.json")


def is_huggingface(folder: Path) -> bool:
    """Whether it is a model's folder as transformers writes it."""
    return (folder / CONFIG).is_file() and isinstance(read_json(folder / CONFIG).get("model_type"), str)


def belongs(name: str) -> bool:
    """Whether a file of that name goes with the weights."""
    return not any(fnmatchcase(name, pattern) for pattern in _LEFTOVERS)


def weight_files(folder: Path) -> list[str]:
    """The names of its safetensors: the single file if there is one, as `from_pretrained` takes it,
    else the shards.

    Raises:
        UserError: its weights are pickles, in another format or missing, or the index does not name
            all shards.
    """
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if (folder / INDEX).is_file():
        named = sorted(set(read_weight_map(folder / INDEX).values()))
        total = max((int(match[1]) for name in named if (match := _OF.search(name))), default=0)
        if len(named) < total:
            raise UserError(f"'{folder / INDEX}' names {len(named)} of {total} shards: copy the folder again")
        return named
    if pickles := sorted(folder.glob("pytorch_model*.bin")):
        raise UserError(
            f"'{pickles[0]}' is not read: write the model again as safetensors, with its class's "
            f"from_pretrained('{folder}').save_pretrained(FOLDER)"
        )
    raise UserError(why_no_weights(folder, WEIGHTS, INDEX))


def config_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """In what two contents of config.json describe different models; "" in nothing."""
    if a["model_type"] != b["model_type"]:
        return f"{CONFIG}.model_type is {a['model_type']!r} and {b['model_type']!r}"
    differing = differences(_relevant(a), _relevant(b), CONFIG)
    if differing and (complete := _complete(a, b)):
        # One may leave out, or name as of old, what the other says. What the class doesn't know is
        # off unless it is on.
        x, y = ({key: value for key, value in _relevant(config).items() if value} for config in complete)
        differing = differences(x, y, CONFIG)
    return differing[0] if differing else ""


def _relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        str(key): _relevant(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not any(fnmatchcase(str(key), pattern) for pattern in HARMLESS)
    }


def _complete(*configs: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The installed transformers' version of each; nothing if it does not know the model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return [CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict() for config in configs]
    except Exception:  # whatever a configuration class makes of values that somebody else wrote
        return ()


def tokenizer_difference(a: Path, b: Path) -> str:
    """In which file two folders' tokenizers differ; "" if in none. Files that only one has are not
    compared.

    Raises:
        UserError: a file is damaged.
    """
    names = [file.name for pattern in _VOCABULARIES for file in a.glob(pattern)]
    for name in sorted({*names, *_ALIKE}):
        x, y = a / name, b / name
        if x.is_file() and y.is_file() and not _ALIKE.get(name, _same_bytes)(x, y):
            return name
    return ""


def other_files(a: Path, b: Path) -> str:
    """Which files beside the weights and config.json differ, or only one folder has, in a phrase;
    "" if none does.
    """
    x, y = (
        {file.name: file for file in folder.iterdir() if file.is_file() and belongs(file.name)} for folder in (a, b)
    )
    names = [name for name in sorted({*x, *y} - {CONFIG}) if not fnmatchcase(name, "LICENSE*")]
    differing = [name for name in names if name in x and name in y and not _alike(x[name], y[name])]
    phrases = {
        "differ": differing,
        f"only in '{a}'": [name for name in names if name not in y],
        f"only in '{b}', and left there": [name for name in names if name not in x],
    }
    return "; ".join(f"{', '.join(names)} ({phrase})" for phrase, names in phrases.items() if names)


def _alike(a: Path, b: Path) -> bool:
    """Whether two files say the same: JSON by its content, but for versions and places."""
    if _same_bytes(a, b):
        return True
    if a.suffix != ".json":
        return False
    x, y = read_json(a), read_json(b)
    keys = [key for key in {*x, *y} if not key.startswith("_") and key not in ("transformers_version", "name_or_path")]
    return all(x.get(key) == y.get(key) for key in keys)


def _same_bytes(a: Path, b: Path) -> bool:
    return a.read_bytes() == b.read_bytes()


def _same_json(a: Path, b: Path) -> bool:
    return read_json(a) == read_json(b)


def _same_lettering(a: Path, b: Path) -> bool:
    """Whether two tokenizer_config.json let BERT's relatives normalise a text alike."""
    x, y = read_json(a), read_json(b)
    keys = ("do_lower_case", "do_basic_tokenize", "strip_accents", "tokenize_chinese_chars")
    return not any(None not in (x.get(key), y.get(key)) and x[key] != y[key] for key in keys)


def _same_merges(a: Path, b: Path) -> bool:
    return _merges(a) == _merges(b)


def _same_pipeline(a: Path, b: Path) -> bool:
    return bool(_pipeline(a) == _pipeline(b)) and _cut_alike(a, b)


_ALIKE: dict[str, Callable[[Path, Path], bool]] = {
    "tokenizer.json": _same_pipeline,
    "vocab.json": _same_json,
    "added_tokens.json": _same_json,
    "merges.txt": _same_merges,
    "tokenizer_config.json": _same_lettering,
}


def _pipeline(path: Path) -> Any:
    """The vocabulary and the merges of a tokenizer.json."""
    content = read_json(path)
    try:
        model, added = content.get("model") or {}, content.get("added_tokens") or []
        # Of a pair as one word with a space, or as two: by the version.
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges") or ()]
        tokens = sorted((token["id"], token["content"]) for token in added)
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"'{path}' is damaged ({error!r}): fetch it again") from None
    return model.get("type", "BPE"), model.get("vocab"), merges, tokens


_CUTTING = ("normalizer", "pre_tokenizer", "model", "added_tokens")


def _cut_alike(a: Path, b: Path) -> bool:
    """Whether two tokenizer.json of one vocabulary cut text alike: they say so in the same words,
    or they do it.

    What they add to whole texts, decoding, and what follows a special token are left out: programs
    differ in them.
    """
    x, y = read_json(a), read_json(b)
    if all(x.get(key) == y.get(key) for key in _CUTTING):
        return True
    from tokenizers import Tokenizer

    ordinary = [token["content"] for token in x.get("added_tokens") or () if not token.get("special")]
    probes = [*PROBES, *(f"a {token} b{token}c" for token in ordinary)]
    try:
        first, second = (Tokenizer.from_file(str(path)) for path in (a, b))
        return all(
            first.encode(text, add_special_tokens=False).ids == second.encode(text, add_special_tokens=False).ids
            for text in probes
        )
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # its panics are no Exception
        return False


def _merges(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if not line.startswith("#version")]
