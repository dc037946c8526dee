from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sphinx_pl.checkpoints.format import Checkpoint, ModelFolder
from sphinx_pl.checkpoints.output import OutputFolder
from sphinx_pl.checkpoints.tensors import TensorInfo
from sphinx_pl.checkpoints.torch_shards import split
from tests.checkpoints.conftest import write

__all__ = ["write"]

BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
PRECISE = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}
"""Arithmetic that has digits to spare for each dtype."""


def finite_bits(dtype: torch.dtype, seed: int, count: int = 1000) -> Tensor:
    """Random bit patterns of finite numbers, so every exponent, subnormals and zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.iinfo(BITS[dtype])
    bits = torch.randint(info.min, info.max, (count,), generator=generator, dtype=BITS[dtype])
    values = bits.view(dtype)
    values[:4] = torch.tensor([0.0, -0.0, torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal / 4], dtype=dtype)
    return torch.where(values.isfinite(), values, torch.ones_like(values))


def rounded_once(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 -> the nearest number of 16 bits, ties to even.

    What float32 cannot hold is kept in its last bit (rounding to odd), which is below all that decides the second
    rounding.
    """
    near = exact.float()
    back = near.double()
    bits = near.view(torch.int32) - (back.abs() > exact.abs()).int()
    return (bits | (back != exact).int()).view(torch.float32).to(dtype)


class Held(ModelFolder):
    """Tensors in memory as a `ModelFolder`. `parts`: of a key those of all parts of its tensor, if it is but one."""

    kind = "held"

    def __init__(self, tensors: Mapping[str, Tensor], path: str = "held", parts: Mapping[str, list[str]] = {}) -> None:
        self.tensors = dict(tensors)
        self.path, self.provenance = Path(path), {}
        self._parts = parts

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def info(self, key: str) -> TensorInfo:
        return TensorInfo(tuple(self.tensors[key].shape), self.tensors[key].dtype)

    def tensor(self, key: str) -> Tensor:
        return self.tensors[key]

    def output(self, dtype: torch.dtype | None = None) -> OutputFolder:
        raise NotImplementedError

    def canonical(self) -> Checkpoint:
        raise NotImplementedError

    def compare(self, other: ModelFolder) -> str:
        return ""

    def parts(self, key: str) -> list[str]:
        return self._parts.get(key, [key])


def huggingface_folder(path: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    save_file(dict(tensors), path / "model.safetensors")
    return path


def original_folder(path: Path, tensors: Mapping[str, Tensor], shards: int) -> Path:
    """In the original's layout, as far as it is needed to read it; `tensors` are whole and without the prefix."""
    path.mkdir()
    for rank in range(shards):
        part = {f"llma.{name}": split(f"llma.{name}", value, shards)[rank].clone() for name, value in tensors.items()}
        torch.save({"model": part}, path / f"consolidated.{rank:02d}-of-{shards:02d}.model.pth")
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 48, "multiple_of": 8, "norm_eps": 1e-5}
    (path / "config.json").write_text(json.dumps(sizes))
    (path / "meta.json").write_text(json.dumps({"llama_type": "llama_ens"}))
    (path / "tokenizer.model").write_bytes(b"pieces")
    return path
