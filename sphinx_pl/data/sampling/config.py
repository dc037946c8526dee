"""The configuration of a mixture: sources, their weights, and groups of sources."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import yaml

from sphinx_pl.data.files import is_remote
from sphinx_pl.data.readers import Reader, build_reader, check_options, find_kind
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.utils.config import Bounds, build, within
from sphinx_pl.utils.errors import UserError, suggest
from sphinx_pl.utils.files import user_path
from sphinx_pl.utils.renamed import renamed_key

log = logging.getLogger(__name__)

MODALITIES = ("image", "text")
UNITS = ("sample", "token")
AUTO = "auto"
"""The kind of a source that is found by looking at its path."""
PARTS = ("", "train", "held_out")
META = "meta"
"""The kind of a source that stands for the original's own list of annotation files."""


@dataclass
class MixingConfig:
    """The section `data.mixing`: how samples are drawn from sources."""

    unit: str = "sample"
    """The unit that shares are counted in: samples, or supervised tokens."""
    epochs: Optional[int] = within(None, at_least=1)
    """How often every source is read; null: for ever. A source's own `epochs` has precedence."""
    temperature: Optional[float] = within(None, above=0)
    """The temperature of the whole tree of sources; see `Group`."""
    partitions: Optional[int] = within(None, at_least=1, at_most=2**16)
    """Canonical partitions of the data, fixed for a run; null: the ranks of its first start."""

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise UserError(f"data.mixing.unit='{self.unit}' must be one of {', '.join(UNITS)}")


@dataclass
class SourceConfig:
    """One entry of a mixture's `sources`; further keys go to the source's constructor.

    - `weight` is the source's share relative to the weights beside it.
    - `questions_per_sample` > 1 joins up to that many records about one image into one sample.
    - `modality` is what the source counts as, since a step must hold text and images.
    - `epochs` bounds how often the source is read (upsampling).
    - `caps` bounds how many records of a task an epoch has: {ocr: 10000}.
    - `part` is train (all but a tenth of the records) or held_out (that tenth), for files without
      such parts.
    - `shuffle_shards` files are open at a time, and their records are shuffled together.
    """

    path: Any
    kind: str = AUTO
    weight: float = within(1.0, at_least=0)
    questions_per_sample: int = within(1, at_least=1)
    modality: str = ""
    epochs: Optional[int] = within(None, at_least=1)
    caps: dict[str, int] = field(default_factory=dict, metadata={"bounds": Bounds(at_least=0)})
    shuffle_shards: int = within(8, at_least=1)
    part: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, name: str, values: Mapping[str, Any], section: str = "sources") -> SourceConfig:
        prefix = f"data.{section}.{name}"
        for key in ("kind", "path"):
            if values.get(key, AUTO if key == "kind" else None) in (None, ""):
                raise UserError(
                    f"{prefix}.{key} is missing: every source needs a path; leave kind out to have it found"
                )
        for key in values:
            if renamed := renamed_key(f"data.sources.{name}.{key}"):
                raise UserError(renamed.replace(f"data.sources.{name}", prefix))
        names = {f for f in cls.__dataclass_fields__ if f != "options"}
        own = {key: value for key, value in values.items() if key in names}
        config = build(cls, own | {"options": {k: v for k, v in values.items() if k not in names}}, prefix)
        modality = "text" if config.kind == "text" else "image"
        if config.kind == AUTO:
            config.kind, modality = find_kind(name, config.path, section)
        config.modality = config.modality or modality
        if config.part not in PARTS:
            raise UserError(f"{prefix}.part={config.part}: {suggest(config.part, PARTS[1:])}")
        if config.modality not in MODALITIES:
            raise UserError(f"{prefix}.modality='{config.modality}' must be one of {', '.join(MODALITIES)}")
        for task in config.caps:
            if task not in TASKS:
                raise UserError(f"{prefix}.caps: unknown task '{task}': {suggest(task, TASKS, TASKS.listed)}")
        check_options(config.kind, prefix, config.options)
        return config

    def open(self, name: str) -> Reader:
        source = build_reader(self.kind, name, self.path, **self.options)
        source.part = self.part
        return source


