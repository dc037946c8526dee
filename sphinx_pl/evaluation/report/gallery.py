"""Cards of answered questions: pictures with the places that texts name, and the texts."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from markupsafe import Markup
from PIL import Image

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.drawing import GIVEN, PREDICTED, TRUE, draw, to_picture
from sphinx_pl.data.images import load_image
from sphinx_pl.data.schema import ImageRef
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.evaluation.report.render import asset, render
from sphinx_pl.evaluation.runner import benchmark_label
from sphinx_pl.utils.html import inline_picture

RIGHT = 0.5
"""The lowest score that is shown as right."""
PICTURE_SIDE = 256
"""Smaller pictures are enlarged to about this many pixels a side."""
PICTURE_BYTES = 60_000
DRAWN, WORST, MORE = "Drawn at random", "The worst mistakes", "More answers that are right or scored elsewhere"
SEED = 0
"""The seed that draws the first answers."""
MISTAKES = ("wrong", "unparsed")
ALL_BYTES, LEAST_BYTES = 7_500_000, 16_000
"""Bytes before base64: of all pictures of a page, which become smaller so that all fit, and the
least of one."""


def sections(
    predictions: Sequence[Mapping[str, Any]], drawn: int, wrong: int, right: int, at_most: int
) -> list[tuple[str, Mapping[str, Any]]]:
    """The predictions to show, each once, with a heading that says how it was chosen.

    The first are `drawn` predictions of each benchmark and task, drawn at random with a fixed seed
    whatever they score. Then come the mistakes and right answers that `choose` takes from the
    others.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for place, prediction in enumerate(predictions):
        groups[_group(prediction)].append(place)
    rng = random.Random(SEED)
    draws = [rng.sample(group, min(drawn, len(group))) for group in groups.values()]
    places = [place for turn in zip_longest(*draws) for place in turn if place is not None][:at_most]
    kept = set(places)
    others = [prediction for place, prediction in enumerate(predictions) if place not in kept]
    more = choose(others, wrong, right, at_most - len(places))
    return [
        *((DRAWN, predictions[place]) for place in places),
        *((WORST if outcome(prediction) in MISTAKES else MORE, prediction) for prediction in more),
    ]


def choose(predictions: Sequence[Mapping[str, Any]], wrong: int, right: int, at_most: int) -> list[Mapping[str, Any]]:
    """The predictions to show: the worst `wrong` ones and `right` right ones of each benchmark and
    task.

    Among equally bad ones the categories take turns. They and the right ones are spread evenly over
    the data, since the first are often of one kind. The worst of all groups come first. Right ones
    come last, with as many that are scored elsewhere.
    """
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for prediction in predictions:
        groups[_group(prediction)].append(prediction)
    queues = [_worst(group, wrong) for group in groups.values()]
    queues += [_spread([p for p in group if outcome(p) in ("right", "elsewhere")], right) for group in groups.values()]
    bad, good = queues[: len(groups)], queues[len(groups) :]
    turns = [p for part in (bad, good) for turn in zip_longest(*part) for p in turn if p is not None]
    return turns[:at_most]


def outcome(prediction: Mapping[str, Any]) -> str:
    """right, wrong, unparsed, or elsewhere, where the truth is not public or a judge decides."""
    if prediction.get("benchmark") and not prediction["metric"]:
        return "elsewhere"
    if prediction["score"] >= RIGHT:
        return "right"
    return "wrong" if prediction.get("parsed", True) else "unparsed"


def _group(prediction: Mapping[str, Any]) -> str:
    """The benchmark, else the task."""
    return benchmark_label(prediction["key"]) if prediction.get("benchmark") else str(prediction["task"])


def _worst(predictions: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    by_score: dict[float, dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for prediction in predictions:
        if outcome(prediction) in MISTAKES:
            by_score[prediction["score"]][prediction["topic"]].append(prediction)
    worst: list[Mapping[str, Any]] = []
    for _, topics in sorted(by_score.items()):
        if len(worst) >= count:
            break
        parts = [_spread(part, count) for part in topics.values()]
        worst += [p for turn in zip_longest(*parts) for p in turn if p is not None]
    return worst[:count]


def _spread(items: list[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """At most `count` items, evenly spread."""
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)] if len(items) > count else items


def cards(
    predictions: Sequence[Mapping[str, Any]], size: int, coordinates: Coordinates, headings: Sequence[str] = ()
) -> Markup:
    """The cards of predictions (`Prediction.to_dict`) in their order, below a legend and filters.

    The filters choose by heading, task, category and outcome, and need SCRIPT. With it, 24 cards
    are shown at first.

    Args:
        headings: the heading of each prediction, by which they are in order; () for none.
        size: pixels a side of the images as the model saw them.
    """
    number = sum(len(prediction["images"]) for prediction in predictions)
    limit = min(PICTURE_BYTES, max(LEAST_BYTES, ALL_BYTES // max(number, 1)))
    categories: dict[str, dict[str, int]] = {}
    articles: list[dict[str, Any]] = []
    last = ""
    for prediction, heading in zip_longest(predictions, headings, fillvalue=""):
        assert isinstance(prediction, Mapping)
        group = _group(prediction)
        topics = categories.setdefault(group, {})
        category = topics.setdefault(prediction["topic"], sum(map(len, categories.values())))
        pictures, missing = _pictures(prediction, size, coordinates, limit)
        result = outcome(prediction)
        articles.append(
            {
                "prediction": prediction,
                "group": group,
                "category": category,
                "heading": heading,
                "new_heading": heading if heading != last else "",
                "pictures": pictures,
                "missing": missing,
                "where": " · ".join(filter(None, (group, prediction["topic"], prediction["domain"]))),
                "outcome": result,
                "colour": {"right": "right", "elsewhere": "flat"}.get(result, "wrong"),
            }
        )
        last = heading
    return render(
        "gallery.html",
        colours={"true": TRUE, "predicted": PREDICTED, "given": GIVEN},
        lost=sum(article["missing"] for article in articles),
        groups=list(categories),
        headings=list(dict.fromkeys(headings)),
        categories={group: topics for group, topics in categories.items() if len(topics) > 1},
        articles=articles,
    )


def picture(image: ImageRef, prediction: Mapping[str, Any], size: int, coordinates: Coordinates) -> Image.Image:
    """One image of a prediction as the model saw it, with the places that its texts name.

    Raises:
        SkipSample: it cannot be read.
    """
    plain = to_picture(load_image(image, size), scale=max(1, PICTURE_SIDE // max(size, 1)))
    return draw(plain, prediction["answer"], prediction["prediction"], coordinates, prediction["question"])


def _pictures(
    prediction: Mapping[str, Any], size: int, coordinates: Coordinates, limit: int
) -> tuple[list[dict[str, Any]], int]:
    """The images of a prediction, of about `limit` bytes each, and the number of unreadable ones."""
    pictures, lost = [], 0
    for image in prediction["images"]:
        try:
            drawing = picture(ImageRef.from_dict(image), prediction, size, coordinates)
        except (SkipSample, OSError):
            lost += 1
            continue
        flat = drawing.width > size
        pictures.append({"flat": flat, "width": drawing.width, "address": inline_picture(drawing, flat, limit)})
    return pictures, lost


STYLE = asset("gallery.css")
SCRIPT = asset("gallery.js")
