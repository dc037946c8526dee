"""Files of `torch.save` that model-parallel ranks wrote: tensors split over them, read one at a
time.

LLaMA2-Accessory splits tensors like this, and for a decoder alone also Meta. Files are
memory-mapped pickles: only tensors are allowed in them, so opening one executes nothing.
"""

from __future__ import annotations

import logging
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphinx_pl.checkpoints.folder import CONFIG
from sphinx_pl.checkpoints.format import Checkpoint, ModelFolder
from sphinx_pl.checkpoints.output import Entry, OutputFile, OutputFolder, TorchOutput
from sphinx_pl.checkpoints.tensors import MappedFile, Read, TensorInfo, TensorReader
from sphinx_pl.data.tokenizers import copy_tokenizer
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import check_pointer

log = logging.getLogger(__name__)

# The dimension along which ranks split a decoder's tensor, by the end of its name; the others are
# whole in every file.
_SPLITS = (
    (re.compile(r"(layers\.\d+\.(attention\.(w[qkv]|wqkv)|feed_forward\.w[13])|output)\.weight$"), 0),
    (re.compile(r"(layers\.\d+\.(attention\.wo|feed_forward\.w2)|tok_embeddings)\.weight$"), 1),
)
# [experts * F, D] matrices: each rank has a slice of every expert's F.
_EXPERTS = re.compile(r"layers\.\d+\.feed_forward\.w[123]$")


META = "meta.json"
PARAMS = "params.json"
_BESIDE = (CONFIG, META, PARAMS)
"""Files of LLaMA2-Accessory's and Meta's folders that a copy has too."""