@dataclass
class Group:
    """Sources that have one weight together.

    With a `temperature` T, a member's share is its weight times (its number of records) ** (1 / T).
    T = 1 gives shares in proportion to size; a larger T gives more equal shares (mT5, arXiv
    2010.11934, section 3.1, alpha = 1 / T).
    """

    members: dict[str, Group | SourceConfig]
    weight: float = 1.0
    temperature: Optional[float] = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], prefix: str = "data") -> Group:
        """The group of {"sources": {name: source or group}, "weight", "temperature"}, without
        members that are null.

        Raises:
            UserError: a key is unknown, or a value is out of bounds.
        """
        for key in values:
            if key not in (names := ("sources", "weight", "temperature")):
                raise UserError(f"{prefix}.{key}: a group of sources has no such key: {suggest(key, names)}")
        weight, temperature = values.get("weight", 1.0), values.get("temperature")
        _check_weight(prefix, weight)
        if temperature is not None and not (isinstance(temperature, int | float) and temperature > 0):
            raise UserError(f"{prefix}.temperature={temperature} must be positive")
        members: dict[str, Group | SourceConfig] = {}
        section = f"{prefix}.sources"
        if not isinstance(values["sources"], Mapping):
            raise UserError(f"{section} must be a mapping of names to sources")
        for name, value in values["sources"].items():
            if is_absent(value):
                continue
            if not isinstance(name, str) or not isinstance(value, Mapping):
                raise UserError(f"{section}.{name} must be a mapping with path, or with sources")
            if "." in name or "/" in name:
                raise UserError(f"{section}: the name '{name}' must have no dot and no slash")
            if "sources" in value:
                members[name] = cls.from_dict(value, f"{section}.{name}")
            elif value.get("kind") == META:
                members[name] = _meta_group(value, f"{section}.{name}")
            else:
                members[name] = SourceConfig.from_dict(name, value, section.removeprefix("data."))
        return cls(members, weight, temperature)

    def leaves(self, prefix: str = "") -> Iterator[tuple[str, SourceConfig]]:
        """(name, configuration) of every source. A member of a group is called `group.member`."""
        for name, member in self.members.items():
            if isinstance(member, Group):
                yield from member.leaves(f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", member

    @property
    def needs_sizes(self) -> bool:
        """Whether shares depend on the number of records."""
        groups = [member for member in self.members.values() if isinstance(member, Group)]
        return self.temperature is not None or any(group.needs_sizes for group in groups)

    def shares(self, sizes: Mapping[str, int], prefix: str = "") -> dict[str, float]:
        """The share of all draws of each source with a weight above 0. The shares sum to 1.

        Args:
            sizes: the number of records of each source; read only if `needs_sizes`.

        Raises:
            UserError: a weight times its power of the size is too large for a number.
        """
        weights: dict[str, float] = {}
        inner: dict[str, dict[str, float]] = {}
        for name, member in self.members.items():
            full = f"{prefix}{name}"
            inner[name] = member.shares(sizes, f"{full}.") if isinstance(member, Group) else {full: 1.0}
            weights[name] = member.weight if inner[name] else 0.0
            if self.temperature is not None:
                try:
                    weights[name] *= sum(sizes[leaf] for leaf in inner[name]) ** (1 / self.temperature)
                except OverflowError:
                    weights[name] = math.inf
        if not math.isfinite(total := sum(weights.values())):
            raise UserError(
                f"data.sources: the weights of {', '.join(weights)} with temperature={self.temperature} are too large "
                "for a number: lower the weights, or raise the temperature"
            )
        return {
            leaf: weights[name] / total * share
            for name, leaves in inner.items()
            for leaf, share in leaves.items()
            if weights[name] > 0
        }


def is_absent(source: Any) -> bool:
    """Whether a source of the configuration is switched off: it is null, or its path is null and it
    has no kind."""
    return source is None or (
        isinstance(source, Mapping) and "path" in source and source["path"] is None and "kind" not in source
    )


def _check_weight(prefix: str, weight: Any) -> None:
    if not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
        raise UserError(f"{prefix}.weight={weight} must not be negative")


def _meta_group(values: Mapping[str, Any], prefix: str) -> Group:
    """The group of the original's data file: `META: [{path, type, root, ratio}]`.

    The format is that of LLaMA2-Accessory (accessory/data/alpaca.py). Each entry is a source whose
    share is in proportion to its size. Relative paths start at the working folder, as in the
    original, then at the file's folder. In the original, `type` makes every global batch
    homogeneous; here it is a name. Entries whose type begins with "text" are text-only.
    """
    file = user_path(str(values.get("path")))
    try:
        entries = yaml.safe_load(file.read_bytes())["META"]
        given = [dict(entry) for entry in entries]
    except OSError as error:
        raise UserError(f"{prefix}.path: {file} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        raise UserError(f"{prefix}.path: {file} is not a list under META of entries with path and type") from None
    shared = {key: value for key, value in values.items() if key not in ("kind", "path", "weight")}
    members: dict[str, Group | SourceConfig] = {}
    for number, entry in enumerate(given):
        for key in ("path", "root"):
            if isinstance(entry.get(key), str) and is_remote(entry[key]):  # a downloaded file shall not run commands
                raise UserError(f"{file}, entry {number + 1} of META: {key}={entry[key]} must be a local path")
        where = f"{file}, entry {number + 1} of META"
        if not isinstance(entry.get("path"), str):
            raise UserError(f"{where}: it has no path")
        kind = entry.get("type", "data")
        if not isinstance(kind, str) or not isinstance(entry.get("root") or "", str):
            raise UserError(f"{where}: its type and root must be text")
        if not isinstance(entry.get("ratio", 1.0), int | float):
            raise UserError(f"{where}: its ratio must be a number")
        source = {"kind": "instructions", "path": _beside(file, entry["path"]), **shared}
        if entry.get("root"):
            source["root"] = _beside(file, entry["root"])
        if "ratio" in entry:
            source["ratio"] = entry["ratio"]
        if kind.startswith("text"):
            source.setdefault("modality", "text")
        stem = Path(entry["path"]).name.split(".")[0]
        name = f"{kind}-{stem}".replace(".", "_").replace("/", "_")
        members[name if name not in members else f"{name}-{number}"] = SourceConfig.from_dict(name, source, where)
    _check_weight(prefix, weight := values.get("weight", 1.0))
    return Group(members, weight, temperature=1.0)


def _beside(file: Path, path: str) -> str:
    beside = str(file.parent / path)
    return beside if os.path.exists(beside) and not os.path.exists(path) else path  # noqa: PTH110 - never raises
