"""GGUF files of llama.cpp: decoders whose weights may be quantized. They are read as plain numbers.

The metadata is translated to the keys of a config.json, and the tensors' names to those of the
family in Hugging Face's layout, so that one reader serves both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sphinx_pl.checkpoints.families import FAMILIES
from sphinx_pl.checkpoints.families.base import half_split
from sphinx_pl.checkpoints.format import FORMATS
from sphinx_pl.checkpoints.huggingface import FamilyCheckpoint, read_decoder
from sphinx_pl.checkpoints.tensors import TensorInfo, TensorReader
from sphinx_pl.data.tokenizers import find_tokenizer
from sphinx_pl.utils.errors import UserError, suggest


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp writes a family.

    Attributes:
        family: its name in `FAMILIES`.
        paired: whether rotary channels are pairs in the file, not halves.
    """

    family: str
    paired: bool


ARCHITECTURES = {
    "llama": Architecture("llama", paired=True),
    "qwen2": Architecture("qwen2", paired=False),
    "qwen3": Architecture("qwen3", paired=False),
}
_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
"""Metadata of an architecture -> keys of a config.json."""
_SAME_AS_HEAD = ("attention.value_length", "rope.dimension_count")
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_up": "mlp.up_proj",
}
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
_ROTARY_DIVISORS = "rope_freqs.weight"
_DIGITS_FIRST = ("smollm", "starcoder", "refact")
"""Kinds of pre-tokenizer that cut off each digit and then cut as GPT-2's, which transformers does
not know.
"""
_CUTS = (
    *("default", "gpt-2", "llama-bpe", "llama3", "llama-v3", "qwen2", "deepseek-r1-qwen", "tekken", *_DIGITS_FIRST),
)


def _translated(name: str) -> str:
    """llama.cpp's name of a tensor -> the family's; an unknown one stays."""
    if not (match := _NAME.fullmatch(name)):
        return name
    layer, stem, leaf = match.groups()
    if layer is None:
        return f"{_TOP[stem]}.{leaf}" if stem in _TOP else name
    return f"model.layers.{layer}.{_LAYER[stem]}.{leaf}" if stem in _LAYER else name


class GGUFTensors(TensorReader):
    """The tensors of a GGUF file as the `gguf` library dequantizes them, under the family's names.

    Tensors in float16 and bfloat16 stay so, all others are float32.

    Args:
        tensors: the library's, by the family's names.
        heads: heads of queries and of keys if rotary channels are pairs in the file.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Any], heads: Mapping[str, int]) -> None:
        self.path, self._tensors, self._heads = path, tensors, heads

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        dtypes = {"F16": torch.float16, "BF16": torch.bfloat16}
        shape = tuple(int(size) for size in reversed(tensor.shape))
        return TensorInfo(shape, dtypes.get(tensor.tensor_type.name, torch.float32))

    def tensor(self, name: str) -> Tensor:
        """Raises: UserError: the library does not dequantize the tensor's type."""
        from gguf import dequantize

        tensor, info = self._tensors[name], self.info(name)
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            kind = tensor.tensor_type.name
            raise UserError(f"'{self.path}': '{name}' of type {kind} cannot be dequantized ({error})") from None
        rows = torch.from_numpy(np.array(values, np.float32)).to(info.dtype).view(info.shape)
        heads = next((count for part, count in self._heads.items() if f".{part}." in name), 0)
        return half_split(rows, heads) if heads else rows


