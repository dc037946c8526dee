"""The report's templates."""

from __future__ import annotations

from pathlib import Path

from sphinx_pl.utils.html import Templates

_TEMPLATES = Templates(Path(__file__).with_name("templates"))
render, asset = _TEMPLATES.render, _TEMPLATES.asset
