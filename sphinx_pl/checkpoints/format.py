"""The formats of checkpoints: a model's tensors, its configuration, and the files of a copy.

A format is a subclass of `Checkpoint` in `FORMATS`. Its tensors go by canonical names, those that
`Sphinx` gives them. `raw` offers the same tensors under the files' own names, so that two folders
of one format are mixed file by file.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sphinx_pl.checkpoints.folder import CONFIG, UNUSED, write_json
from sphinx_pl.checkpoints.hub import local_folder
from sphinx_pl.checkpoints.output import (
    MAX_SHARD_BYTES,
    OutputFile,
    OutputFolder,
    SafetensorsOutput,
    copies,
    safetensors_folder,
)
from sphinx_pl.checkpoints.tensors import (
    SafetensorsFiles,
    TensorDict,
    TensorReader,
    TensorView,
    compare,
    copy_into,
)
from sphinx_pl.checkpoints.unreadable import why_unreadable
from sphinx_pl.checkpoints.vocabulary import uncompared, vocabulary_difference
from sphinx_pl.checkpoints.writer import write_file
from sphinx_pl.data.tokenizers import Tokenizer, copy_tokenizer, find_tokenizer, load_tokenizer
from sphinx_pl.models.config import DecoderConfig, SphinxConfig
from sphinx_pl.utils.config import leaves
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import hash_file
from sphinx_pl.utils.registry import Registry

FORMAT_VERSION = 1
"""The version of our own folder, see `sphinx_pl.checkpoints.native`."""


class ModelFolder(TensorReader):
    """A model's tensors, and what a mixture has to know of the folder that they lie in."""

    path: Path
    kind: str
    """Tensors of two folders of one kind go by the same names."""
    provenance: dict[str, Any]

    def canonical_name(self, name: str) -> str:
        """The name that `Sphinx` gives a tensor, as far as that is known: parts and patterns of
        names go by it."""
        return name

    def file(self, name: str) -> Path:
        """The file that a tensor lies in; the folder if it may be spread over several."""
        return self.path

    def parts(self, name: str) -> Sequence[str]:
        """The names of all parts of the tensor that this one is a part of."""
        return [name]

    def check_numbers(self) -> None:
        """Raises: UserError: the tensors are no numbers that can be mixed."""
        return None

    @abstractmethod
    def compare(self, other: Any) -> str:
        """In which respect `other`, which is of the same kind, is another model; "" in none.

        Tensors aside.
        """

    def note(self, other: Any) -> str:
        """A phrase with what differs or was not compared beside the weights; "" for nothing.

        `other` is of the same kind. A copy has what `self` has.
        """
        return ""

    @abstractmethod
    def output(self, dtype: torch.dtype | None = None) -> OutputFolder:
        """The files of a model with other values: the same names and shapes.

        Args:
            dtype: of floating-point tensors; None: each one's own.
        """

    def raw(self) -> ModelFolder | None:
        """The tensors under the files' own names; None if no copy of these files can be written."""
        return None

    @abstractmethod
    def canonical(self) -> Checkpoint:
        """The tensors under canonical names.

        Raises:
            UserError: they have none: this project does not have the model, or they are differences
                to a base.
        """


