"""Files of `torch.save` that model-parallel ranks wrote: tensors split over them, read and written one at a time.

The layout is LLaMA2-Accessory's, and for a decoder alone also Meta's. Files are memory-mapped pickles: only tensors are
allowed in them, so opening one executes nothing.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from mmap import MAP_SHARED
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import get_crc32_options, set_crc32_options, set_default_mmap_options, skip_data

from sphinx_pl.checkpoint.format import MAPPED_BYTES, TensorInfo
from sphinx_pl.errors import UserError

# The dimension along which ranks split a decoder's tensor, by the end of its name; the others are whole in every file.
_SPLITS = (
    (re.compile(r"(layers\.\d+\.(attention\.(w[qkv]|wqkv)|feed_forward\.w[13])|output)\.weight$"), 0),
    (re.compile(r"(layers\.\d+\.(attention\.wo|feed_forward\.w2)|tok_embeddings)\.weight$"), 1),
)
# [experts * F, D] matrices: each rank has a slice of every expert's F.
_EXPERTS = re.compile(r"layers\.\d+\.feed_forward\.w[123]$")


def merge(name: str, parts: Sequence[Tensor], experts: int = 0) -> Tensor:
    """The whole tensor `name` from the parts of all ranks."""
    if len(parts) > 1 and _EXPERTS.search(name):
        return torch.cat([part.view(experts, -1, part.shape[-1]) for part in parts], dim=1).flatten(0, 1)
    dimension = _split_dimension(name)
    return parts[0] if dimension is None or len(parts) == 1 else torch.cat(list(parts), dim=dimension)


def split(name: str, tensor: Tensor, ranks: int, experts: int = 0) -> list[Tensor]:
    """The inverse of `merge`: what each rank holds of `tensor`, not copied.

    Raises:
        UserError: the tensor cannot be split into `ranks` equal parts.
    """
    if ranks == 1:
        return [tensor]
    if _EXPERTS.search(name):
        parts = torch.chunk(tensor.view(experts, -1, tensor.shape[-1]), ranks, dim=1)
        size, found = tensor.shape[0] // experts, [part.flatten(0, 1) for part in parts]
    elif (dimension := _split_dimension(name)) is not None:
        size, found = tensor.shape[dimension], list(torch.chunk(tensor, ranks, dim=dimension))
    else:
        return [tensor] * ranks
    if size % ranks:
        raise UserError(f"'{name}' has {size} rows or columns to split, not a multiple of {ranks} shards")
    return found


def _split_dimension(name: str) -> int | None:
    return next((dimension for pattern, dimension in _SPLITS if pattern.search(name)), None)


class ParallelFiles:
    """The tensors of one model in the files of all its ranks, in the order of the ranks.

    Args:
        unwrap: from a file's content to its tensors by name.
        experts: how many of them `feed_forward.w1` and so on hold.

    Raises:
        UserError: a file is damaged, holds something else than tensors, or has other tensors than the first.
    """

    def __init__(self, files: Sequence[Path], unwrap: Callable[[Any], Any], experts: int = 0) -> None:
        self.files = list(files)
        self.experts = experts
        self._unwrap = unwrap
        self._read = 0
        self._ranks = [self._open(file) for file in self.files]
        for file, rank in zip(self.files, self._ranks, strict=True):
            if different := sorted(rank.keys() ^ self._ranks[0].keys()):
                raise UserError(f"'{file}' and '{self.files[0].name}' disagree about '{different[0]}': copy them again")

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranks[0])

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        shapes = [list(rank[name].shape) for rank in self._ranks]
        dimension = 0 if _EXPERTS.search(name) else _split_dimension(name)
        if dimension is not None:
            shapes[0][dimension] = sum(shape[dimension] for shape in shapes)
        return tuple(shapes[0])

    def dtype(self, name: str) -> torch.dtype:
        return self._ranks[0][name].dtype

    def tensor(self, name: str) -> Tensor:
        """The whole tensor."""
        whole = merge(name, [rank[name] for rank in self._ranks], self.experts)
        self._read += whole.nbytes
        if self._read > MAPPED_BYTES:
            self._ranks = [self._open(file) for file in self.files]
            self._read = 0
        return whole

    def _open(self, file: Path) -> Mapping[str, Tensor]:
        return open_tensors(file, self._unwrap)


def open_tensors(file: Path, unwrap: Callable[[Any], Any]) -> Mapping[str, Tensor]:
    """The tensors of a file of `torch.save`, mapped into memory rather than read. Executes nothing that is in it.

    Args:
        unwrap: from the file's content to its tensors by name.

    Raises:
        UserError: the file is damaged, of a kind that cannot be mapped, or holds something else than tensors.
    """
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
    except (KeyError, TypeError):
        tensors = None
    if not isinstance(tensors, dict) or not all(
        isinstance(n, str) and isinstance(v, Tensor) for n, v in tensors.items()
    ):
        raise UserError(f"'{file}' does not hold tensors by name, as weights do: check the path")
    return tensors


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


def write_parallel(
    file: Path,
    tensors: Mapping[str, TensorInfo],
    values: Callable[[str], Tensor],
    wrap: str | None = None,
    written: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write one rank's file, `{wrap: {name: tensor}}` or without `wrap` the tensors alone, a tensor at a time.

    Args:
        values: name -> value; asked once for each name, in their order.
        written: told how many bytes each tensor had.
    """
    # The pickle and holes for the data first, then the data through a shared mapping of the file.
    before = get_crc32_options()
    set_crc32_options(False)  # of the holes it would be wrong
    try:
        with FakeTensorMode():
            content: Any = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in tensors.items()}
        with skip_data(materialize_fake_tensors=True):
            torch.save({wrap: content} if wrap else content, file)
    finally:
        set_crc32_options(before)
    through, mapped = MAPPED_BYTES, {}
    for name, info in tensors.items():
        if through >= MAPPED_BYTES:
            with set_default_mmap_options(MAP_SHARED):
                content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            mapped = content[wrap] if wrap else content
            through = 0
        mapped[name].copy_(values(name))
        through += info.nbytes
        written(info.nbytes)
