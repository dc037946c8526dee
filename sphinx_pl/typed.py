"""A mapping -> a validated dataclass, with the key's full name where it does not fit."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sphinx_pl.errors import UserError

T = TypeVar("T")


def build(cls: type[T], values: Any, prefix: str) -> T:
    """An instance of the dataclass `cls` from a mapping (a DictConfig too).

    Args:
        prefix: what the mapping is called in the configuration, for messages.

    Raises:
        UserError: an unknown key, a wrong type or what `cls` itself refuses, with the key's full name.
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        key = ".".join(part for part in (prefix, error.full_key) if part)
        reason = str(error).splitlines()[0]
        if "is not a ListConfig" in reason:  # what OmegaConf says of a single value
            reason = "it takes a list: write [a,b], and [a] for one"
        raise UserError(f"{key}: {reason}") from None
    assert isinstance(config, cls)
    return config


def pick(cls: type[T], cfg: DictConfig) -> T:
    """An entry script's options: the keys of `cfg` that the dataclass `cls` has.

    Raises:
        UserError: as `build`.
    """
    return build(cls, {f.name: cfg[f.name] for f in dataclasses.fields(cls)}, "")  # type: ignore[arg-type]