class Checkpoint(ModelFolder):
    """A model's tensors under canonical names, with what it takes to use them.

    A copy is in our own format.
    """

    kind = "our names"
    config: dict[str, Any]
    is_delta = False
    """Whether the tensors are differences to a base model."""

    @classmethod
    @abstractmethod
    def matches(cls, path: Path) -> bool:
        """Whether `path` looks like this format. Cheap; the constructor is what validates."""

    @abstractmethod
    def __init__(self, path: Path) -> None: ...

    def unused(self) -> Iterable[tuple[str, Tensor]]:
        """Tensors that belong to no module here, under their publisher's names."""
        return ()

    @abstractmethod
    def files(self) -> Sequence[Path]:
        """The files whose content makes this checkpoint."""

    @property
    def tokenizer_file(self) -> Path:
        """tokenizer.json or tokenizer.model, whether or not it is there."""
        return find_tokenizer(self.path)

    def tokenizer(self) -> Path:
        """`tokenizer_file`, if it is there.

        Raises:
            UserError: it isn't.
        """
        if not self.tokenizer_file.is_file():
            raise UserError(f"'{self.tokenizer_file}' is missing: put the model's tokenizer there")
        return self.tokenizer_file

    @property
    def model_config(self) -> SphinxConfig:
        return SphinxConfig.from_dict(self.config["model"])

    @property
    def processor(self) -> dict[str, Any]:
        """The prompt format that the model was trained with."""
        processor: dict[str, Any] = self.config["processor"]
        return processor

    def identity(self) -> dict[str, Any]:
        """The entry of a child's provenance: path, stage and a SHA-256 over the files."""
        digest = hashlib.sha256()
        for file in sorted(self.files()):
            digest.update(f"{file.name} {hash_file(file)}\n".encode())
        return {"path": str(self.path), "stage": self.provenance.get("stage"), "sha256": digest.hexdigest()}

    def load_into(self, module: nn.Module, part: str = "") -> None:
        """Copy every weight into `module` (a `Sphinx`), keeping the module's dtypes and devices.

        Args:
            part: "decoder.", say: `module` is that part of a `Sphinx`, and only its weights are
                read.

        Raises:
            UserError: names or shapes differ; nothing is copied then.
        """
        self.check(module, part)
        names = (name for name in self if name.startswith(part))
        copy_into(module.state_dict(prefix=part), ((name, self.tensor(name)) for name in names))

    def check(self, module: nn.Module, part: str = "") -> None:
        """Raises: UserError: `module` (perhaps on the meta device) has other names or shapes."""
        self.canonical()
        wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict(prefix=part).items()}
        if problem := compare(wanted, {name: self.info(name).shape for name in self if name.startswith(part)}):
            raise UserError(f"checkpoint '{self.path}' does not fit this model: {problem}")

    def canonical(self) -> Checkpoint:
        if self.is_delta:
            raise UserError(
                f"'{self.path}' holds differences to a base model: add them to it first, with "
                "`sphinx-checkpoint import … --base FOLDER`"
            )
        return self

    def compare(self, other: Checkpoint) -> str:
        if self.is_delta != other.is_delta:
            return "one holds whole weights, the other differences to a base model"
        models = (self.model_config.to_dict(), other.model_config.to_dict())  # options that one lacks are off
        for section, (ours, theirs) in {"model": models, "processor": (self.processor, other.processor)}.items():
            if lines := differences(ours, theirs, section):
                more = f" ({len(lines) - 1} more keys differ)" if len(lines) > 1 else ""
                return f"they are not of one {section}: {lines[0]}{more}"
        files = [self.tokenizer_file, other.tokenizer_file]
        if len({file.name for file in files}) == 1 and all(file.is_file() for file in files):
            if len({hash_file(file) for file in files}) > 1:
                return "their tokenizers differ"
            own_template = self.processor.get("prompt_format") == "model"
            if own_template and len({load_tokenizer(file).chat_template for file in files}) > 1:
                return "their chat templates differ"
        tokens = vocabulary_difference(*(file.parent for file in files))
        return f"their tokenizers differ: {tokens}" if tokens else ""

    def note(self, other: Checkpoint) -> str:
        return uncompared(self.tokenizer_file.parent, other.tokenizer_file.parent)

    def output(self, dtype: torch.dtype | None = None) -> OutputFolder:
        sections = {"model": self.config["model"], "processor": self.processor}
        return native_folder(self, sections, self.tokenizer(), self.unused(), dtype)


