"""Instruction JSON: one entry of an instruction file as a Record, and back.

The format is LLaVA's, with optional keys of ours:

    {"id", "image": path or list of paths, "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}],
     "system", "task", "question", "answer", "choices", "regions": [{"box": [x1, y1, x2, y2], "label",
     "keypoints": [[x, y, visibility], ...]}], "width", "height", "meta"}

`width` and `height` belong to the (only) image, in pixels like the boxes. The forms of other
projects are read too: `images` for `image`, `messages` for `conversations`, `role` and `content`
for `from` and `value`, content in parts (`{"type": "text", "text"}`, `{"type": "image", "image":
path}`), a first message of the system, and the numbered marks `<image_1>`, `<image 2>` where they
stand in order.

Keys that only say where an entry comes from (`ABOUT`) are ignored, and so is any key without a
value, unless one of them names a picture and nothing else does. An entry with any other key is
skipped, since the key may hold a picture or a label that would be missing. The reason names the
key.
"""

from __future__ import annotations

import itertools
import re
import reprlib
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sphinx_pl.data.schema import PLACEHOLDER, ImageRef, Record, Region, Turn
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.utils.errors import suggest

MAX_SIDE = 1 << 24
"""The largest side of an image in pixels; a larger one in an annotation is an error."""

KEYS = (
    *("task", "image", "images", "width", "height", "conversations", "messages", "system"),
    *("question", "answer", "choices", "regions", "meta"),
)
"""The keys of an entry that are read."""
# fmt: off
ABOUT = frozenset({
    "id", "_id", "uid", "uuid", "idx", "index", "key", "hash", "md5", "sha256",
    "question_id", "image_id", "sample_id", "annotation_id", "source_id",
    "source", "sources", "data_source", "dataset", "dataset_name", "subset", "split", "domain", "title", "url", "link",
    "category", "categories", "subcategory", "topic", "topics", "type", "question_type", "answer_type", "difficulty",
    "level", "language", "lang", "tags", "keywords", "license", "licence", "copyright", "attribution", "author",
    "authors", "creator", "date", "created", "created_at", "updated_at", "timestamp", "version", "model", "model_name",
    "generator", "score", "scores", "rating", "quality", "similarity", "note", "notes", "comment", "metadata", "info",
})
# fmt: on
"""Keys of an entry, a message or a region about its origin and its quality. They are ignored."""

# ShareGPT's exports use both names of a pair.
_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
_MEDIA = re.compile("video|audio|speech|sound|voice|music|point_?cloud", re.IGNORECASE)
_MEDIA_MARK = re.compile(r"<\|?(?:video|audio|speech|sound)(?:_\w+)?\|?>", re.IGNORECASE)
_NUMBERED_MARK = re.compile(r"<image[ _]?([0-9]{1,3})>")
_FOREIGN_MARK = re.compile(
    r"<\|(?:image|img|vision)[\w ]*\|>|<(?:ImageHere|image_?(?:placeholder|pad|token|here))>|<img>[^<]*</img>",
    re.IGNORECASE,
)
# In an entry without images these may be words about markup.
_ANY_MARK = re.compile(
    rf"(?!(?-i:{PLACEHOLDER}))</?\|?(?:\w+[_-])?(?:im|img|images?|vision|media|PIL\.Image)(?:[_-]\w+|\d+)*"
    r"(?::[^<>]*)?\|?>"
    r"|[\[{](?:img|image)[ _]?\d*[\]}]",
    re.IGNORECASE,
)
_MEDIA_FILE = re.compile(
    r"\.(?:jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|heic|jxl|mp4|mov|avi|mkv|webm|mp3|wav|flac)$", re.IGNORECASE
)


def to_record(entry: Mapping[str, Any], key: str, root: Path, default_task: str, ignore: Container[str] = ()) -> Record:
    """The Record of an entry. Its images lie below `root`.

    Args:
        ignore: further keys that are ignored.

    Raises:
        SkipSample: the entry does not have the form above, or a key or a mark in its questions is
            unknown.
    """
    try:
        task = entry.get("task", default_task)
        if task not in TASKS:
            raise SkipSample("task_unknown", f"{key}: {task!r:.100}")
        _check_keys(entry, KEYS, key, ignore)
        messages = [
            _message(message, key, ignore) for message in _either(entry, "conversations", "messages", key) or []
        ]
        system, turns = _turns(messages, key)
        if entry.get("system") and system is not None:
            raise SkipSample("entry_malformed", f"{key}: a system text beside a message of the system")
        inline = [name for _, _, names in messages for name in names]
        if inline and (_as_list(entry.get("image")) or _as_list(entry.get("images"))):
            raise SkipSample("entry_malformed", f"{key}: images of its own beside those in its messages")
        record = Record(
            key=key,
            task=task,
            images=tuple(
                _image(name, root, key) for name in inline or _as_list(_either(entry, "image", "images", key))
            ),
            sizes=sizes(entry.get("width"), entry.get("height"), key),
            turns=turns,
            system=_string(entry["system"]) if entry.get("system") else system,
            question=_string(entry.get("question", "")),
            answer=_string(entry.get("answer", "")),
            choices=tuple(_string(choice) for choice in entry.get("choices") or []),
            regions=tuple(_region(region, key, ignore) for region in entry.get("regions") or []),
            meta=dict(entry.get("meta") or {}),
        )
        if not record.images:
            _check_no_picture(entry, key, ignore)
        return _marked(record)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        # The entry may hold anything. The counter matters; the message helps to find the fault.
        raise SkipSample("entry_malformed", f"{key}: {type(error).__name__}: {error}") from None


