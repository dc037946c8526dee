"""Answered questions as cards: the pictures with what question, answer and prediction name, and the three texts."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from PIL import Image

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.drawing import GIVEN, PREDICTED, TRUE, draw, to_picture
from sphinx_pl.data.images import load_image
from sphinx_pl.data.inspect.samples import encode
from sphinx_pl.data.schema import ImageRef
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.evaluation.runner import benchmark_label
from sphinx_pl.utils.html import visible

RIGHT = 0.5
"""The lowest score that is shown as right."""
PICTURE_SIDE = 256
"""Smaller pictures are enlarged to about this many pixels a side."""
PICTURE_BYTES = 60_000
DRAWN, WORST, MORE = "Drawn at random", "The worst mistakes", "More answers that are right or scored elsewhere"
SEED = 0
"""Draws the answers that are shown first."""
ALL = "<option value=''>all</option>"
MISTAKES = ("wrong", "unparsed")
ALL_BYTES, LEAST_BYTES = 7_500_000, 16_000
"""Before base64: of one picture; of a page's, which are made smaller so that all fit; and how small they may become."""


def sections(
    predictions: Sequence[Mapping[str, Any]], drawn: int, wrong: int, right: int, at_most: int
) -> list[tuple[str, Mapping[str, Any]]]:
    """The predictions to show, each with a heading that says how it was chosen; none is shown twice.

    First of each benchmark and task `drawn` ones, drawn at random whatever they score, with a fixed seed: they look as
    the model does. Then what `choose` finds among the others: mistakes, and right answers.
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
        *((WORST if verdict(prediction) in MISTAKES else MORE, prediction) for prediction in more),
    ]


def choose(predictions: Sequence[Mapping[str, Any]], wrong: int, right: int, at_most: int) -> list[Mapping[str, Any]]:
    """The predictions to show: of each benchmark and task the worst `wrong` ones and `right` right ones.

    Of equally bad ones each category gets its turn, so that none hides the others; they and the right ones are spread
    evenly over the data, neither the first, which are of one kind, nor picked by hand. The worst of all groups come
    first, the right ones last, and as many of those that are scored elsewhere.
    """
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for prediction in predictions:
        groups[_group(prediction)].append(prediction)
    queues = [_worst(group, wrong) for group in groups.values()]
    queues += [_spread([p for p in group if verdict(p) in ("right", "elsewhere")], right) for group in groups.values()]
    bad, good = queues[: len(groups)], queues[len(groups) :]
    turns = [p for part in (bad, good) for turn in zip_longest(*part) for p in turn if p is not None]
    return turns[:at_most]


def verdict(prediction: Mapping[str, Any]) -> str:
    """right, wrong, unparsed, or elsewhere: where the truth is not public, or a judge has to decide."""
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
        if verdict(prediction) in MISTAKES:
            by_score[prediction["score"]][prediction["topic"]].append(prediction)
    found: list[Mapping[str, Any]] = []
    for _, topics in sorted(by_score.items()):
        if len(found) >= count:
            break
        parts = [_spread(part, count) for part in topics.values()]
        found += [p for turn in zip_longest(*parts) for p in turn if p is not None]
    return found[:count]


def _spread(items: list[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """At most `count` of the items, evenly spread."""
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)] if len(items) > count else items


def cards(
    predictions: Sequence[Mapping[str, Any]], size: int, coordinates: Coordinates, headings: Sequence[str] = ()
) -> str:
    """The cards of predictions (`Prediction.to_dict`) in their order, above them the legend and choices of heading,
    task, category and verdict, which need SCRIPT; with it, 24 are shown at first.

    Args:
        headings: of each prediction, by which they are in order; () for none.
        size: pixels a side of the images as the model saw them.
    """
    lost = 0
    number = sum(len(prediction["images"]) for prediction in predictions)
    limit = min(PICTURE_BYTES, max(LEAST_BYTES, ALL_BYTES // max(number, 1)))
    categories_of: dict[str, dict[str, int]] = {}
    articles: list[str] = []
    last = ""
    for prediction, heading in zip_longest(predictions, headings, fillvalue=""):
        assert isinstance(prediction, Mapping)
        topics = categories_of.setdefault(_group(prediction), {})
        category = topics.setdefault(prediction["topic"], sum(map(len, categories_of.values())))
        pictures, missing = _pictures(prediction, size, coordinates, limit)
        lost += missing
        articles.append(f"<h3>{visible(heading)}</h3>" if heading != last else "")
        articles.append(_card(prediction, pictures, category, heading))
        last = heading
    options = "".join(f"<option>{visible(group)}</option>" for group in categories_of)
    chosen = "".join(f"<option>{visible(heading)}</option>" for heading in dict.fromkeys(headings))
    categories = "".join(
        f'<optgroup label="{visible(group)}">'
        + "".join(f"<option value={part}>{visible(topic) or 'none'}</option>" for topic, part in topics.items())
        + "</optgroup>"
        for group, topics in categories_of.items()
        if len(topics) > 1
    )
    narrower = f"<label>category <select name=part>{ALL}{categories}</select></label>" if categories else ""
    note = f"{lost} {'picture is' if lost == 1 else 'pictures are'} left out: the image files could not be read."
    return (
        f'<p>Boxes and points: <span class=key style="--k:{TRUE}">true</span> '
        f'<span class=key style="--k:{PREDICTED}">predicted</span> '
        f'<span class=key style="--k:{GIVEN}">given in the question</span></p>'
        f"{f'<p class=missing>{note}</p>' if lost else ''}<form class=filter>"
        f"{f'<label>chosen <select name=chosen>{ALL}{chosen}</select></label>' if chosen else ''}"
        f"<label>asked <select name=task>{ALL}{options}</select></label>{narrower}"
        f"<label>answers <select name=verdict>{ALL}<option value=wrong>wrong</option>"
        "<option value=unparsed>unparsed</option><option value=right>right</option>"
        "<option value=elsewhere>scored elsewhere</option></select></label>"
        f"<output>{len(predictions)} shown</output></form><div class=cards>{''.join(articles)}</div>"
        "<button type=button class=more hidden>Show more</button>"
    )


def picture(image: ImageRef, prediction: Mapping[str, Any], size: int, coordinates: Coordinates) -> Image.Image:
    """One image of a prediction as the model saw it, with what its texts name.

    Raises:
        SkipSample: it cannot be read.
    """
    plain = to_picture(load_image(image, size), scale=max(1, PICTURE_SIDE // max(size, 1)))
    return draw(plain, prediction["answer"], prediction["prediction"], coordinates, prediction["question"])


def _card(prediction: Mapping[str, Any], pictures: str, category: int, heading: str) -> str:
    """`category`: the number of its category among all that are shown."""
    group = _group(prediction)
    found = verdict(prediction)
    said = "scored elsewhere" if found == "elsewhere" else f"{found} · {prediction['score']:.2f}"
    where = " · ".join(visible(text) for text in (group, prediction["topic"], prediction["domain"]) if text)
    colour = {"right": "right", "elsewhere": "flat"}.get(found, "wrong")
    return (
        f'<article data-task="{visible(group)}" data-part="{category}" data-verdict="{found}" '
        f'data-chosen="{visible(heading)}">{pictures}<div>'
        f'<p class=where><span>{where}</span> <span class="{colour}">{said}</span></p>'
        f"<p class=question>{visible(prediction['question'])}</p>"
        f"<p><span class=tag>true</span> {visible(prediction['answer'])}</p>"
        f"<p><span class=tag>model</span> {visible(prediction['prediction']) or '<i>nothing</i>'}</p></div></article>"
    )


def _pictures(prediction: Mapping[str, Any], size: int, coordinates: Coordinates, limit: int) -> tuple[str, int]:
    """The images of a prediction as HTML of about `limit` bytes each, and how many of them could not be read."""
    html, lost = "", 0
    for image in prediction["images"]:
        try:
            drawn = picture(ImageRef.from_dict(image), prediction, size, coordinates)
        except (SkipSample, OSError):
            lost += 1
            continue
        flat = drawn.width > size
        address = encode(drawn, flat, limit)
        kind = " class=flat" if flat else ""
        html += f'<img alt="the image of the question"{kind} width={drawn.width} src="{address}">'
    return html, lost


STYLE = """
.up,.right{color:var(--up)}.flat{color:var(--soft)}.wrong{color:var(--bad)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(19rem,1fr));gap:1.2rem;align-items:start}
.cards h3{grid-column:1/-1;margin:.4rem 0 0}
article img{display:block;width:100%;height:auto}article img.flat{image-rendering:pixelated}
article div{padding:.7rem .9rem .9rem;font-size:.92rem;line-height:1.45}article p{margin:.3rem 0;overflow-wrap:anywhere}
.more{font:inherit;font-size:.9rem;margin:1.2rem 0;padding:.4rem 1.2rem;color:var(--c0);background:var(--card);
border:1px solid var(--line);border-radius:6px;cursor:pointer}
.question{white-space:pre-line}.tag{display:inline-block;min-width:3.8em;font-size:.76rem;color:var(--soft)}
"""

SCRIPT = """
document.querySelectorAll("form.filter").forEach(f=>{
 const list=f.nextElementSibling,cards=[...list.querySelectorAll("article")],more=list.nextElementSibling;
 const said=f.querySelector("output"),part=f.part;let most=24;
 const show=()=>{const t=f.task.value,k=f.chosen?f.chosen.value:"",p=part?part.value:"",v=f.verdict.value;let n=0;
  cards.forEach(c=>{const d=c.dataset;c.hidden=(t&&d.task!==t)||(k&&d.chosen!==k)||(p&&d.part!==p)||
   (v==="wrong"?d.verdict!==v&&d.verdict!=="unparsed":v&&d.verdict!==v);if(!c.hidden&&++n>most)c.hidden=true});
  list.querySelectorAll("h3").forEach(h=>{let c=h.nextElementSibling;
   while(c&&c.hidden&&c.tagName!=="H3")c=c.nextElementSibling;h.hidden=!c||c.tagName==="H3"});
  more.hidden=n<=most;
  said.textContent=n?Math.min(n,most)+" of "+n:"none of these answers: choose something else"};
 more.addEventListener("click",()=>{most+=24;show()});
 f.addEventListener("change",e=>{most=24;if(part&&e.target===f.task){part.value="";
  part.querySelectorAll("optgroup").forEach(g=>g.hidden=g.disabled=!!f.task.value&&g.label!==f.task.value)}show()});
 show()})
"""
