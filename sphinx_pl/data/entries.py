"""One entry of an instruction file, as a Record and back.

The format is LLaVA's, with optional keys of ours:

    {"id", "image": path or list of paths, "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}],
     "task", "question", "answer", "choices", "regions": [{"box": [x1, y1, x2, y2], "label",
     "keypoints": [[x, y, visibility], ...]}], "width", "height", "meta"}

`width` and `height` are those of the (only) image, in pixels like the boxes. Other keys are ignored.
"""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sphinx_pl.data.bad import BadSample
from sphinx_pl.data.record import ImageRef, Record, Region, Turn
from sphinx_pl.data.tasks import TASKS

MAX_SIDE = 1 << 24
"""Pixels; what an annotation says beyond it is an error."""

# ShareGPT's exports have both of a pair.
_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


def to_record(entry: Mapping[str, Any], key: str, root: Path, default_task: str) -> Record:
    """The Record of an entry; its images lie below `root`.

    Raises:
        BadSample: the entry does not have the form above.
    """
    try:
        task = entry.get("task", default_task)
        if task not in TASKS:
            raise BadSample("task_unknown", f"{key}: {task!r:.100}")
        return Record(
            key=key,
            task=task,
            images=tuple(ImageRef(str(root / image)) for image in _as_list(entry.get("image") or [])),
            sizes=sizes(entry.get("width"), entry.get("height"), key),
            turns=_turns(entry.get("conversations") or [], key),
            question=_string(entry.get("question", "")),
            answer=_string(entry.get("answer", "")),
            choices=tuple(_string(choice) for choice in entry.get("choices") or []),
            regions=tuple(_region(region) for region in entry.get("regions") or []),
            meta=dict(entry.get("meta") or {}),
        )
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        # Whatever the entry holds instead of what it should: the counter is what matters, the message is a help.
        raise BadSample("entry_malformed", f"{key}: {type(error).__name__}: {error}") from None


def to_entry(record: Record) -> dict[str, Any]:
    """The entry that `to_record` reads as this Record; keys without a value are left out."""
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
        "question": record.question,
        "answer": record.answer,
        "choices": list(record.choices),
        "regions": regions,
        "meta": dict(record.meta),
    }
    return {key: value for key, value in entry.items() if value not in (None, "", [], {})}


def sizes(width: Any, height: Any, key: str) -> tuple[tuple[int, int], ...]:
    """((width, height),), or () where the annotation does not say.

    Raises:
        BadSample: they are no size in pixels.
    """
    if width is None or height is None:
        return ()
    if not all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in (width, height)):
        raise BadSample("size_malformed", f"{key}: {reprlib.repr((width, height))}")
    return ((width, height),)


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{reprlib.repr(value)} should be text")  # it may be deep, or huge
    value.encode()  # a UnicodeEncodeError is a ValueError
    return value


def _as_list(value: Any) -> list[str]:
    return [_string(item) for item in (value if isinstance(value, list) else [value])]


def _region(value: Mapping[str, Any]) -> Region:
    x1, y1, x2, y2 = (float(number) for number in value["box"])
    keypoints = tuple((float(x), float(y), int(visibility)) for x, y, visibility in value.get("keypoints") or [])
    return Region((x1, y1, x2, y2), _string(value.get("label", "")), keypoints)


def _turns(conversations: Sequence[Mapping[str, Any]], key: str) -> tuple[Turn, ...]:
    speakers = [_SPEAKERS.get(message["from"], message["from"]) for message in conversations]
    if speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise BadSample("conversation_malformed", f"{key}: {reprlib.repr(speakers)}")
    values = [_string(message["value"]) for message in conversations]
    return tuple(itertools.starmap(Turn, zip(values[::2], values[1::2], strict=True)))
