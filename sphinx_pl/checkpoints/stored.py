"""The tensors of a checkpoint as they lie in its files, under the files' own names.

Two folders of one layout can be mixed file by file, whatever the names mean, and the result written in the same files:
no model class is needed for that, so any Hugging Face folder of safetensors will do. Where layouts differ, the tensors
are those of a `Checkpoint`, under our names (`OurNames`).
"""

from __future__ import annotations

import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from sphinx_pl.checkpoints.format import (
    CONFIG,
    FORMAT_VERSION,
    INDEX,
    TOKENIZER,
    UNUSED,
    Checkpoint,
    SafetensorsFile,
    SphinxCheckpoint,
    StateDict,
    TensorInfo,
    differences,
    local_folder,
    open_checkpoint,
    read_json,
    read_provenance,
    read_weight_map,
    write_json,
    write_safetensors,
)
from sphinx_pl.checkpoints.huggingface import (
    WEIGHTS,
    belongs,
    config_difference,
    is_huggingface,
    other_files,
    tokenizer_difference,
    weight_files,
)
from sphinx_pl.checkpoints.layout import (
    Entry,
    Layout,
    OutFile,
    SafetensorsOut,
    TorchOut,
    safetensors_layout,
    write_index,
)
from sphinx_pl.checkpoints.llama import PARAMS, MetaCheckpoint, our_llama_name
from sphinx_pl.checkpoints.original import META, OriginalCheckpoint, our_name
from sphinx_pl.checkpoints.torch_shards import ParallelFiles, is_split
from sphinx_pl.checkpoints.training import TrainingCheckpoint
from sphinx_pl.checkpoints.unreadable import check_plain
from sphinx_pl.checkpoints.vocabulary import uncompared, vocabulary_difference
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import hash_file

log = logging.getLogger(__name__)

Read = Callable[[Tensor, int], None]
"""Fill a tensor (contiguous, [n], of the stored dtype) with elements of a flattened tensor from a place on."""


class Stored(ABC):
    """Tensors by key, in the order in which they are best read, and the files of a copy."""

    path: Path
    kind: str
    """Tensors of two `Stored` of one kind go by the same keys."""
    provenance: dict[str, Any]

    @abstractmethod
    def __iter__(self) -> Iterator[str]: ...

    @abstractmethod
    def info(self, key: str) -> TensorInfo: ...

    @abstractmethod
    def reader(self, key: str) -> AbstractContextManager[Read]:
        """Stretches of one tensor. Several threads may each have one."""

    @abstractmethod
    def layout(self, infos: dict[str, TensorInfo]) -> Layout:
        """The files of a model with other values: the same names and files, shapes and dtypes as given."""

    @abstractmethod
    def compare(self, other: Stored) -> str:
        """In which respect `other`, which is of the same kind, is another model; "" in none. Tensors aside."""

    def check(self) -> None:
        """Raises: UserError: its tensors are no numbers that can be mixed."""
        return None

    def note(self, other: Stored) -> str:
        """What `other`, which is of the same kind, has beside its weights that differs or was not compared; a phrase.

        A copy has what `self` has.
        """
        return ""

    def ours(self, key: str) -> str:
        """What the tensor is called here, as far as that can be told: parts and patterns of names go by it."""
        return key

    def file(self, key: str) -> Path:
        """Where the tensor lies: a file, or a folder if it may be spread over several."""
        return self.path

    def parts(self, key: str) -> Sequence[str]:
        """The keys of all parts of the tensor that this one is a part of."""
        return [key]


# -- safetensors: ours and Hugging Face's ----------------------------------------------------------------------------


class _SafetensorsFolder(Stored):
    def __init__(self, path: Path, files: Sequence[str]) -> None:
        self.path = path
        self._files = {name: SafetensorsFile(path / name) for name in files}
        self._file_of = {key: name for name, file in self._files.items() for key in file.keys}

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def info(self, key: str) -> TensorInfo:
        return self._files[self._file_of[key]].info(key)

    def reader(self, key: str) -> AbstractContextManager[Read]:
        return self._files[self._file_of[key]].reader(key)

    def file(self, key: str) -> Path:
        return self.path / self._file_of[key]

    def _out_files(self, infos: dict[str, TensorInfo]) -> list[OutFile]:
        return [
            SafetensorsOut(name, {key: Entry(infos[key], key) for key in file.keys})
            for name, file in self._files.items()
        ]


