"""The reason why a path is no readable checkpoint, in one line that says what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import check_pointer

_ADAPTERS = ("adapter_config.json", "adapter_model*", "adapters.safetensors", "*lora_weights*", "non_lora_trainables*")
_UNMERGED = re.compile(r"[._]lora_", re.IGNORECASE)
_QUANTIZED_KEYS = ("quantization_config", "quantization", "compression_config", "quant_config")
_QUANTIZED_FILES = (
    *("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quanto_qmap.json"),
    *("quantization_map.json", "qmodel.pt"),
)
# AutoGPTQ, AWQ, bitsandbytes, compressed-tensors, FP8, HQQ; AQLM, VPTQ, SqueezeLLM, SpQR; quanto,
# torchao; MXFP4
_QUANTIZED_NAMES = re.compile(
    r"(^|\.)(qweight|qzeros|SCB|weight_packed|weight_scale(_inv)?|weight_zero_point|absmax|nested_absmax|quant_map|W_q)$"
    r"|\.(codebooks|centroids\.weight|lookup_table|dense_weights|weight\._data|\w+_blocks)$|\.tensor_impl\."
    r"|\.quant_state\."
)
_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt", "*.h5", "*.msgpack", "*.onnx")
_SHARDS = "model-*-of-*.safetensors"
MERGE = "merge it into its base first, with peft's `merge_and_unload()` and `save_pretrained(FOLDER)`"


def check_plain(folder: Path, config: Mapping[str, Any], names: Iterable[str], verb: str) -> None:
    """Whether a folder's tensors are the whole model, as plain numbers.

    Args:
        names: of its tensors.
        verb: what the user wants to do with it.

    Raises:
        UserError: they are quantized, or an adapter's, or an adapter lies beside them, or a file is
            an LFS pointer.
    """
    check_unquantized(folder, config, names, verb)
    if adapter := _first(folder, _ADAPTERS):
        raise UserError(f"'{folder}' has an adapter beside the model ({adapter}): {MERGE}, or move it elsewhere")
    if unmerged := next((name for name in names if _UNMERGED.search(name)), None):
        raise UserError(f"'{folder}' has an adapter's tensors in the model ('{unmerged}'): {MERGE}")
    for file in folder.iterdir():
        check_pointer(file)


def check_unquantized(folder: Path, config: Mapping[str, Any], names: Iterable[str], verb: str) -> None:
    """The first check of `check_plain`, which needs no weights.

    Raises:
        UserError: config.json, a file or a tensor's name says that weights are quantized.
    """
    if why := _quantized(folder, config) or next((f"'{name}'" for name in names if _QUANTIZED_NAMES.search(name)), ""):
        raise UserError(f"'{folder}' is a quantized model ({why}): {verb} what it was quantized from")


def _quantized(folder: Path, config: Mapping[str, Any], where: str = "config.json") -> str:
    """The key of config.json, or the file, that says that weights are quantized; "" if none does."""
    for key, value in config.items():
        if key in _QUANTIZED_KEYS and value:
            method = value.get("quant_method", "") if isinstance(value, Mapping) else ""
            return f"{where}.{key} {method}".strip()
        if isinstance(value, Mapping) and (why := _quantized(folder, value, f"{where}.{key}")):
            return why
    return _first(folder, _QUANTIZED_FILES)


def _first(folder: Path, patterns: Iterable[str]) -> str:
    """The name of a file in the folder that one of the patterns fits."""
    return next((file.name for pattern in patterns for file in sorted(folder.glob(pattern))), "")


def why_unreadable(path: Path, config: str) -> str:
    """Why `path` is no checkpoint, and what to do.

    Args:
        config: the name of the file that a checkpoint has.
    """
    if path.is_file():
        check_pointer(path)
        return f"it is a file: give its folder, which needs a {config}"
    if (path / config).is_file():
        return f"its {config} has no model_type, as Hugging Face's do: restore the file from its source"
    if adapter := _first(path, _ADAPTERS):
        return f"it is an adapter ({adapter}) without its model: {MERGE}"
    if weights := _first(path, _WEIGHTS):
        return f"it has weights ({weights}) but no {config}: expected a folder with {config}"
    return f"expected a folder with {config}"


def why_no_weights(folder: Path, wanted: str, index: str) -> str:
    """The line for a Hugging Face folder without `wanted`, and without shards in `index`."""
    if adapter := _first(folder, _ADAPTERS):
        return f"'{folder}' is an adapter ({adapter}) without its model: {MERGE}"
    if gguf := _first(folder, ("*.gguf",)):
        return f"'{folder}' cannot be read: it holds a GGUF file, give '{folder / gguf}' itself"
    if shard := _first(folder, (_SHARDS,)):
        return f"'{folder / index}' is missing, and there are shards such as {shard}: copy the checkpoint again, whole"
    if weights := _first(folder, _WEIGHTS):
        return f"'{folder / wanted}' is missing, and {weights} is not read: save the model as safetensors"
    return f"'{folder / wanted}' is missing: copy the checkpoint again, whole"
