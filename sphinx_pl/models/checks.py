"""Checks of sizes in a model's configuration: each raises a `UserError` that names the full key."""

from __future__ import annotations

from sphinx_pl.utils.errors import UserError


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def positive(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{section}.{name} must be positive, not {value}")


def divides(section: str, config: object, part: str, whole: str) -> None:
    a, b = getattr(config, part), getattr(config, whole)
    require(b % a == 0, f"{section}.{part}={a} does not divide {section}.{whole}={b}: change one of them")