class HuggingFaceFolder(_SafetensorsFolder):
    """Any folder that `from_pretrained` reads, if its weights are safetensors."""

    kind = "huggingface"

    @classmethod
    def matches(cls, path: Path) -> bool:
        return is_huggingface(path)

    def __init__(self, path: Path) -> None:
        super().__init__(path, weight_files(path))
        if WEIGHTS not in self._files:
            for key, file in read_weight_map(path / INDEX).items():
                if self._file_of.get(key) != file:
                    raise UserError(f"'{path / INDEX}' has '{key}' in {file}, where it is not: copy the folder again")
        self.config = read_json(path / CONFIG)
        self.provenance = {"original": str(self.config["model_type"])}
        self.provenance |= read_provenance(path)

    def ours(self, key: str) -> str:
        return our_llama_name(key)

    def compare(self, other: Stored) -> str:
        assert isinstance(other, HuggingFaceFolder)
        file, problem = CONFIG, config_difference(self.config, other.config)
        if not problem and (file := tokenizer_difference(self.path, other.path)):
            problem = f"their tokenizers differ in {file}"
        if not problem and (tokens := vocabulary_difference(self.path, other.path)):
            file, problem = "tokenizer", f"their tokenizers differ: {tokens}"
        return f"{problem} (if that changes nothing, have one {file} in both)" if problem else ""

    def check(self) -> None:
        check_plain(self.path, self.config, list(self), "mix")

    def note(self, other: Stored) -> str:
        return "; ".join(filter(None, (uncompared(self.path, other.path), other_files(self.path, other.path))))

    def layout(self, infos: dict[str, TensorInfo]) -> Layout:
        files = self._out_files(infos)

        def finish(folder: Path) -> None:
            for file in self.path.iterdir():
                if file.is_file() and belongs(file.name):
                    shutil.copyfile(file, folder / file.name)
            inside = sorted(file.name for file in self.path.iterdir() if file.is_dir() and belongs(file.name))
            if inside:
                log.warning("folders in '%s' are not mixed and not copied: %s", self.path, ", ".join(inside))
            dtypes = {info.dtype for info in infos.values() if info.dtype.is_floating_point}
            if len(dtypes) == 1:
                config = read_json(folder / CONFIG)
                keys = [key for key in ("torch_dtype", "dtype") if key in config]
                write_json(folder / CONFIG, config | dict.fromkeys(keys, str(dtypes.pop()).removeprefix("torch.")))
            if [file.name for file in files] != [WEIGHTS]:
                write_index(folder, files)

        return Layout(files, finish)


class SphinxFolder(_SafetensorsFolder):
    """Our own folder. Towers that it leaves to their `load` entries are no tensors of it."""

    kind = "sphinx_pl"

    def __init__(self, checkpoint: SphinxCheckpoint) -> None:
        super().__init__(checkpoint.path, list(checkpoint.shards))
        self.checkpoint = checkpoint
        self.provenance = checkpoint.provenance

    def compare(self, other: Stored) -> str:
        assert isinstance(other, SphinxFolder)
        return _compare(self.checkpoint, other.checkpoint)

    def layout(self, infos: dict[str, TensorInfo]) -> Layout:
        files = self._out_files(infos)

        def finish(folder: Path) -> None:
            write_index(folder, files)
            for name in (CONFIG, TOKENIZER, UNUSED):
                if (self.path / name).is_file():
                    shutil.copyfile(self.path / name, folder / name)

        return Layout(files, finish)


# -- torch.save's files of model-parallel ranks ----------------------------------------------------------------------


