"""Checks the keys of objects that Hydra instantiates.

A class's signature defines its keys and their types.
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sphinx_pl.utils.config import unknown_key
from sphinx_pl.utils.errors import UserError, suggest

_HYDRAS = ("_target_", "_convert_", "_recursive_", "_partial_", "_args_")
_FURTHER: dict[str, tuple[str, ...]] = {
    "sphinx_pl.callbacks.wandb_logger.RunLogger": ("lightning.pytorch.loggers.WandbLogger", "wandb.init"),
    "lightning.pytorch.loggers.TensorBoardLogger": ("torch.utils.tensorboard.SummaryWriter",),
    "lightning.pytorch.strategies.DDPStrategy": ("torch.nn.parallel.DistributedDataParallel",),
    # Lightning's own options have no effect there, or would break the strategy.
    "sphinx_pl.distributed.zero.Zero3": (),
    "sphinx_pl.distributed.fsdp2.Fsdp2": (),
}
"""Where the `**options` of a class are passed on to."""


def parameters(target: str) -> set[str] | None:
    """Return the keys that a class or function takes, or None if it takes any key.

    Raises:
        UserError: there is no such class.
    """
    from hydra.utils import get_object

    try:
        instance = get_object(target)
    except Exception as error:  # an import may raise anything
        raise UserError(f"_target_={target} cannot be imported ({str(error).splitlines()[0]})") from None
    names: set[str] = set()
    for function in _constructors(instance):
        arguments = inspect.signature(function).parameters.values()
        names.update(p.name for p in arguments if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        if not any(p.kind is p.VAR_KEYWORD for p in arguments):
            return names - {"self"}
        name = f"{instance.__module__}.{instance.__qualname__}"
        for alias in {target, name} & set(_FURTHER):
            for further in _FURTHER[alias]:
                try:
                    names.update(parameters(further) or ())
                except UserError:
                    return None  # an extra that is not installed is reported when it is used
            return names - {"self"}
    return None if names or not inspect.isclass(instance) else set()


def hints(target: str) -> dict[str, Any]:
    """Return the annotated types of the arguments of a class or function."""
    from hydra.utils import get_object

    hints_by_name: dict[str, Any] = {}
    for function in _constructors(get_object(target)):
        with contextlib.suppress(Exception):  # names that exist only for type checkers
            hints_by_name = get_type_hints(function) | hints_by_name
    return hints_by_name


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def _choices(hint: Any) -> list[Any] | None:
    """Return the plain types and values that a type hint allows, or None if it allows others, which
    are not checked."""
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_choices(part) for part in get_args(hint)]
        choices = [choice for part in parts for choice in part or ()]
        return None if None in parts else sorted(choices, key=_rank)
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [hint] if hint in _NAMES else None


def _rank(choice: Any) -> int:
    """Return a choice's place in a message: types in the order of `_NAMES`, values, null.

    A union itself has the order of the first module of the process that wrote it.
    """
    if choice is type(None):
        return len(_NAMES) + 1
    return list(_NAMES).index(choice) if choice in _NAMES else len(_NAMES)


def _fits(value: Any, choices: Iterable[Any]) -> bool:
    kinds = {type(value), *([float] if type(value) is int else [])}
    return any(choice in kinds if choice in _NAMES else choice == value for choice in choices)


def _constructors(target: Any) -> Iterable[Callable[..., Any]]:
    """Return a function, or the `__init__` methods of a class and its bases, which receive what it
    passes on."""
    if not inspect.isclass(target):
        return [target]
    return [base.__dict__["__init__"] for base in target.__mro__[:-1] if "__init__" in base.__dict__] or [lambda: None]


def check_instance(values: Any, key: str, siblings: Iterable[str] = ()) -> None:
    """Check the keys and types of an object that Hydra will instantiate, and of the objects inside
    it.

    Args:
        siblings: full keys of the entries beside it.

    Raises:
        UserError: a key is unknown, a value has another type, or there is no `_target_`.
    """
    if "_target_" not in values:
        hint = suggest(key, siblings) if siblings else "it names the class"
        raise UserError(f"{key} has no _target_: {hint}")
    try:
        keys = parameters(str(values["_target_"]))
    except UserError as error:
        raise UserError(f"{key}.{error}") from None
    hints_by_name = hints(str(values["_target_"]))
    for name, value in values.items():
        if keys is not None and name not in keys and name not in _HYDRAS:
            raise UserError(unknown_key(f"{key}.{name}", [f"{key}.{item}" for item in keys]))
        choices = _choices(hints_by_name.get(name, Any))
        if choices is not None and "${" not in str(value) and not _fits(value, choices):
            must = ", ".join(dict.fromkeys(_NAMES.get(choice, str(choice)) for choice in choices))
            raise UserError(f"{key}.{name}={'null' if value is None else value} must be one of: {must}")
        for number, item in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(item, Mapping) and "_target_" in item:
                check_instance(item, f"{key}.{name}" if item is value else f"{key}.{name}[{number}]")
