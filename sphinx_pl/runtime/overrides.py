"""Composes configurations, and explains what is wrong with an override."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sphinx_pl.runtime.command_line import literal
from sphinx_pl.runtime.resolvers import register_resolvers
from sphinx_pl.utils.config import CONFIG_FOLDER, all_keys, unknown_key
from sphinx_pl.utils.errors import UserError, nearest_key, suggest
from sphinx_pl.utils.renamed import renamed_key

MISTAKES = (UserError, HydraException, InstantiationException, OmegaConfBaseException)


def one_line(error: BaseException) -> str:
    """Return the sentence to print for an error.

    Hydra wraps errors of the objects it builds; the cause is the user's mistake.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return " ".join(str(cause).split())
        cause = cause.__cause__
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        # The library's message, and the part of the configuration that it is about.
        key_match = re.search(r"full_key: (\S+)", str(error))
        target = re.search(r"'([\w.]+)'", str(error))
        place = key_match[1] if key_match else target[1] if target else "a _target_"
        return f"{place}: {' '.join(str(error.__cause__).split()) or type(error.__cause__).__name__}"
    if isinstance(error, MissingConfigException):
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        # Hydra names no options for a choice in a list.
        options = error.options or [file.stem for file in (CONFIG_FOLDER / group).glob("*.yaml")]
        return f"{group}={option}: there is no file {group}/{option}.yaml; {suggest(option, options)}"
    if isinstance(error, OverrideParseException):
        key, equals, value = error.override.partition("=")
        if not equals:
            return f"'{error.override}' is not an override: write key=value, without spaces around ="
        quoted = shlex.quote(f"{key}={literal(value)}")
        return f"{error.override}: Hydra cannot read this value; as text it is {quoted}"
    message = str(error)
    if match := re.match(r"UserError raised while resolving interpolation: (.+?)(?:\n|$)", message):
        return match[1]  # OmegaConf drops the cause
    if (missing := re.search(r"Interpolation key '(.+?)' not found", message)) and (new := renamed_key(missing[1])):
        return new
    if match := re.match(r"Ambiguous value for argument '(.+?)=(.+)'", message):
        key, values = match.groups()
        return f"{key}={values}: for a list write {key}=[{values}], for a run with each value add -m"
    if message.startswith("Error merging override") and error.__cause__ is not None:
        message += f": {error.__cause__}"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    sentences = [line for line in lines if not line.startswith(("object_type", "reference_type"))]
    return "; ".join(sentences) or type(error).__name__


def compose_config(folder: Path, name: str, overrides: Sequence[str]) -> DictConfig:
    """Return a configuration as a script gets it, with Hydra's own section.

    Raises:
        UserError: an override does not fit. The message suggests what was meant.
        HydraException: an error of Hydra whose own message helps.
    """
    register_resolvers()
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            cfg: DictConfig = hydra.compose(name, overrides=list(overrides), return_hydra_config=True)
    except ValueError as error:  # Hydra raises it for group=null.
        raise explain_choice(error, folder, overrides) from None
    return cfg


def groups(folder: Path) -> dict[str, list[str]]:
    """Return the groups of a folder of configurations, and the names of the files in each group."""
    names: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*.yaml")):
        if (group := file.parent.relative_to(folder).as_posix()) != ".":
            names.setdefault(group, []).append(file.stem)
    return names


def explain_choice(error: ValueError, folder: Path, overrides: Iterable[str]) -> UserError:
    """The error that lists a group's files, where Hydra says only that a choice must be text."""
    files = groups(folder)
    for override in overrides:
        key, _, value = override.partition("=")
        if key in files and not value.startswith("[") and value not in files[key]:
            return UserError(
                f"{override}: {key} takes the name of a file in {folder.name}/{key} ({', '.join(files[key])}); a "
                f"single key of it is set with {key}.KEY=VALUE"
            )
    return UserError(str(error))


_PACKAGES = {"data/mixture": "data", "experiment": "_global_", "debug": "_global_"}
"""Groups whose files belong to another section than the group's name says."""


def check_packages(hydra: DictConfig) -> None:
    """Check that the chosen files name their section, where it is not the section of their folder.

    Raises:
        UserError: a file lacks the line. The message quotes it.
    """
    folders = [Path(str(source.path)) for source in hydra.runtime.config_sources if source.schema == "file"]
    for group, package in _PACKAGES.items():
        name = hydra.runtime.choices.get(group)
        files = [folder / group / f"{name}.yaml" for folder in folders]
        for file in [file for file in files if file.is_file()][:1]:
            text = file.read_text(encoding="utf-8", errors="replace")
            packages = re.findall(r"^# *@package +(\S+)", text, re.MULTILINE)
            if packages != [package]:
                line = f"says '# @package {packages[0]}'" if packages else "has no such line"
                raise UserError(f"{file}: its first line must be '# @package {package}', but it {line}")


_NO_SUCH_KEY = re.compile(r"Could not override '([^']+)'")


def explain_override(
    error: BaseException,
    folder: Path,
    name: str,
    overrides: Sequence[str],
    check: Callable[[DictConfig], Any] | None,
) -> UserError | None:
    """Return the error to print where Hydra advises to append a key, or None for other errors.

    Args:
        check: raises an error if a configuration is wrong.
    """
    if not (match := _NO_SUCH_KEY.search(str(error))):
        return None
    key = match[1]
    if renamed := renamed_key(key):
        return UserError(renamed)
    unknown = [override for override in overrides if override.partition("=")[0] == key]
    others = [override for override in overrides if override not in unknown]
    try:
        cfg = compose_config(folder, name, others)
    except MISTAKES as other:  # The first error is explained first.
        return explain_override(other, folder, name, others, check)
    check_packages(cfg.hydra)
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    parent = key.rpartition(".")[0]
    if nearest_key(key, [*all_keys(raw), *(choices := groups(folder))]) in choices:
        return UserError(unknown_key(key, choices))
    if OmegaConf.is_config(OmegaConf.select(cfg, parent) if parent else cfg) and check is not None:
        try:
            check(_without_hydra(compose_config(folder, name, [*others, *(f"+{override}" for override in unknown)])))
        except UserError as problem:
            return problem
        except MISTAKES:
            pass
        else:
            return UserError(f"{key} is in no file of this configuration, but it is read: write +{unknown[0]}")
    while parent and not OmegaConf.is_config(OmegaConf.select(cfg, parent)):
        parent = parent.rpartition(".")[0]
    below = [one for one in all_keys(raw) if not parent or one.startswith(f"{parent}.")]
    beside = [one for one in below if one.count(".") == parent.count(".") + bool(parent)]
    return UserError(unknown_key(key, beside, below))


def _without_hydra(cfg: DictConfig) -> DictConfig:
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg
