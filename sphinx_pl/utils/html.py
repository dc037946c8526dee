"""HTML pages in a single file, written by Jinja2 templates with autoescape.

A text from data is never HTML. Styles and pictures are inline, and a page loads nothing.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

_SHARED = Path(__file__).with_name("templates")


class Templates:
    """The templates, style sheets and scripts of a folder, which can import our `macros.html`.

    Args:
        marked: whether texts show their invisible characters (`mark_unseen`).
    """

    def __init__(self, folder: Path, marked: bool = True) -> None:
        self.folder = folder
        self._environment = Environment(
            loader=FileSystemLoader([folder, _SHARED]),
            autoescape=True,
            finalize=_finalize if marked else None,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    def render(self, name: str, **values: Any) -> Markup:
        """The HTML of a template with these values."""
        return Markup(self._environment.get_template(name).render(values))

    def asset(self, name: str) -> str:
        """The text of a style sheet or script."""
        return (self.folder / name).read_text(encoding="utf-8")


# Invisible characters, bidirectional controls, which reorder the text around them, and lone
# surrogates.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def mark_unseen(text: str) -> str:
    """The text with its invisible characters written as their code points."""
    return _INVISIBLE.sub(lambda match: f"\u27e8U+{ord(match[0]):04X}\u27e9", text)


def _finalize(value: Any) -> Any:
    """A text with its invisible characters marked; anything else, and finished HTML, as it is."""
    return mark_unseen(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_TEMPLATES = Templates(_SHARED)
_STYLE = _TEMPLATES.asset("page.css")


def page(title: str, header: Markup, body: Markup, style: str = "", script: str = "") -> str:
    """A whole HTML document with our colours, headings, tables and navigation.

    Text from data never runs as a script, even if it was not escaped. A content security policy
    allows only this script and forbids loading anything.
    """
    hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {"style": Markup(_STYLE + style), "script": Markup(script)}
    return str(_TEMPLATES.render("page.html", title=title, header=header, body=body, hash=Markup(hash), **parts))


def inline_picture(picture: Image.Image, flat: bool, limit: int) -> str:
    """A data URL of a picture, at most about `limit` bytes.

    It is exact if `flat` colours keep it small.
    """
    if flat:
        stream = io.BytesIO()
        picture.save(stream, "PNG", optimize=True)
        if len(address := inline(stream.getvalue(), "image/png")) * 3 / 4 <= limit:
            return address
    data = b""
    for divisor, quality in ((1, 90), (1, 75), (1, 55), (2, 75), (2, 50), (4, 60)):
        stream = io.BytesIO()
        smaller = picture.resize((max(1, picture.width // divisor), max(1, picture.height // divisor)))
        smaller.save(stream, "JPEG", quality=quality, subsampling=0 if quality > 75 else 2)
        data = stream.getvalue()
        if len(data) <= limit:
            break
    return inline(data, "image/jpeg")


def inline(data: bytes, kind: str) -> str:
    """A data URL of the bytes. `kind` is their MIME type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
