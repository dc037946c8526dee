"""Builds validated dataclasses from mappings.

An error names the full key of the value that is wrong.

Every key of a configuration is either read or refused. The dataclasses in `sphinx_pl/settings/`,
and the signatures of the classes named there, define what is read.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from sphinx_pl.utils.errors import UserError, nearest_key
from sphinx_pl.utils.renamed import renamed_key

T = TypeVar("T")
CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "conf"


@dataclass(frozen=True)
class Bounds:
    """The numbers that a field may hold.

    For a list or a mapping they apply to each number in it.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        words = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{word} {bound}" for word, bound in words.items() if bound is not None)


BIGGEST = 2**53
"""Larger integers are not exact as floats."""


def within(default: Any = dataclasses.MISSING, **bounds: float) -> Any:
    """Return a dataclass field with `Bounds`. Without a default the key is required."""
    return field(default=default, metadata={"bounds": Bounds(**bounds)})


def build(cls: type[T], values: Any, prefix: str) -> T:
    """Return an instance of the dataclass `cls`, built from a mapping or a DictConfig.

    Numbers must be finite and within the bounds of their fields (`within`).

    Args:
        prefix: the mapping's name in the configuration, for messages.

    Raises:
        UserError: a key is unknown, a value has a wrong type or is out of bounds, or `cls` refuses
            it. The message names the full key.
    """
    if not isinstance(values, Mapping | DictConfig):
        raise UserError(f"{prefix}={_text(values)} must be a mapping of keys to values")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), {key: _plain(values[key]) for key in values})
        _check(cls, OmegaConf.to_container(merged, resolve=True), prefix)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(_explanation(cls, values, prefix, error)) from None
    assert isinstance(config, cls)
    return config