def split(name: str, tensor: Tensor, ranks: int, experts: int = 0) -> list[Tensor]:
    """The part of the whole tensor `name` that each rank holds.

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


class TorchShards(MappedFile, TensorReader):
    """The tensors of one model in the files of all its ranks, whole and under the files' names.

    Args:
        files: in the order of the ranks.
        unwrap: from a file's content to its tensors by name.
        experts: how many of them `feed_forward.w1` and so on hold.

    Raises:
        UserError: a file is damaged, holds something else than tensors, or is not of the same model
            as the first.
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

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of the whole tensor.

        Raises:
            UserError: there is none of that name.
        """
        shard = self.shard_info(name)
        shape = list(shard.shape)
        dimension = 0 if _EXPERTS.search(name) else _split_dimension(name)
        if dimension is not None and dimension < len(shape):
            shape[dimension] *= len(self.files)
        return TensorInfo(tuple(shape), shard.dtype)

    def tensor(self, name: str) -> Tensor:
        """The whole tensor; one that ranks do not split is the first's.

        A warning names small ones that differ.
        """
        if len(self.files) == 1 or not is_split(name):
            first, *others = (rank[name] for rank in self._ranks())
            if first.nbytes < 2**16 and not all(torch.equal(first, other) for other in others):
                log.warning("'%s' differs between the ranks in '%s': the first is taken", name, self.files[0].parent)
            self.count(first.nbytes)
            return first
        info = self.info(name)
        whole = torch.empty(info.shape, dtype=info.dtype)
        for rank, view in enumerate(_views(name, whole, len(self.files), self.experts)):
            view.copy_(self.shard(rank, name).view(view.shape))
            self.count(view.nbytes)
        return whole

    def shard_info(self, name: str) -> TensorInfo:
        """Shape and dtype of what each file has of a tensor.

        Raises:
            UserError: there is none of that name.
        """
        if name not in self._infos:
            raise UserError(f"'{self.files[0]}' has no '{name}': it is not, or not all of, what it should be")
        return self._infos[name]

    def shard(self, rank: int, name: str) -> Tensor:
        """The part of a tensor in one rank's file, mapped.

        A caller reports to `count` what it has read of it.
        """
        return self._ranks()[rank][name]

    def _drop(self) -> None:
        self._mapped = None

    def _ranks(self) -> list[Mapping[str, Tensor]]:
        if (mapped := self._mapped) is None:
            mapped = self._mapped = [open_tensors(file, self._unwrap) for file in self.files]
        return mapped


class ShardsFolder(ModelFolder):
    """The shards of a checkpoint under the files' names: `RANK/NAME` is one rank's part of a
    tensor.

    Args:
        kind: of the format.
        wrap: see `TorchOutput`.
        canonical_name: from the files' names.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        shards: TorchShards,
        kind: str,
        wrap: str | None,
        canonical_name: Callable[[str], str],
    ) -> None:
        self.checkpoint = checkpoint
        self.path, self.provenance = checkpoint.path, checkpoint.provenance
        self.kind = f"{kind}/{len(shards.files)}"  # ranks split tensors alike only if there are equally many
        self._shards = shards
        self._wrap = wrap
        self._canonical_name = canonical_name

    def __iter__(self) -> Iterator[str]:
        return (f"{rank}/{name}" for rank in range(len(self._shards.files)) for name in self._shards)

    def info(self, name: str) -> TensorInfo:
        return self._shards.shard_info(_key(name)[1])

    def tensor(self, name: str) -> Tensor:
        shard = self._shards.shard(*_key(name))
        self._shards.count(shard.nbytes)
        return shard

    @contextmanager
    def open(self, name: str) -> Iterator[Read]:
        shard = self._shards.shard(*_key(name))
        copied = None if shard.is_contiguous() else shard.reshape(-1)  # some files share and transpose storages
        del shard

        def read(out: Tensor, start: int) -> None:
            # Asked for each time, since mappings are dropped now and then.
            flat = self._shards.shard(*_key(name)).view(-1) if copied is None else copied
            out.copy_(flat[start : start + len(out)])
            self._shards.count(out.nbytes)

        yield read

    def file(self, name: str) -> Path:
        return self._shards.files[_key(name)[0]]

    def canonical_name(self, name: str) -> str:
        return self._canonical_name(_key(name)[1])

    def parts(self, name: str) -> Sequence[str]:
        whole = _key(name)[1]
        return [f"{rank}/{whole}" for rank in range(len(self._shards.files) if is_split(whole) else 1)]

    def compare(self, other: ShardsFolder) -> str:
        return self.checkpoint.compare(other.checkpoint)

    def note(self, other: ShardsFolder) -> str:
        return self.checkpoint.note(other.checkpoint)

    def raw(self) -> ModelFolder:
        return self

    def canonical(self) -> Checkpoint:
        return self.checkpoint.canonical()

    def output(self, dtype: torch.dtype | None = None) -> OutputFolder:
        files: list[OutputFile] = [
            TorchOutput(
                file.name,
                {name: Entry(self._shards.shard_info(name).cast(dtype), f"{rank}/{name}") for name in self._shards},
                self._wrap,
            )
            for rank, file in enumerate(self._shards.files)
        ]

        def finish(folder: Path) -> None:
            for name in _BESIDE:
                if (self.path / name).is_file():
                    shutil.copyfile(self.path / name, folder / name)
            if self.checkpoint.tokenizer_file.is_file():  # Meta's may lie one level up
                copy_tokenizer(self.checkpoint.tokenizer_file, folder)

        return OutputFolder(files, finish)


def _key(name: str) -> tuple[int, str]:
    """Rank and name of a shard."""
    rank, _, whole = name.partition("/")
    return int(rank), whole


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def open_tensors(file: Path, unwrap: Callable[[Any], Any]) -> Mapping[str, Tensor]:
    """The tensors of a file of `torch.save`, mapped into memory rather than read. Executes nothing
    that is in it.

    A small file of PyTorch before 1.6, which cannot be mapped, is read.

    Args:
        unwrap: from the file's content to its tensors by name.

    Raises:
        UserError: the file is damaged, of a kind that cannot be mapped, or holds something else
            than tensors.
    """
    check_pointer(file)
    legacy = _starts_with(file, _LEGACY)
    if legacy and file.stat().st_size > _LEGACY_BYTES:
        raise UserError(
            f"'{file}' is in the format of PyTorch before 1.6, which cannot be mapped: write it again with "
            "torch.save(torch.load(FILE, weights_only=True), NEW_FILE)"
        )
    if _is_program(file):
        raise UserError(
            f"'{file}' is a TorchScript program, which is not read as tensors: "
            "use the same weights as .safetensors or a state dict"
        )
    try:
        content: Any = torch.load(file, map_location="cpu", mmap=not legacy, weights_only=True)
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
_LEGACY_BYTES = 2**28
"""Larger files of that kind would take too much memory beside a model."""


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
