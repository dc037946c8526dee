from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sphinx_pl.checkpoints.native import write_checkpoint
from sphinx_pl.checkpoints.output import TorchOutput, copies
from sphinx_pl.checkpoints.tensors import TensorReader
from sphinx_pl.checkpoints.writer import write_file
from sphinx_pl.models.config import DecoderConfig, SphinxConfig

PROCESSOR = {"system": "Answer.", "decimals": 3, "max_length": 64}


def small_config(**decoder: Any) -> SphinxConfig:
    sizes = {
        "vocab_size": 48,
        "width": 16,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "ffn_width": 24,
        "max_positions": 64,
    }
    return SphinxConfig(name="small", decoder=DecoderConfig(**(sizes | decoder)), vision=None)


def random_tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "decoder.a": torch.randn(5, 7, generator=generator),
        "decoder.b": torch.randn(300, generator=generator).bfloat16(),
        "decoder.c": torch.randn(2, 3, 4, generator=generator).half(),
        "decoder.scalar": torch.randn((), generator=generator),
        "mixer.towers.clip.steps": torch.arange(4),
    }


def write_torch(path: Path, tensors: TensorReader, wrap: str | None = None) -> None:
    """One rank's file of `torch.save`."""
    write_file(path, TorchOutput(path.name, copies(tensors), wrap), tensors)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint of `tensors` (given, or random from a seed) under `tmp_path`."""

    def write(name: str, tensors: dict[str, Tensor] | int = 0, **options: Any) -> Path:
        tokenizer = tmp_path / f"{name}.tokenizer"
        tokenizer.write_bytes(options.pop("tokenizer", b"pieces"))
        model = options.pop("model", small_config().to_dict())
        processor = options.pop("processor", PROCESSOR)
        values = random_tensors(tensors) if isinstance(tensors, int) else tensors
        return write_checkpoint(tmp_path / name, values, model, processor, tokenizer, {"stage": name}, **options)

    return write


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(cache: Path, repo: str, name: str) -> Path:
    """Where the hub's library keeps a file or folder of a repository."""
    folder, commit = cache / f"models--{repo.replace('/', '--')}", "0" * 40
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    path = folder / "snapshots" / commit / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
