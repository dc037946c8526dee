"""Checks the sections `data` and `benchmark`, which several scripts read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError

from sphinx_pl.utils.config import build, refuse_unread
from sphinx_pl.utils.errors import UserError, suggest


def check_data(cfg: DictConfig) -> None:
    """Check the keys, types and bounds of the section `data`, including its sources.

    No file of a source is read.

    Raises:
        UserError: a key or value is wrong.
    """
    from sphinx_pl.data.datamodule import DataConfig
    from sphinx_pl.data.sampling.config import META, Group, SourceConfig, is_absent

    keys = list(DataConfig.__dataclass_fields__)
    refuse_unread(cfg, "data", keys)
    values: dict[str, Any] = {}
    for key in [key for key in keys if key in cfg.data]:
        # Only other scripts have the key, such as `seed`.
        with contextlib.suppress(InterpolationKeyError):
            value = cfg.data[key]
            values[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    build(DataConfig, values, "data")
    for section in ("sources", "val_sources", "test"):
        sources = values.get(section)
        if sources is None:
            continue
        if not isinstance(sources, Mapping):
            raise UserError(f"data.{section} must be a mapping of names to sources")
        for name, source in sources.items():
            if isinstance(source, Mapping) and not {"kind", "path", "sources"} & set(source):
                others = [f"data.{section}.{other}" for other in sources if other != name]
                raise UserError(
                    f"data.{section}.{name} has no kind and no path: {suggest(f'data.{section}.{name}', others)}"
                )
            grouped = isinstance(source, Mapping) and ("sources" in source or source.get("kind") == META)
            if section == "sources" or grouped:
                # a meta source reads a file
                if not (isinstance(source, Mapping) and source.get("kind") == META):
                    Group.from_dict({"sources": {name: source}})
            elif not is_absent(source):
                if not isinstance(source, Mapping):
                    raise UserError(f"data.{section}.{name} must be a mapping with kind and path")
                SourceConfig.from_dict(str(name), source, section)


def check_benchmark(cfg: DictConfig) -> None:
    """Check the section `benchmark`.

    Raises:
        UserError: an entry has an unknown key.
    """
    from sphinx_pl.evaluation.benchmarks import ROOT, BenchmarkConfig

    for name, entry in (cfg.get("benchmark") or {}).items():
        if name != ROOT and isinstance(entry, DictConfig):
            refuse_unread(cfg, f"benchmark.{name}", BenchmarkConfig.__dataclass_fields__)


def names_section(overrides: Iterable[str], section: str) -> bool:
    """Return whether overrides choose or change a section."""
    keys = (override.lstrip("+~").partition("=")[0] for override in overrides)
    return any(key == section or key.startswith((f"{section}.", f"{section}/", f"{section}@")) for key in keys)
