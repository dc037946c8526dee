"""HTML pages in a single file.

Styles and pictures are inline, and nothing is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from html import escape

from PIL import Image


def page(title: str, header: str, body: str, style: str = "", script: str = "") -> str:
    """Return a whole HTML document.

    `title` is text; the other parts are already HTML, CSS or JavaScript.

    Text from data never runs as a script, even if it was not escaped. A content security policy
    allows only this script and forbids loading anything.
    """
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}{style}</style></head>'
        f"<body><header>{header}</header><main>{body}</main><script>{script}</script></body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: set[int]) -> str:
    """Return a table whose cells are already HTML.

    The columns in `numbers` are aligned to the right.
    """

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{' class=n' if i in numbers else ''}>{cell}</{tag}>" for i, cell in enumerate(cells))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{line(head, 'th')}</tr></thead><tbody>{body}</tbody></table></div>"


# Invisible characters, bidirectional controls, which reorder the text around them, and lone
# surrogates.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def mark_unseen(text: str) -> str:
    """The text with its invisible characters written as their code points."""
    return _INVISIBLE.sub(lambda match: f"\u27e8U+{ord(match[0]):04X}\u27e9", text)


def visible(text: str) -> str:
    """Return text from data as HTML.

    It is escaped, and invisible characters become their code points.
    """
    return escape(mark_unseen(text))


def inline_png(picture: Image.Image) -> str:
    """Return a data URL of a picture."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return inline(stream.getvalue(), "image/png")


def inline(data: bytes, kind: str) -> str:
    """Return a data URL of the bytes. `kind` is their MIME type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf7;--ink:#22242a;--soft:#6b6f78;--line:#dedbd3;--card:#fff;
--up:#1a7f5a;--bad:#b5462f;--c0:#2b5f9e;--c1:#c9772b;--c2:#2f8f6b;--c3:#a8518f;--c4:#8a8f2a;--c5:#5c7fd1;--c6:#b5462f}
@media(prefers-color-scheme:dark){:root{--paper:#16181c;--ink:#e4e2dc;--soft:#9a9da5;--line:#33363d;--card:#1e2126;
--up:#5fc99d;--bad:#e58a72;--c0:#7fb0ea;--c1:#e9a667;--c2:#6fceaa;--c3:#d68fc2;--c4:#c6ca6a;--c5:#9cb4f0;--c6:#e58a72}}
*{box-sizing:border-box}
body{margin:0 auto;padding:3rem 1.5rem 6rem;max-width:66rem;background:var(--paper);color:var(--ink);
font:16px/1.6 Charter,"Bitstream Charter","Source Serif 4",Cambria,Georgia,serif}
h1{font-size:2.5rem;line-height:1.1;margin:0 0 1rem;letter-spacing:-.015em;font-weight:600}
h2{font-size:1.55rem;margin:4rem 0 .8rem;font-weight:600;letter-spacing:-.01em}
h3{font-size:1.08rem;margin:2rem 0 .4rem;font-weight:600}
p{max-width:44rem;margin:.5rem 0 1rem}.lead{font-size:1.15rem}.note,.missing,small,figcaption{color:var(--soft)}
.missing{font-style:italic}small{font-size:.8em}
nav{display:flex;flex-wrap:wrap;gap:.4rem 1.4rem;margin-top:1.5rem;border-top:1px solid var(--line);padding-top:.8rem}
a{color:var(--c0);text-decoration:none}a:hover{text-decoration:underline}
table,nav,select,label,.where,.tag,.key,svg,figcaption,summary,small{
font-family:system-ui,"Segoe UI",Helvetica,Arial,sans-serif}
nav,table,summary,label{font-size:.88rem}
.scroll{overflow-x:auto;margin:1rem 0}table{border-collapse:collapse;font-variant-numeric:tabular-nums;line-height:1.35}
th{color:var(--soft);font-weight:500;text-align:left;border-bottom:1px solid var(--ink)}
th,td{padding:.3rem 1.2rem .3rem 0;white-space:nowrap;vertical-align:middle}td{border-bottom:1px solid var(--line)}
td:last-child{white-space:normal}.n{text-align:right}.sub{padding-left:1rem;color:var(--soft)}
summary{cursor:pointer;color:var(--c0);margin:.6rem 0}
.key{font-size:.85rem;padding-left:1.3em;position:relative;margin-right:.6em}
.key::before{content:"";position:absolute;left:0;top:.2em;
width:.85em;height:.85em;border:2.5px solid var(--k);border-radius:2px}
.filter{display:flex;flex-wrap:wrap;gap:.4rem 1.5rem;margin:1rem 0;color:var(--soft)}
select{font-size:.88rem;padding:.15rem .3rem;max-width:16rem}
article{background:var(--card);border:1px solid var(--line);border-radius:6px;overflow:hidden}
article[hidden]{display:none}
.where{color:var(--soft);font-size:.8rem;display:flex;justify-content:space-between;gap:1rem}
"""
"""Colours for light and dark pages, headings, tables and navigation."""
