"""The position of a run in its data, of lists, dicts, strings and numbers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sphinx_pl.data.schema import ImageRef, Sample, SampleQuestion


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The states of the planners of all ranks as one."""
    number = max(state["number"] for state in states)  # ranks reach the end of a finite mixture one by one
    return states[0] | {
        "number": number,
        "partitions": {name: value for state in states for name, value in state["partitions"].items()},
    }


def sample_to_plain(sample: Sample) -> dict[str, Any]:
    """A drawn sample as a checkpoint holds it."""
    return {
        "prefix": list(sample.prefix),
        "questions": [[list(q.ids), list(q.supervised), q.task, q.key] for q in sample.questions],
        "images": [
            [image.path, image.offset, image.size, list(image.crop or ()), image.flip, list(image.annotated or ())]
            for image in sample.images
        ],
        "source": sample.source,
        "kept_views": [list(views) for views in sample.kept_views],
    }


def sample_from_plain(plain: Mapping[str, Any]) -> Sample:
    """The sample that `sample_to_plain` wrote."""
    return Sample(
        plain["prefix"],
        [SampleQuestion(*question) for question in plain["questions"]],
        tuple(
            # Older checkpoints do not have the annotated size.
            ImageRef(path, offset, size, tuple(crop) or None, flip, *(tuple(pair) or None for pair in annotated))
            for path, offset, size, crop, flip, *annotated in plain["images"]
        ),
        plain["source"],
        tuple(tuple(views) for views in plain["kept_views"]),
    )


_PLANNER = {"lane_count": "partition_count", "lanes": "partitions"}
_STREAM = {"branches": "questions_per_sample"}
_SAMPLE = {"branches": "questions", "seen": "kept_views"}


def upgraded(state: Mapping[str, Any]) -> dict[str, Any]:
    """A data module's state with the names of today, whichever version of this project wrote it."""
    planner = _with_names(state["planner"], _PLANNER)
    if "partition_count" in planner:
        planner["partitions"] = {name: _partition(value) for name, value in planner["partitions"].items()}
    counts = state.get("counts", {})
    counts = {name.replace("skipped/windows/", "skipped/steps/"): count for name, count in counts.items()}
    return {**state, "planner": planner, "counts": counts}


def _partition(state: Mapping[str, Any]) -> dict[str, Any]:
    mixture = state["mixture"]
    streams = {name: _with_names(stream, _STREAM) for name, stream in mixture["streams"].items()}
    pending = [_with_names(sample, _SAMPLE) for sample in state["pending"]]
    return {**state, "mixture": {**mixture, "streams": streams}, "pending": pending}


def _with_names(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in values.items()}