def _plain(value: Any) -> Any:
    """The value without interpolations, which resolve only inside their section."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _explanation(cls: type[Any], values: Any, prefix: str, error: OmegaConfBaseException) -> str:
    key = _joined(prefix, str(error.full_key or ""))
    parts = [part for part in re.split(r"[.\[\]]", str(error.full_key or "")) if part]
    if isinstance(error, ConfigKeyError):
        owner = _optional(_hint(cls, parts[:-1])[0])[0]
        fields = dataclasses.fields(owner) if dataclasses.is_dataclass(owner) else ()
        names = [each.name for each in fields if not each.metadata.get("hidden")]
        return unknown_key(key, [_joined(prefix, *parts[:-1], name) for name in names])
    reason = str(error).splitlines()[0]
    hint, bounds = _hint(cls, parts)
    if "missing mandatory" in reason:
        missing = reason.rpartition(" ")[2].strip("`")
        return f"{key if parts[-1:] == [missing] else _joined(key, missing)} is missing"
    if hint is None:
        return f"{key}: {reason}"
    value = values
    for part in parts:
        try:
            value = value[int(part) if isinstance(value, Sequence) else part]
        except (KeyError, IndexError, TypeError, ValueError, OmegaConfBaseException):
            return f"{key}: {reason}"
    if "is not a ListConfig" in reason or "Invalid value assigned" in reason:
        return f"{key}: it takes a list: write [a,b], or [a] for a single value"
    return f"{key}={_text(value)} must be {_description(hint, bounds)}"


LISTED = 240
"""A message lists names up to this many characters."""


def unknown_key(key: str, keys: Iterable[str], also: Iterable[str] = ()) -> str:
    """Return the sentence that refuses `key`.

    It names the new key if the key was renamed. Otherwise it suggests the nearest key, or lists
    all `keys` keys.

    Args:
        keys: the keys that are listed if no key is similar.
        also: further keys that may be suggested.
    """
    if renamed := renamed_key(key):
        return renamed
    siblings = sorted(set(keys))
    if near := nearest_key(key, [*siblings, *also]):
        return f"there is no key {key}: did you mean {near}?"
    if not siblings:
        return f"there is no key {key}, and its section has no keys"
    parents = {name.rpartition(".")[0] for name in siblings}
    parent = parents.pop() if len(parents) == 1 else ""
    names = ", ".join(name.removeprefix(f"{parent}.") for name in siblings)
    names = names if len(names) <= LISTED else f"{names[:LISTED].rpartition(', ')[0]}, ..."
    return f"there is no key {key}; known{f' in {parent}' if parent else ''}: {names}"


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _text(value: Any) -> str:
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _optional(hint: Any) -> tuple[Any, bool]:
    """Return a type hint without None, and whether None was part of it."""
    if get_origin(hint) in (Union, types.UnionType):
        others = [arg for arg in get_args(hint) if arg is not type(None)]
        return (others[0] if len(others) == 1 else Any), len(others) < len(get_args(hint))
    return hint, False


def _hint(cls: Any, parts: Sequence[str]) -> tuple[Any, Bounds | None]:
    """Return the type hint and the bounds of the value at a path below `cls`, or None if there is
    no such value."""
    hint, bounds = cls, None
    for part in parts:
        hint = _optional(hint)[0]
        if dataclasses.is_dataclass(hint):
            if part not in hint.__dataclass_fields__:
                return None, None
            bounds = hint.__dataclass_fields__[part].metadata.get("bounds")
            hint = get_type_hints(hint)[part]
        elif get_args(hint):  # list[X], tuple[X, ...], dict[str, X]
            hint = get_args(hint)[-1]
        else:
            return None, None
    return hint, bounds


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _description(hint: Any, bounds: Bounds | None) -> str:
    hint, optional = _optional(hint)
    name = _NAMES.get(hint)
    if name is None:
        origin = get_origin(hint)
        if origin is tuple:
            name = f"a list of {len(get_args(hint))} numbers"
        else:
            name = "a list" if origin is list else "a mapping"
            name += " of finite numbers" if {int, float} & set(get_args(hint)) else ""
    if bounds is not None and str(bounds):
        name += f", each {bounds}" if get_origin(hint) else f"{' of' * (bounds.above is None)} {bounds}"
    return f"{name}, or null" if optional else name


def _check(cls: type[Any], values: Any, prefix: str) -> None:
    """Check the numbers of a mapping.

    Raises:
        UserError: a number is not finite or out of its field's bounds, or a list has a wrong
            length.
    """
    hints = get_type_hints(cls)
    for each in dataclasses.fields(cls):
        value = values.get(each.name)
        key = _joined(prefix, each.name)
        hint = _optional(hints[each.name])[0]
        if value is None or value == "???":
            continue
        if dataclasses.is_dataclass(hint):
            _check(hint, value, key)  # type: ignore[arg-type]
            continue
        inside = get_args(hint)[-1] if get_args(hint) else hint
        if inside not in (int, float):
            continue
        bounds = each.metadata.get("bounds") or Bounds()
        numbers = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
        fits = all(n is not None and math.isfinite(n) and n in bounds for n in numbers)
        if not fits or (get_origin(hint) is tuple and len(numbers) != len(get_args(hint))):
            raise UserError(f"{key}={_text(value)} must be {_description(hints[each.name], bounds)}")
        if any(abs(n) > BIGGEST for n in numbers):
            raise UserError(f"{key}={_text(value)} must be at most 2^53")


def pick(cls: type[T], cfg: DictConfig, sections: Iterable[str] = ()) -> T:
    """Return an entry script's options: the keys of `cfg` that the dataclass `cls` has.

    Args:
        sections: other keys that the script reads.

    Raises:
        UserError: nothing reads a key, or `build` refuses a value.
    """
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    refuse_unread(cfg, "", [*names, *sections])
    values = {name: cfg[name] for name in names if name in cfg}
    return build(cls, {k: escaped(v) if isinstance(v, str) else v for k, v in values.items()}, "")


def escaped(text: str) -> str:
    """Return an OmegaConf value that means exactly this text."""
    return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + r"\${", text)


def refuse_unread(cfg: DictConfig, section: str, names: Iterable[str], folder: Path = CONFIG_FOLDER) -> None:
    """Refuse keys of a section ("": the top level) that are not `names` and that no interpolation
    reads.

    So a configuration may have keys of its own, as long as a value refers to them:
    `${recipe.finetune.lr}`. A value in an experiment or in a file of `data` counts even if the
    command line replaces it. An interpolation of the whole section reads none of its keys.

    Args:
        folder: the folder of the configuration files.

    Raises:
        UserError: nothing reads a key. The message suggests the nearest key that is read.
    """
    values = OmegaConf.select(cfg, section) if section else cfg
    keys = list(names)
    unknown = [str(key) for key in values if str(key) not in keys]
    if not unknown:
        return
    depth = len(section.split(".")) if section else 0
    read = {key for key in interpolated(cfg) | _interpolated_in_files(folder) if len(key.split(".")) > depth}
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    every = [key for key, _ in leaves(raw)]
    for name in unknown:
        key = _joined(section, name)
        below = [leaf for leaf in every if leaf == key or leaf.startswith(f"{key}.")] or [key]
        if unread := [leaf for leaf in below if not _is_read(leaf, read)]:
            wrong = unread[0] if len(unread) < len(below) else key
            others = [leaf for leaf in every if leaf not in below or leaf not in unread]
            raise UserError(unknown_key(wrong, [_joined(section, name) for name in keys], others))


def leaves(raw: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (full key, value) of every value in a plain container that holds no further keys."""
    if isinstance(raw, dict) and raw:
        for name, value in raw.items():
            yield from leaves(value, _joined(key, str(name)))
    else:
        yield key, raw


