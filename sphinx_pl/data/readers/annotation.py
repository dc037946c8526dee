"""Bytes of annotations -> text and objects; a failure has a reason."""

from __future__ import annotations

import json
from typing import Any

from sphinx_pl.data.files import read_span
from sphinx_pl.data.skip import SkipSample

MAX_BYTES = 1 << 23
"""The largest annotation in bytes. Objects and tokens take fifty times as much memory."""


def read(path: str, offset: int, size: int, key: str) -> bytes:
    """The bytes of an annotation.

    Raises:
        SkipSample: file_unreadable, annotation_too_long, annotation_truncated.
    """
    if size > MAX_BYTES:
        raise SkipSample("annotation_too_long", f"{key}: {size} bytes")
    try:
        data = read_span(path, offset, size)
    except OSError as error:
        raise SkipSample("file_unreadable", f"{path}: {error.strerror}") from None
    if len(data) < size:
        raise SkipSample("annotation_truncated", f"{key}: {path} ends before it")
    return data


def decoded(data: bytes, what: str, key: str) -> str:
    """The text without the byte order mark that some programs put before it.

    Raises:
        SkipSample: <what>_not_utf8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SkipSample(f"{what}_not_utf8", f"{key}: {error}") from None


def json_object(data: bytes, key: str) -> dict[str, Any]:
    """Raises: SkipSample: json_not_utf8, json_unreadable, entry_malformed (no object)."""
    try:
        value = json.loads(decoded(data, "json", key))
    except (ValueError, RecursionError) as error:
        raise SkipSample("json_unreadable", f"{key}: {error}") from None
    if not isinstance(value, dict):
        raise SkipSample("entry_malformed", f"{key} is not an object")
    return value


def check_unicode(text: str, what: str, key: str) -> None:
    """Check that a text holds no half characters. JSON can spell them ("\\ud83d" in a text that was
    cut).

    Raises:
        SkipSample: <what>_not_utf8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SkipSample(f"{what}_not_utf8", f"{key}: {error}") from None
