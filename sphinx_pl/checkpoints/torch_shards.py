"""Files of `torch.save` that model-parallel ranks wrote: tensors split over them, read one at a time.

The layout is LLaMA2-Accessory's, and for a decoder alone also Meta's. Files are memory-mapped pickles: only tensors are
allowed in them, so opening one executes nothing.
"""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphinx_pl.checkpoints.tensors import Mapped, TensorInfo
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import check_pointer

log = logging.getLogger(__name__)

# The dimension along which ranks split a decoder's tensor, by the end of its name; the others are whole in every file.
_SPLITS = (
    (re.compile(r"(layers\.\d+\.(attention\.(w[qkv]|wqkv)|feed_forward\.w[13])|output)\.weight$"), 0),
    (re.compile(r"(layers\.\d+\.(attention\.wo|feed_forward\.w2)|tok_embeddings)\.weight$"), 1),
)
# [experts * F, D] matrices: each rank has a slice of every expert's F.
_EXPERTS = re.compile(r"layers\.\d+\.feed_forward\.w[123]$")


def split(name: str, tensor: Tensor, ranks: int, experts: int = 0) -> list[Tensor]:
    """What each rank holds of the whole tensor `name`.

    Raises:
        UserError: the tensor cannot be split into `ranks` equal parts.
    """
    parts = _views(name, tensor, ranks, experts)
    return [part.flatten(0, 1) for part in parts] if ranks > 1 and _EXPERTS.search(name) else parts


def _views(name: str, tensor: Tensor, ranks: int, experts: int) -> list[Tensor]:
    """As `split`, but views of the tensor also where experts are split: [experts, F / ranks, D]."""
    dimension: int | None
    if ranks == 1:
        return [tensor]
    if _EXPERTS.search(name):
        tensor, dimension = tensor.view(experts, -1, tensor.shape[-1]), 1
    elif (dimension := _split_dimension(name)) is None:
        return [tensor] * ranks
    if tensor.shape[dimension] % ranks:
        size = tensor.shape[dimension]
        raise UserError(f"'{name}' has {size} rows or columns to split, not a multiple of {ranks} shards")
    return list(torch.chunk(tensor, ranks, dim=dimension))


def is_split(name: str) -> bool:
    """Whether every rank has another part of the tensor, rather than all of it."""
    return bool(_EXPERTS.search(name)) or _split_dimension(name) is not None


def _split_dimension(name: str) -> int | None:
    return next((dimension for pattern, dimension in _SPLITS if pattern.search(name)), None)


class ParallelFiles(Mapped):
    """The tensors of one model in the files of all its ranks, in the order of the ranks.

    Args:
        unwrap: from a file's content to its tensors by name.
        experts: how many of them `feed_forward.w1` and so on hold.

    Raises:
        UserError: a file is damaged, holds something else than tensors, or is not of the same model as the first.
    """

    def __init__(self, files: Sequence[Path], unwrap: Callable[[Any], Any], experts: int = 0) -> None:
        super().__init__()
        self.files = list(files)
        self.experts = experts
        self._unwrap = unwrap
        self._mapped: list[Mapping[str, Tensor]] | None = None
        ranks = self._ranks()
        first = ranks[0]
        self._infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in first.items()}
        for file, rank in zip(self.files[1:], ranks[1:], strict=True):
            different = sorted(rank.keys() ^ first.keys())
            different += [name for name, tensor in rank.items() if name in first and not _alike(tensor, first[name])]
            if different:
                raise UserError(f"'{file}' and '{self.files[0].name}' disagree about '{different[0]}': copy them again")

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor.

        Raises:
            UserError: there is none of that name.
        """
        if name not in self._infos:
            raise UserError(f"'{self.files[0]}' has no '{name}': it is not, or not all of, what it should be")
        shape = list(self._infos[name].shape)
        dimension = 0 if _EXPERTS.search(name) else _split_dimension(name)
        if dimension is not None and dimension < len(shape):
            shape[dimension] *= len(self.files)
        return tuple(shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._infos[name].dtype

    def tensor(self, name: str) -> Tensor:
        """The whole tensor. What every rank has is taken from the first; small ones that differ are warned of."""
        if len(self.files) == 1 or not is_split(name):
            first, *others = (rank[name] for rank in self._ranks())
            if first.nbytes < 2**16 and not all(torch.equal(first, other) for other in others):
                log.warning("'%s' differs between the ranks in '%s': the first is taken", name, self.files[0].parent)
            self._count(first.nbytes)
            return first
        whole = torch.empty(self.shape(name), dtype=self.dtype(name))
        for rank, view in enumerate(_views(name, whole, len(self.files), self.experts)):
            view.copy_(self._ranks()[rank][name].view(view.shape))
            self._count(view.nbytes)
        return whole

    def stored_info(self, name: str) -> TensorInfo:
        """Of what each file has of it."""
        return self._infos[name]

    def stored(self, rank: int, name: str) -> Tensor:
        """What the file of one rank has of it. Whoever reads it says so to `count`."""
        return self._ranks()[rank][name]

    def count(self, nbytes: int) -> None:
        """So many bytes of `stored` tensors were read."""
        self._count(nbytes)

    def _drop(self) -> None:
        self._mapped = None

    def _ranks(self) -> list[Mapping[str, Tensor]]:
        if (mapped := self._mapped) is None:
            mapped = self._mapped = [open_tensors(file, self._unwrap) for file in self.files]
        return mapped


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def open_tensors(file: Path, unwrap: Callable[[Any], Any]) -> Mapping[str, Tensor]:
    """The tensors of a file of `torch.save`, mapped into memory rather than read. Executes nothing that is in it.

    Args:
        unwrap: from the file's content to its tensors by name.

    Raises:
        UserError: the file is damaged, of a kind that cannot be mapped, or holds something else than tensors.
    """
    check_pointer(file)
    if _starts_with(file, _LEGACY):
        raise UserError(
            f"'{file}' is in the format of PyTorch before 1.6, which cannot be mapped: write it anew with "
            "torch.save(torch.load(FILE, weights_only=True), NEW_FILE)"
        )
    if _is_program(file):
        raise UserError(
            f"'{file}' is a TorchScript program, which is not read as tensors: "
            "use the same weights as .safetensors or a state dict"
        )
    try:
        content: Any = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"'{file}' holds something else than tensors and was not opened: get it from a source that you trust"
        ) from error
    except Exception as error:  # what a damaged pickle's instructions run into: KeyError, struct.error and more
        raise UserError(f"'{file}' is damaged or not a file of torch.save: copy it again") from error
    try:
        tensors: Any = unwrap(content)
    except (KeyError, TypeError, IndexError):  # a tensor is asked for a key, too
        tensors = None
    if not isinstance(tensors, dict) or not all(
        isinstance(n, str) and isinstance(v, Tensor) for n, v in tensors.items()
    ):
        raise UserError(f"'{file}' does not hold tensors by name, as weights do: check the path")
    for name, value in tensors.items():
        if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_complex():
            raise UserError(f"'{name}' in '{file}' is not plain numbers (sparse, quantized, complex or without values)")
    return {name: value.detach() for name, value in tensors.items()}


_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""What files of `torch.save` began with before they were zip archives."""


def _starts_with(file: Path, magic: bytes) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(len(magic)) == magic


def _is_program(file: Path) -> bool:
    """Whether `torch.load` would hand the file to TorchScript."""
    if not _starts_with(file, b"PK"):
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return False  # `torch.load` has its own opinion of what is damaged
