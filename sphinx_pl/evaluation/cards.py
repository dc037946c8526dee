"""Answered questions as cards: the pictures with what question, answer and prediction name, and the three texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from sphinx_pl.data.bad import BadSample
from sphinx_pl.data.drawing import GIVEN, PREDICTED, TRUE, draw, to_picture
from sphinx_pl.data.geometry import Geometry
from sphinx_pl.data.images import load_image
from sphinx_pl.data.record import ImageRef
from sphinx_pl.data.show import encode
from sphinx_pl.page import visible

RIGHT = 0.5
"""The lowest score that is shown as right."""
PICTURE_SIDE = 256
"""Smaller pictures are enlarged to about this many pixels a side."""
PICTURE_BYTES = 60_000


def cards(predictions: Sequence[Mapping[str, Any]], size: int, geometry: Geometry) -> str:
    """The cards of predictions (`Prediction.to_dict`) in their order, above them the legend and a choice of task and
    verdict, which needs SCRIPT.

    Args:
        size: pixels a side of the images as the model saw them.
    """
    lost = 0
    articles = []
    for prediction in predictions:
        pictures, missing = _pictures(prediction, size, geometry)
        lost += missing
        articles.append(_card(prediction, pictures))
    options = "".join(f"<option>{escape(task)}</option>" for task in dict.fromkeys(p["task"] for p in predictions))
    note = f"{lost} pictures are left out: their image files could not be read."
    return (
        f'<p>Boxes and points: <span class=key style="--k:{TRUE}">true</span> '
        f'<span class=key style="--k:{PREDICTED}">predicted</span> '
        f'<span class=key style="--k:{GIVEN}">given in the question</span></p>'
        f"{f'<p class=missing>{note}</p>' if lost else ''}<form class=filter>"
        f"<label>task <select name=task><option value=''>all</option>{options}</select></label> "
        "<label>answers <select name=verdict><option value=''>all</option><option>right</option><option>wrong</option>"
        f"</select></label></form><div class=cards>{''.join(articles)}</div>"
    )


def picture(image: ImageRef, prediction: Mapping[str, Any], size: int, geometry: Geometry) -> Image.Image:
    """One image of a prediction as the model saw it, with what its texts name.

    Raises:
        BadSample: it cannot be read.
    """
    plain = to_picture(load_image(image, size), scale=max(1, PICTURE_SIDE // max(size, 1)))
    return draw(plain, prediction["answer"], prediction["prediction"], geometry, prediction["question"])


def _card(prediction: Mapping[str, Any], pictures: str) -> str:
    task = prediction["task"]
    verdict = "right" if prediction["score"] >= RIGHT else "wrong"
    where = " · ".join(escape(text) for text in (task, prediction["topic"], prediction["domain"]) if text)
    return (
        f'<article data-task="{escape(task)}" data-verdict="{verdict}">{pictures}<div><p class=where>{where} '
        f'<span class="{verdict}">{verdict} · {prediction["score"]:.2f}</span></p>'
        f"<p class=question>{visible(prediction['question'])}</p>"
        f"<p><span class=tag>true</span> {visible(prediction['answer'])}</p>"
        f"<p><span class=tag>model</span> {visible(prediction['prediction']) or '<i>nothing</i>'}</p></div></article>"
    )


def _pictures(prediction: Mapping[str, Any], size: int, geometry: Geometry) -> tuple[str, int]:
    """The images of a prediction as HTML, and how many of them could not be read."""
    html, lost = "", 0
    for image in prediction["images"]:
        try:
            drawn = picture(ImageRef(**image), prediction, size, geometry)
        except (BadSample, OSError):
            lost += 1
            continue
        address = encode(drawn, drawn.width > size, PICTURE_BYTES)
        html += f'<img alt="the image of the question" width={drawn.width} src="{address}">'
    return html, lost


STYLE = """
.up,.right{color:var(--up)}.flat{color:var(--soft)}.wrong{color:var(--bad)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(19rem,1fr));gap:1.2rem;align-items:start}
article img{display:block;width:100%;height:auto;image-rendering:pixelated}
article div{padding:.7rem .9rem .9rem;font-size:.92rem;line-height:1.45}article p{margin:.3rem 0;overflow-wrap:anywhere}
.question{white-space:pre-line}.tag{display:inline-block;min-width:3.8em;font-size:.76rem;color:var(--soft)}
"""

SCRIPT = """
const form=document.querySelectorAll("form.filter");
form.forEach(f=>f.addEventListener("change",()=>{
 const cards=f.nextElementSibling.querySelectorAll("article"),t=f.task.value,v=f.verdict.value;
 cards.forEach(c=>c.hidden=(t&&c.dataset.task!==t)||(v&&c.dataset.verdict!==v))}))
"""
