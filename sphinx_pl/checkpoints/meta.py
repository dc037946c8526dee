"""Meta's own folder of a LLaMA-2, a checkpoint of a text-only model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from sphinx_pl.checkpoints.folder import read_json, read_provenance, sizes_of
from sphinx_pl.checkpoints.format import FORMATS, Checkpoint, ModelFolder, text_only
from sphinx_pl.checkpoints.original import decoder_config
from sphinx_pl.checkpoints.tensors import TensorInfo
from sphinx_pl.checkpoints.torch_shards import PARAMS, ShardsFolder, TorchShards
from sphinx_pl.data.tokenizers import find_tokenizer
from sphinx_pl.utils.errors import UserError

_META_SHARD = re.compile(r"consolidated\.\d\d\.pth")
_META_QUERIES = "layers.0.attention.wq.weight"


class MetaCheckpoint(Checkpoint):
    """params.json, consolidated.NN.pth; the tokenizer lies there or one folder up."""

    @classmethod
    def matches(cls, path: Path) -> bool:
        return (path / PARAMS).is_file() and any(_META_SHARD.fullmatch(file.name) for file in path.iterdir())

    def __init__(self, path: Path) -> None:
        self.path = path
        files = {file.name: file for file in sorted(path.iterdir()) if _META_SHARD.fullmatch(file.name)}
        self.shards = TorchShards(list(files.values()), lambda content: content)
        sizes = read_json(path / PARAMS)
        with sizes_of(path / PARAMS):
            # Each file has equally many rows of a query matrix.
            rows = self.shards.shard_info(_META_QUERIES).shape[0] if _META_QUERIES in self.shards else sizes["dim"]
            total = max(sizes["dim"] // rows, *(int(name.split(".")[1]) + 1 for name in files))
            names = (f"consolidated.{rank:02d}.pth" for rank in range(total))
        if missing := next((name for name in names if name not in files), None):
            raise UserError(f"'{path / missing}' is missing: copy all {total} shards of this model")
        # Precomputed angles, which every implementation computes itself.
        self._theirs = {f"decoder.{name}": name for name in self.shards if name != "rope.freqs"}
        vocab = self.shards.info("tok_embeddings.weight").shape[0]
        with sizes_of(path / PARAMS):
            self.config = text_only(path.name, decoder_config(sizes, vocab))
        self.provenance = {"original": "Meta"} | read_provenance(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._theirs)

    def info(self, name: str) -> TensorInfo:
        return self.shards.info(self._theirs[name])

    def tensor(self, name: str) -> Tensor:
        return self.shards.tensor(self._theirs[name])

    def files(self) -> Sequence[Path]:
        return [self.path / PARAMS, *self.shards.files]

    def raw(self) -> ModelFolder:
        return ShardsFolder(self, self.shards, "meta", None, lambda name: f"decoder.{name}")

    @property
    def tokenizer_file(self) -> Path:
        here = find_tokenizer(self.path)
        return here if here.is_file() else find_tokenizer(self.path.parent)


FORMATS.register("meta", MetaCheckpoint)
