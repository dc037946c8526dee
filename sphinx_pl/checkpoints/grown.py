"""A checkpoint whose vocabulary gets new tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sphinx_pl.checkpoints.format import Checkpoint
from sphinx_pl.checkpoints.tensors import TensorInfo

VOCABULARY = ("decoder.tok_embeddings.weight", "decoder.output.weight")
"""The tensors with a row for each token."""


class GrownCheckpoint(Checkpoint):
    """A checkpoint whose embeddings and output head have more rows, for new tokens.

    Each new row is the mean of the old ones (Hewitt 2021): a new token begins as the average token,
    which changes the probabilities of the others the least.

    Args:
        rows: the number of rows afterwards.
    """

    def __init__(self, checkpoint: Checkpoint, rows: int) -> None:
        self._source = checkpoint
        self._rows = rows
        self.path, self.provenance, self.is_delta = checkpoint.path, checkpoint.provenance, checkpoint.is_delta
        model = checkpoint.model_config.to_dict()
        model["decoder"]["vocab_size"] = rows
        self.config = checkpoint.config | {"model": model}

    @classmethod
    def matches(cls, path: Path) -> bool:
        return False  # it is no layout of files

    @property
    def tokenizer_file(self) -> Path:
        return self._source.tokenizer_file

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def info(self, name: str) -> TensorInfo:
        info = self._source.info(name)
        return TensorInfo((self._rows, *info.shape[1:]), info.dtype) if name in VOCABULARY else info

    def tensor(self, name: str) -> Tensor:
        tensor = self._source.tensor(name)
        return grown_rows(tensor, self._rows) if name in VOCABULARY else tensor

    def unused(self) -> Iterable[tuple[str, Tensor]]:
        return self._source.unused()

    def files(self) -> Sequence[Path]:
        return self._source.files()


def grown_rows(tensor: Tensor, rows: int) -> Tensor:
    """A matrix with `rows` rows, of which each new one is the mean of the old ones, taken in
    float64."""
    mean = tensor.double().mean(dim=0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), -1)])


def grown(checkpoint: Checkpoint, rows: int) -> Checkpoint:
    """The checkpoint with at least `rows` tokens."""
    return GrownCheckpoint(checkpoint, rows) if checkpoint.model_config.decoder.vocab_size < rows else checkpoint