def all_keys(raw: dict[str, Any]) -> list[str]:
    """Return the full keys of a plain container, including those of its sections."""
    parts = [key.split(".") for key, _ in leaves(raw)]
    return list(dict.fromkeys(".".join(key[:n]) for key in parts for n in range(1, len(key) + 1)))


_INNERMOST = re.compile(r"\$\{([^${}]*)\}")
_BY_NAME = ("oc.select:", "oc.dict.keys:", "oc.dict.values:")
"""Resolvers whose first argument is a key."""


def interpolated(cfg: DictConfig) -> set[str]:
    """Return the keys that interpolations in a configuration read.

    They are patterns: `*` stands for a part that is interpolated itself.
    """
    patterns: set[str] = set()
    configs: list[Any] = [OmegaConf.to_container(cfg, resolve=False)]
    if HydraConfig.initialized():
        configs.append({"hydra": OmegaConf.to_container(HydraConfig.instance().cfg.hydra, resolve=False)})
    for raw in configs:
        for key, value in leaves(raw):
            if "${" in (text := str(value)):  # of a list too
                patterns.update(_keys_in(text, key.split(".")[:-1]))
    return patterns


def _interpolated_in_files(folder: Path) -> set[str]:
    folders = {folder}
    if HydraConfig.initialized():
        sources = HydraConfig.get().runtime.config_sources
        folders.update(Path(str(source.path)) for source in sources if source.schema == "file")
    files = [file for each in folders for group in ("experiment", "data") for file in (each / group).rglob("*.yaml")]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return {key for text in texts for key in _keys_in(re.sub(r"\$\{\.[^${}]*\}", "*", text), [])}


def _keys_in(text: str, parent: Sequence[str]) -> Iterator[str]:
    while match := _INNERMOST.search(text):
        inner = match[1].strip()
        text = f"{text[: match.start()]}*{text[match.end() :]}"
        if by_name := next((name for name in _BY_NAME if inner.startswith(name)), None):
            inner = inner.removeprefix(by_name).partition(",")[0].strip()
        elif ":" in inner:
            continue
        dots = len(inner) - len(inner.lstrip("."))
        relative = [*parent[: len(parent) - dots + 1]] if dots else []
        yield _joined(*relative, inner[dots:].replace("[", ".").replace("]", ""))


def _is_read(key: str, patterns: Iterable[str]) -> bool:
    """Return whether a pattern names the key or a section around it."""
    parts = key.split(".")
    return any(fnmatchcase(".".join(parts[:n]), pattern) for pattern in patterns for n in range(1, len(parts) + 1))