def to_entry(record: Record) -> dict[str, Any]:
    """The entry that `to_record` reads as this Record, without keys that have no value."""
    paths = [image.path for image in record.images]
    conversations = [
        {"from": speaker, "value": value}
        for turn in record.turns
        for speaker, value in (("human", turn.question), ("gpt", turn.answer))
    ]
    width, height = record.sizes[0] if record.sizes else (None, None)
    regions = [
        {"box": list(region.box)}
        | ({"label": region.label} if region.label else {})
        | ({"keypoints": [list(point) for point in region.keypoints]} if region.keypoints else {})
        for region in record.regions
    ]
    entry = {
        "id": record.key,
        "task": record.task,
        "image": paths[0] if len(paths) == 1 else paths,
        "width": width,
        "height": height,
        "conversations": conversations,
        "system": record.system,
        "question": record.question,
        "answer": record.answer,
        "choices": list(record.choices),
        "regions": regions,
        "meta": dict(record.meta),
    }
    return {key: value for key, value in entry.items() if value not in (None, "", [], {})}


def sizes(width: Any, height: Any, key: str) -> tuple[tuple[int, int], ...]:
    """((width, height),), or () if the annotation has no size. Whole numbers may be written as
    640.0.

    Raises:
        SkipSample: the values are no size in pixels.
    """
    if width is None or height is None:
        return ()
    sides = _side(width), _side(height)
    if not all(1 <= side <= MAX_SIDE for side in sides):
        raise SkipSample("size_malformed", f"{key}: {reprlib.repr((width, height))}")
    return (sides,)