class GGUFCheckpoint(FamilyCheckpoint):
    """One file of an architecture in `ARCHITECTURES`."""

    @classmethod
    def matches(cls, path: Path) -> bool:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = self._reader()
        self._metadata: dict[str, Any] = {name: field.contents for name, field in reader.fields.items()}
        name = str(self._value("general.architecture"))
        if name not in ARCHITECTURES:
            raise UserError(
                f"'{path}': architecture '{name}' cannot be read from GGUF: {suggest(name, ARCHITECTURES)}; take the "
                "model that it was made from, in safetensors"
            )
        if self._value("split.count", 1) != 1:
            raise UserError(f"'{path}' is one of several files of a model: merge them first, with llama-gguf-split")
        tensors = {_translated(tensor.name): tensor for tensor in reader.tensors}
        architecture = ARCHITECTURES[name]
        family = FAMILIES[architecture.family]
        values = self._config(name, tensors)
        decoder = read_decoder(family, values, path)
        kinds = sorted({tensor.tensor_type.name for tensor in tensors.values()} - {"F32", "F16", "BF16"})
        self.provenance = {"original": family.name}
        if kinds:
            self.provenance["note"] = f"the weights were quantized ({', '.join(kinds)}) and are read as float32"
        heads = {"q_proj": decoder.heads, "k_proj": decoder.kv_heads} if architecture.paired else {}
        tensors.pop(_ROTARY_DIVISORS, None)
        self._open(family, decoder, GGUFTensors(path, tensors, heads))

    def _reader(self) -> Any:
        """Raises: UserError: the library is missing, or the file is damaged."""
        try:
            from gguf import GGUFReader
        except ImportError:
            raise UserError(f"'{self.path}' is read with the package gguf: pip install 'sphinx-pl[gguf]'") from None
        try:
            return GGUFReader(self.path)
        except Exception as error:  # whatever the library makes of a damaged file
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"'{self.path}' is not a GGUF file that can be read ({why}): fetch it again") from None

    def _value(self, key: str, default: Any = None) -> Any:
        """The value of a key of the metadata.

        Raises:
            UserError: it cannot be read.
        """
        if key not in self._metadata:
            return default
        try:
            value = self._metadata[key]()
        except Exception as error:  # whatever the library makes of a damaged field
            raise UserError(f"'{self.path}': {key} cannot be read ({error}): fetch the file again") from None
        # A float32 stands for the shortest decimal that rounds to it: 1e-5, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if isinstance(value, float) and np.float32(value) == value else value

    def _config(self, architecture: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The metadata as a config.json of the family.

        Raises:
            UserError: a key that changes what the model computes is not read here.
        """
        prefix = f"{architecture}."
        own = {key.removeprefix(prefix): self._value(key) for key in self._metadata if key.startswith(prefix)}
        values = {theirs: own.pop(key) for key, theirs in _KEYS.items() if key in own}
        embedding = tensors.get("model.embed_tokens.weight")
        if embedding is None or any(len(tensor.shape) not in (1, 2) for tensor in tensors.values()):
            raise UserError(f"'{self.path}' does not hold the matrices of a decoder: fetch it again")
        values |= {"vocab_size": int(embedding.shape[-1]), "tie_word_embeddings": "lm_head.weight" not in tensors}
        own.pop("vocab_size", None)
        heads = values.get("num_attention_heads")
        if isinstance(heads, int) and heads > 0:
            head_dim = values.get("head_dim") or values.get("hidden_size", 0) // heads
            own = {key: value for key, value in own.items() if key not in _SAME_AS_HEAD or value != head_dim}
        if own.get("rope.scaling.type") == "linear":
            values["rope_scaling"] = {
                "rope_type": own.pop("rope.scaling.type"),
                "factor": own.pop("rope.scaling.factor"),
            }
        if (divisors := tensors.get(_ROTARY_DIVISORS)) is not None:
            factors = [float(divisor) for divisor in divisors.data]  # of LLaMA 3.1's scaling, for each channel pair
            values["rope_scaling"] = {
                "rope_type": "longrope",
                "factor": 1.0,
                "short_factor": factors,
                "long_factor": factors,
                "attention_factor": 1.0,
            }
        unread = {key: value for key, value in own.items() if value and value != "none"}
        for key, value in unread.items():
            raise UserError(f"'{self.path}': {prefix}{key}={value!r} is not what the decoder here computes")
        return values

    def files(self) -> Sequence[Path]:
        return [self.path]

    @cached_property
    def tokenizer_file(self) -> Path:
        """A tokenizer.json made of the file's vocabulary, in a temporary folder.

        Raises:
            UserError: nothing here cuts text as the file says.
        """
        from tokenizers.pre_tokenizers import ByteLevel, Digits
        from tokenizers.pre_tokenizers import Sequence as Steps
        from transformers import AutoTokenizer

        cut = self._value("tokenizer.ggml.pre", "default")
        if self._value("tokenizer.ggml.model") == "gpt2" and cut not in _CUTS:
            raise UserError(f"'{self.path}': tokenizer.ggml.pre='{cut}' is not read here: {suggest(str(cut), _CUTS)}")
        self._folder = TemporaryDirectory(prefix="gguf-")
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(self.path.parent), gguf_file=self.path.name)
        except Exception as error:  # whatever the library makes of a damaged vocabulary
            raise UserError(f"'{self.path}' has no tokenizer that can be read ({error}): fetch it again") from None
        if cut in _DIGITS_FIRST:
            steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
            tokenizer.backend_tokenizer.pre_tokenizer = Steps(steps)
        tokenizer.save_pretrained(self._folder.name)
        return find_tokenizer(Path(self._folder.name))


FORMATS.register("gguf", GGUFCheckpoint)
