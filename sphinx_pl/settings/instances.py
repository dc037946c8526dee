"""What Hydra instantiates: the signature of a class says which keys its section has, and of which types."""

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
    # Lightning's own options have no effect there, or another value would break them.
    "sphinx_pl.distributed.zero.Zero3": (),
    "sphinx_pl.distributed.fsdp2.Fsdp2": (),
}
"""Where the `**options` of a class go to."""


def parameters(target: str) -> set[str] | None:
    """The keys that a class or function takes; None: it takes any.

    Raises:
        UserError: there is no such class.
    """
    from hydra.utils import get_object

    try:
        found = get_object(target)
    except Exception as error:  # whatever an import raises
        raise UserError(f"_target_={target} cannot be imported ({str(error).splitlines()[0]})") from None
    names: set[str] = set()
    for function in _constructors(found):
        given = inspect.signature(function).parameters.values()
        names.update(p.name for p in given if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        if not any(p.kind is p.VAR_KEYWORD for p in given):
            return names - {"self"}
        name = f"{found.__module__}.{found.__qualname__}"
        for known in {target, name} & set(_FURTHER):
            for further in _FURTHER[known]:
                try:
                    names.update(parameters(further) or ())
                except UserError:
                    return None  # an extra that is not installed: it is named when it is needed
            return names - {"self"}
    return None if names or not inspect.isclass(found) else set()


def hints(target: str) -> dict[str, Any]:
    """The types of what a class or function takes, as far as they are written down."""
    from hydra.utils import get_object

    found: dict[str, Any] = {}
    for function in _constructors(get_object(target)):
        with contextlib.suppress(Exception):  # names that exist only for type checkers
            found = get_type_hints(function) | found
    return found


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
_ORDER = {int: 0, float: 1, bool: 2}
"""Plain types in a message; literal values and then null follow them."""


def _choices(hint: Any) -> list[Any] | None:
    """The plain types and values that a type hint allows; None: others too, which are not checked."""
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_choices(part) for part in get_args(hint)]
        return None if None in parts else [choice for part in parts for choice in part or ()]
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [hint] if hint in _NAMES else None


def _fits(value: Any, choices: Iterable[Any]) -> bool:
    kinds = {type(value), *([float] if type(value) is int else [])}
    return any(choice in kinds if choice in _NAMES else choice == value for choice in choices)


def _constructors(found: Any) -> Iterable[Callable[..., Any]]:
    """A function, or the `__init__` of a class and of its bases, which get what it passes on."""
    if not inspect.isclass(found):
        return [found]
    return [base.__dict__["__init__"] for base in found.__mro__[:-1] if "__init__" in base.__dict__] or [lambda: None]


def check_instance(values: Any, key: str, siblings: Iterable[str] = ()) -> None:
    """Whether what Hydra is to instantiate has the keys of `values`, of the right types; also what is inside of it.

    Args:
        siblings: full keys of what there is beside it.

    Raises:
        UserError: an unknown key, a value of another type, or no `_target_`.
    """
    if "_target_" not in values:
        hint = suggest(key, siblings) if siblings else "it says which class it is"
        raise UserError(f"{key} has no _target_: {hint}")
    try:
        known = parameters(str(values["_target_"]))
    except UserError as error:
        raise UserError(f"{key}.{error}") from None
    typed = hints(str(values["_target_"]))
    for name, value in values.items():
        if known is not None and name not in known and name not in _HYDRAS:
            raise UserError(unknown_key(f"{key}.{name}", [f"{key}.{one}" for one in known]))
        choices = _choices(typed.get(name, Any))
        if choices is not None and "${" not in str(value) and not _fits(value, choices):
            # A union's order is that in which the first module of the process wrote it down.
            ordered = sorted(choices, key=lambda choice: _ORDER.get(choice, len(_ORDER)) + (choice is type(None)))
            must = ", ".join(dict.fromkeys(_NAMES.get(choice, str(choice)) for choice in ordered))
            raise UserError(f"{key}.{name}={'null' if value is None else value} must be one of: {must}")
        for number, one in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(one, Mapping) and "_target_" in one:
                check_instance(one, f"{key}.{name}" if one is value else f"{key}.{name}[{number}]")
