"""The report's templates: Jinja2 with autoescape. A text from data is never HTML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sphinx_pl.utils.html import mark_unseen

FOLDER = Path(__file__).with_name("templates")


def _finalize(value: Any) -> Any:
    """A text with its invisible characters marked; anything else, and finished HTML, as it is."""
    return mark_unseen(value) if isinstance(value, str) and not isinstance(value, Markup) else value


ENVIRONMENT = Environment(
    loader=FileSystemLoader(FOLDER),
    autoescape=True,
    finalize=_finalize,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(name: str, **values: Any) -> Markup:
    """The HTML of a template with these values."""
    return Markup(ENVIRONMENT.get_template(name).render(values))


def asset(name: str) -> str:
    """The text of a style sheet or script that lies beside the templates."""
    return (FOLDER / name).read_text(encoding="utf-8")