class SafetensorsFolder(TensorView, ModelFolder):
    """Safetensors files under their own names. A copy has the same tensors in the same files."""

    tensors: SafetensorsFiles

    def file(self, name: str) -> Path:
        return self.tensors.file(name).path

    def raw(self) -> ModelFolder:
        return self

    def copies(self, dtype: torch.dtype | None) -> list[OutputFile]:
        return [SafetensorsOutput(name, copies(file, dtype)) for name, file in self.tensors.files.items()]


def native_folder(
    reader: TensorReader,
    config: Mapping[str, Any],
    tokenizer: Path | Tokenizer,
    unused: Iterable[tuple[str, Tensor]] = (),
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    without: Iterable[str] = (),
) -> OutputFolder:
    """A folder in our own format, but for its provenance: see `sphinx_pl.checkpoints.native`.

    Args:
        config: the content of config.json, without the format's version.
        unused: see `Checkpoint.unused`.
        without: tensors that are not written.
    """

    def finish(folder: Path) -> None:
        write_json(folder / CONFIG, {"format": FORMAT_VERSION, **config})
        copy_tokenizer(tokenizer, folder)
        if tensors := dict(unused):
            others = TensorDict(tensors)
            write_file(folder / UNUSED, SafetensorsOutput(UNUSED, copies(others)), others)

    return safetensors_folder(copies(reader, dtype, without), finish, max_shard_bytes)


# -- opening ---------------------------------------------------------------------------------------

FORMATS: Registry[type[Checkpoint]] = Registry("checkpoint format")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open and validate the checkpoint at `path`, in whichever of `FORMATS` it is.

    Args:
        path: a folder, a GGUF file, or `hf-hub:OWNER/NAME[@REVISION]` or
            `hf-hub:OWNER/NAME[@REVISION]/FOLDER` for one of a repository in the Hugging Face cache,
            or downloaded to it.

    Raises:
        UserError: there is none, or it is damaged or of a version that this code does not know.
    """
    path = local_folder(path)
    if checkpoint_class := _format_of(path):
        return checkpoint_class(path)
    inside = [folder for folder in sorted(path.glob("*")) + sorted(path.glob("*/*")) if _format_of(folder)]
    why = f"did you mean '{inside[-1]}' in it?" if inside else why_unreadable(path, CONFIG)
    raise UserError(f"'{path}' is not a checkpoint of a known format ({', '.join(FORMATS)}): {why}")


def _format_of(path: Path) -> type[Checkpoint] | None:
    return next((checkpoint_class for checkpoint_class in FORMATS.values() if checkpoint_class.matches(path)), None)


def with_common_names(folders: Sequence[ModelFolder], own: bool = True) -> list[ModelFolder]:
    """The tensors of several models under names that all of them have in common.

    Args:
        own: under the files' own names where the formats agree; else under canonical names in any
            case.

    Raises:
        UserError: see `ModelFolder.canonical`.
    """
    raw = [folder.raw() for folder in folders] if own else []
    same = [folder for folder in raw if folder is not None]
    if len(same) == len(folders) and len({folder.kind for folder in same}) == 1:
        return same
    return [folder.canonical() for folder in folders]


# -- comparing -------------------------------------------------------------------------------------

_IRRELEVANT = ("name", "load", "max_length")
"""Last parts of configuration keys that may differ: they change neither what a weight means nor the
prompt format."""


def text_only(name: str, decoder: DecoderConfig) -> dict[str, Any]:
    """The configuration of a checkpoint that is a decoder alone."""
    return {"model": SphinxConfig(name=name, decoder=decoder, vision=None).to_dict(), "processor": {}}


def differences(a: Mapping[str, Any], b: Mapping[str, Any], section: str) -> list[str]:
    """The sentences "key is x and y" of the keys in which two sections differ."""
    x, y = (
        {
            key: value
            for key, value in leaves(content, section)
            if key.rpartition(".")[2] not in _IRRELEVANT and value != {}
        }
        for content in (a, b)
    )
    return [f"{key} is {x.get(key)!r} and {y.get(key)!r}" for key in sorted({*x, *y}) if x.get(key) != y.get(key)]