def _side(value: Any) -> int:
    """A side in pixels; 0 if the value is no whole number."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return int(value) if whole and not isinstance(value, bool) else 0


def image_names(entry: Mapping[str, Any]) -> list[Any]:
    """The names of an entry's images, from the entry or its messages. Equal names mean equal
    images.

    Any object is accepted, even one that is no entry.
    """
    names = _as_list(entry.get("image")) or _as_list(entry.get("images"))
    for message in () if names else _as_list(entry.get("conversations")) or _as_list(entry.get("messages")):
        content = (message.get("value") or message.get("content")) if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict):
                names.append(_part_image(part))
    return [_plain_name(name) for name in names if name]


def _plain_name(name: Any) -> Any:
    if isinstance(name, dict):
        name = name.get("path")
    return name.removeprefix("file://").removeprefix("./") if isinstance(name, str) else name


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{reprlib.repr(value)} should be text")  # it may be deep or huge
    value.encode()  # a UnicodeEncodeError is a ValueError
    return value


def _check_keys(entry: Mapping[str, Any], names: Sequence[str], key: str, ignore: Container[str]) -> None:
    """Raises: SkipSample: media_unsupported, key_unknown."""
    for name, value in entry.items():
        if name in names or name in ABOUT or name in ignore or value is None or value in ("", [], {}):
            continue
        if _MEDIA.search(name):
            raise SkipSample("media_unsupported", f"{key}: '{name:.100}': the model sees images only")
        hint = suggest(name, names, "docs/data.md")
        raise SkipSample("key_unknown", f"{key}: '{name:.100}': {hint}; the source's ignore_keys=[...] passes over it")


def _check_no_picture(entry: Mapping[str, Any], key: str, ignore: Container[str]) -> None:
    """Raises: SkipSample: image_absent, if a key that is ignored names the picture of the entry."""
    for name in sorted(name for name in ABOUT.intersection(entry) if name not in ignore):
        value = entry[name]
        names = [part for part in _as_list(value) if isinstance(part, str)]
        if (name == "image_id" and value not in (None, "")) or any(map(_MEDIA_FILE.search, names)):
            raise SkipSample(
                "image_absent",
                f"{key}: '{name}' names a picture ({reprlib.repr(value)}) and there is no 'image'; the source's "
                f"ignore_keys=[{name}] passes over it",
            )


def _either(entry: Mapping[str, Any], ours: str, other: str, key: str) -> Any:
    """The value of one of two keys with the same meaning."""
    given = [entry[name] for name in (ours, other) if entry.get(name) not in (None, "", [])]
    if len(given) > 1:
        raise SkipSample("entry_malformed", f"{key}: both '{ours}' and '{other}'")
    return given[0] if given else None


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None or value == "" else [value]


def _image(name: Any, root: Path, key: str) -> ImageRef:
    if isinstance(name, dict):  # Hugging Face's form, also ms-swift's
        _check_keys(name, ("path",), key, ())
        name = name.get("path")
    if not _string(name).strip():
        raise SkipSample("image_absent", f"{key}: the name of an image is blank")
    if "://" in (path := _string(name).removeprefix("file://")) or path.startswith("data:"):
        raise SkipSample("image_remote", f"{key}: {path:.100}: download it and name its file")
    return ImageRef(str(root / path))


def _region(value: Mapping[str, Any], key: str, ignore: Container[str]) -> Region:
    _check_keys(value, ("box", "label", "keypoints"), key, ignore)
    x1, y1, x2, y2 = (float(number) for number in value["box"])
    keypoints = tuple((float(x), float(y), int(visibility)) for x, y, visibility in value.get("keypoints") or [])
    if any(point[2] not in (0, 1, 2) for point in value.get("keypoints") or []):
        raise SkipSample(
            "visibility_malformed", f"{key}: a keypoint is [x, y, visibility], of which the last is 0, 1 or 2"
        )
    return Region((x1, y1, x2, y2), _string(value.get("label", "")), keypoints)


def _message(message: Mapping[str, Any], key: str, ignore: Container[str]) -> tuple[str, Any, list[Any]]:
    """(speaker, content, names of the images in the content) of a message."""
    _check_keys(message, ("from", "value", "role", "content", "name"), key, ignore)
    speaker = _either(message, "from", "role", key)
    content = _either(message, "value", "content", key)
    if content is None:  # it may be blank
        content = message.get("value", message.get("content"))
    if not isinstance(content, list):
        return _SPEAKERS.get(speaker, str(speaker)), content, []
    parts = [_part(part, key, ignore) for part in content]
    return (
        _SPEAKERS.get(speaker, str(speaker)),
        "\n".join(text for text, _ in parts),
        [name for _, name in parts if name],
    )


def _part(part: Any, key: str, ignore: Container[str]) -> tuple[str, Any]:
    """The text of a part of a message, and the name of its image; None if it has no image."""
    if isinstance(part, str):
        return part, None
    kind = part["type"]
    if kind == "text":
        _check_keys(part, ("type", "text"), key, ignore)
        return _string(part["text"]), None
    if kind not in ("image", "image_url"):
        raise SkipSample("media_unsupported", f"{key}: a message has a part of type {kind!r:.100}")
    _check_keys(part, ("type", "image", "path", "image_url"), key, ignore)
    return PLACEHOLDER, _part_image(part)


def _part_image(part: Mapping[str, Any]) -> Any:
    name = part.get("image") or part.get("path") or part.get("image_url")
    return name.get("url", name) if isinstance(name, dict) else name


def _turns(messages: Sequence[tuple[str, Any, list[Any]]], key: str) -> tuple[str | None, tuple[Turn, ...]]:
    """The system text, None if the first message is not the system's, and the turns."""
    system = None
    if messages and messages[0][0] == "system":
        system, messages = _string(messages[0][1]), messages[1:]
    speakers = [speaker for speaker, _, _ in messages]
    if speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise SkipSample(
            "conversation_malformed",
            f"{key}: its speakers are {reprlib.repr(speakers)}: it must go human, gpt, human, gpt and end with gpt",
        )
    if any(names for speaker, _, names in messages if speaker == "gpt"):
        raise SkipSample("image_in_answer", f"{key}: an answer shows an image")
    values = [_string(value) for _, value, _ in messages]
    return system, tuple(itertools.starmap(Turn, zip(values[::2], values[1::2], strict=True)))


def _marked(record: Record) -> Record:
    """The record with `<image>` in place of the numbered marks of its questions.

    Raises:
        SkipSample: image_marks (numbered in another order), image_mark_unknown, media_unsupported.
    """
    asked = (record.question, *record.choices, *(turn.question for turn in record.turns))
    for text in asked:
        if mark := _MEDIA_MARK.search(text):
            raise SkipSample("media_unsupported", f"{record.key}: {mark[0]} in a question")
        plain_text = _NUMBERED_MARK.sub("", text) if record.images else ""
        if mark := _FOREIGN_MARK.search(text) or _ANY_MARK.search(plain_text):
            raise SkipSample("image_mark_unknown", f"{record.key}: {mark[0]:.100}: write {PLACEHOLDER}")
    numbers = [int(mark[1]) for text in asked for mark in _NUMBERED_MARK.finditer(text)]
    if not numbers:
        return record
    if numbers != list(range(1, len(numbers) + 1)):
        raise SkipSample("image_marks", f"{record.key}: its images are named in the order {reprlib.repr(numbers)}")

    def plain(text: str) -> str:
        return _NUMBERED_MARK.sub(PLACEHOLDER, text)

    return replace(
        record,
        question=plain(record.question),
        choices=tuple(map(plain, record.choices)),
        turns=tuple(Turn(plain(turn.question), turn.answer) for turn in record.turns),
    )