class ParallelFolder(Stored):
    """The original's folder, or Meta's: a key for each rank's part of a tensor."""

    def __init__(self, checkpoint: OriginalCheckpoint | MetaCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.path, self.provenance = checkpoint.path, checkpoint.provenance
        self._files: ParallelFiles = checkpoint.parallel
        self._wrap = "model" if isinstance(checkpoint, OriginalCheckpoint) else None
        # Ranks split tensors alike only if there are equally many.
        self.kind = f"{'original' if self._wrap else 'meta'}/{len(self._files.files)}"
        self._keys = [f"{rank}/{name}" for rank in range(len(self._files.files)) for name in self._files]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def info(self, key: str) -> TensorInfo:
        return self._files.stored_info(key.partition("/")[2])

    @contextmanager
    def reader(self, key: str) -> Iterator[Read]:
        rank, _, name = key.partition("/")
        part = self._files.stored(int(rank), name)
        copied = None if part.is_contiguous() else part.reshape(-1)  # some files share and transpose storages

        def read(out: Tensor, start: int) -> None:
            # Asked for each time: what is mapped is let go of now and then.
            flat = self._files.stored(int(rank), name).view(-1) if copied is None else copied
            out.copy_(flat[start : start + len(out)])
            self._files.count(out.nbytes)

        yield read

    def file(self, key: str) -> Path:
        return self._files.files[int(key.partition("/")[0])]

    def ours(self, key: str) -> str:
        name = key.partition("/")[2]
        return our_name(name) if self._wrap else f"decoder.{name}"

    def parts(self, key: str) -> Sequence[str]:
        name = key.partition("/")[2]
        return [f"{rank}/{name}" for rank in range(len(self._files.files))] if is_split(name) else [f"0/{name}"]

    def compare(self, other: Stored) -> str:
        assert isinstance(other, ParallelFolder)
        if _is_delta(self.checkpoint) != _is_delta(other.checkpoint):
            return "one holds whole weights, the other differences to a base model"
        return _compare(self.checkpoint, other.checkpoint)

    def note(self, other: Stored) -> str:
        assert isinstance(other, ParallelFolder)
        return _tokenizers_note(self.checkpoint, other.checkpoint)

    def layout(self, infos: dict[str, TensorInfo]) -> Layout:
        files: list[OutFile] = [
            TorchOut(
                file.name,
                {name: Entry(infos[f"{rank}/{name}"], f"{rank}/{name}") for name in self._files},
                self._wrap,
            )
            for rank, file in enumerate(self._files.files)
        ]

        def finish(folder: Path) -> None:
            for file in self.path.iterdir():
                if file.is_file() and file.name in (CONFIG, META, PARAMS):
                    shutil.copyfile(file, folder / file.name)
            if self.checkpoint.tokenizer_file.is_file():  # Meta's may lie one level up
                shutil.copyfile(self.checkpoint.tokenizer_file, folder / TOKENIZER)

        return Layout(files, finish)


# -- any checkpoint --------------------------------------------------------------------------------------------------


class OurNames(Stored):
    """Any checkpoint under our names, its copies in our layout."""

    kind = "our names"

    def __init__(self, checkpoint: Checkpoint) -> None:
        if _is_delta(checkpoint):
            raise UserError(
                f"'{checkpoint.path}' holds differences to a base model: add them to it first, with "
                "`sphinx-checkpoint import … --base FOLDER`"
            )
        self.checkpoint = checkpoint
        self.path, self.provenance = checkpoint.path, checkpoint.provenance

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint)

    def info(self, key: str) -> TensorInfo:
        return self.checkpoint.info(key)

    @contextmanager
    def reader(self, key: str) -> Iterator[Read]:
        if isinstance(self.checkpoint, TrainingCheckpoint):
            pieces = self.checkpoint.pieces

            def read(out: Tensor, start: int) -> None:
                out.copy_(pieces.read(key, start, start + len(out)))

        else:
            flat = self.checkpoint.tensor(key).reshape(-1)

            def read(out: Tensor, start: int) -> None:
                out.copy_(flat[start : start + len(out)])

        yield read

    def compare(self, other: Stored) -> str:
        assert isinstance(other, OurNames)
        return _compare(self.checkpoint, other.checkpoint)

    def note(self, other: Stored) -> str:
        assert isinstance(other, OurNames)
        return _tokenizers_note(self.checkpoint, other.checkpoint)

    def layout(self, infos: dict[str, TensorInfo]) -> Layout:
        checkpoint, tokenizer = self.checkpoint, self.checkpoint.tokenizer()

        def finish(folder: Path) -> None:
            sections = {key: checkpoint.config[key] for key in ("model", "processor")}
            write_json(folder / CONFIG, {"format": FORMAT_VERSION, **sections})
            shutil.copyfile(tokenizer, folder / TOKENIZER)
            if unused := StateDict(dict(checkpoint.unused())):
                write_safetensors(folder / UNUSED, {name: unused.info(name) for name in unused}, unused.tensor)

        return safetensors_layout({key: Entry(infos[key], key) for key in self}, finish)


def _is_delta(checkpoint: Checkpoint) -> bool:
    return isinstance(checkpoint, OriginalCheckpoint) and checkpoint.is_delta


def _compare(a: Checkpoint, b: Checkpoint) -> str:
    for section in ("model", "processor"):
        if differing := differences(a.config[section], b.config[section], section):
            more = f" ({len(differing) - 1} more keys differ)" if len(differing) > 1 else ""
            return f"they are not of one {section}: {differing[0]}{more}"
    if (
        a.tokenizer_file.is_file()
        and b.tokenizer_file.is_file()
        and hash_file(a.tokenizer_file) != hash_file(b.tokenizer_file)
    ):
        return "their tokenizers differ"
    tokens = vocabulary_difference(a.tokenizer_file.parent, b.tokenizer_file.parent)
    return f"their tokenizers differ: {tokens}" if tokens else ""


def _tokenizers_note(a: Checkpoint, b: Checkpoint) -> str:
    return uncompared(a.tokenizer_file.parent, b.tokenizer_file.parent)


def store(checkpoints: Sequence[Checkpoint | HuggingFaceFolder], own: bool = True) -> list[Stored]:
    """The tensors of checkpoints in the way that all of them have in common.

    Args:
        own: as they lie in the files, where the layouts agree; else under our names in any case.

    Raises:
        UserError: a Hugging Face folder of a kind of model that this project doesn't have, where our names are needed.
    """
    if own:
        alike: list[Stored] = []
        for checkpoint in checkpoints:
            if isinstance(checkpoint, HuggingFaceFolder):
                alike.append(checkpoint)
            elif isinstance(checkpoint, SphinxCheckpoint) and not checkpoint.left_out:
                alike.append(SphinxFolder(checkpoint))
            elif isinstance(checkpoint, OriginalCheckpoint | MetaCheckpoint):
                alike.append(ParallelFolder(checkpoint))
        if len(alike) == len(checkpoints) and len({stored.kind for stored in alike}) == 1:
            return alike
    return [
        OurNames(open_checkpoint(checkpoint.path) if isinstance(checkpoint, HuggingFaceFolder) else checkpoint)
        for checkpoint in checkpoints
    ]


def open_stored(path: str | Path) -> Checkpoint | HuggingFaceFolder:
    """As `open_checkpoint`, but a Hugging Face folder may hold any kind of model."""
    folder = local_folder(path)
    return HuggingFaceFolder(folder) if HuggingFaceFolder.matches(folder) else open_checkpoint(folder)


def hash_of_hashes(stored: Stored, hashes: Mapping[str, str]) -> str:
    """One hash of a model's weights, of those of its tensors: the same however they are spread over files.

    XXH3 with 128 bits, as fast as memory: it tells one model from another, not a forgery from the original.
    """
    digest = xxhash.xxh3_128()
    for key in sorted(stored):
        info = stored.info(key)
        digest.update(f"{key} {info.dtype} {list(info.shape)} {hashes[key]}\n".encode())
    return digest.hexdigest()


def content_hash(stored: Stored, chunk: int = 1 << 20) -> str:
    """`hash_of_hashes`, reading everything."""
    return hash_of_hashes(stored, {key: tensor_hash(stored, key, chunk) for key in stored})


def tensor_hash(stored: Stored, key: str, chunk: int = 1 << 20) -> str:
    """Of its values' bytes, reading `chunk` elements at a time."""
    info, digest = stored.info(key), xxhash.xxh3_128()
    with stored.reader(key) as read:
        for start in range(0, info.numel, chunk):
            piece = torch.empty(min(chunk, info.numel - start), dtype=info.dtype)
            read(piece, start)
            digest.update(piece.view(torch.uint8).numpy().data)
    return digest.hexdigest()
