"""A page with the samples as the model sees them: the first thing to look at in a new data set.

    sphinx-data show experiment=demo stage=finetune n=64 out=page.html

Nothing here is a second way to read data: steps come from the planner, micro-batches from the
collator, and targets from `Batch.labels`. Everything from data is untrusted and is escaped on the
page.
"""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import groupby

from PIL import Image

from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.drawing import GIVEN, TRUE, draw, to_picture
from sphinx_pl.data.inspect.unpack import ShownSample, Token, texts, unpack
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.sampling.packing import WEIGHTINGS
from sphinx_pl.data.sampling.planner import MicroPlan, Planner
from sphinx_pl.data.sampling.stream import MADE
from sphinx_pl.data.schema import IMAGE_SLOT, Sample
from sphinx_pl.data.skip import counter_of, split_counter
from sphinx_pl.data.tokenizers import Tokenizer
from sphinx_pl.utils.html import inline, inline_png, page, table, visible

TINY = 128
"""Images with at most so many pixels a side are enlarged four times, each pixel as a flat square.
"""
PICTURE_BYTES = 7_500_000
"""Bytes of all pictures together, before base64. Each sample's pictures get an equal part, and at
least 16 kB."""
DRAWN_ROWS = 128
COLUMN = 384
"""Width of the pictures' column in pixels; larger pictures can be enlarged."""


def build_page(
    data: DataModule, n: int, accumulate: int, grid: int, what: str, notices: Sequence[str] = ()
) -> tuple[str, int]:
    """The page, and the number of samples on it: the first `n`, fewer if the mixture ends before.

    Args:
        accumulate: micro-batches of an optimizer step.
        grid: sub-images a side that the model cuts an image into.
        what: the configuration in words. notices: sentences at the beginning of the page.

    Raises:
        UserError: nothing can be read.
    """
    planner = data.planner(accumulate)
    plans: list[MicroPlan] = []
    shown: list[ShownSample] = []
    decoded: Counter[str] = Counter()
    while len(shown) < n and (micro_batches := planner.plan()):
        plans += micro_batches
        for plan in micro_batches:
            if len(shown) < n:
                batch = data.collator(plan.rows)
                decoded.update({key: int(v) for key, v in batch.counters.items() if key.startswith("skipped/")})
                shown += unpack(batch, plan, data.processor, len(shown) + 1)[: n - len(shown)]
    colours = _colours(name for plan in plans for row in plan.rows for sample in row for name in [sample.source])
    limit = max(PICTURE_BYTES // n, 16_000)
    notices = [*notices, *_problems(planner, shown, data.max_skipped)]
    sections = [
        ("totals", "What training reads", _totals(plans, data.packing.weighting, colours)),
        ("left-out", "What was left out", _left_out(planner, decoded)),
        ("packing", "Packing", _packing(plans, shown, data.packing.row_length, colours)),
        ("samples", "Samples", _samples(shown, data.processor, grid, limit, colours)),
    ]
    links = " ".join(f'<a href="#{anchor}">{heading}</a>' for anchor, heading, _ in sections)
    steps = plans[-1].step if plans else 0
    lead = (
        f"The first {len(shown)} samples that training would get, as the model gets them: {what}. They come from "
        f"{_count(steps, 'step')}, each with the {_count(accumulate * data.packing.micro_batch_rows, 'row')} of "
        f"{data.packing.row_length:,} positions that one process reads for it."
    )
    header = f"<h1>The data, seen</h1><p class=lead>{visible(lead)}</p>"
    header += "".join(f"<p class=notice>{visible(notice)}</p>" for notice in notices)
    body = "".join(f'<section id="{anchor}"><h2>{heading}</h2>{text}</section>' for anchor, heading, text in sections)
    return page("The data, seen", f"{header}<nav>{links}</nav>", body, _STYLE, _SCRIPT), len(shown)


def _problems(planner: Planner, shown: Sequence[ShownSample], max_skipped: float) -> Iterator[str]:
    if broken := [item.number for item in shown if item.broken]:
        numbers = ", ".join(f"#{number}" for number in broken[:10]) + (", …" if len(broken) > 10 else "")
        yield (
            f"{_count(len(broken), 'sample')} of the {len(shown)} shown cannot be learned from, for an image that "
            f"cannot be read: {numbers}"
        )
    counts = _counts(planner)
    seen = sum(value for key, value in counts.items() if key.endswith("/seen"))
    skipped = sum(value for key, value in counts.items() if key.startswith("skipped/"))
    if skipped > max_skipped * max(seen, 1):
        yield (
            f"{skipped / max(seen, 1):.0%} of {seen:,} records could not be used: training stops above "
            f"data.max_skipped={max_skipped:.0%}"
        )
    if not shown:
        yield "There is not a single sample: every source has ended"


# --- totals


def _totals(plans: Sequence[MicroPlan], weighting: str, colours: dict[str, str]) -> str:
    """Of every source and of its tasks. What questions of several tasks share is in a line of its
    own."""
    columns = ("samples", "questions", "tokens", "targets", "images")
    sums: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    loss: dict[tuple[str, str], float] = defaultdict(float)
    for sample in (sample for plan in plans for row in plan.rows for sample in row):
        of_source = sums[sample.source]
        tasks = {question.task for question in sample.questions}
        whole = of_source[next(iter(tasks)) if len(tasks) == 1 else "shared by several tasks"]
        whole.update(samples=1, tokens=len(sample.prefix), images=len(sample.images))
        for question in sample.questions:
            targets = sum(question.supervised[1:])
            of_source[question.task].update(questions=1, tokens=len(question.ids), targets=targets)
            if targets:
                loss[sample.source, question.task] += WEIGHTINGS[weighting](targets) * targets
    whole_loss = sum(loss.values()) or 1.0

    def cells(counters: Iterable[Counter[str]], share: float) -> list[str]:
        total: Counter[str] = Counter()
        for counter in counters:
            total.update(counter)
        numbers = [f"{total[column]:,}" if total[column] else "–" for column in columns]
        return [*numbers, f"{share / whole_loss:.1%}" if share else "–"]

    rows = [["<b>all</b>", "", *cells((c for tasks in sums.values() for c in tasks.values()), whole_loss)]]
    for source, tasks_of in sorted(sums.items()):
        key = f'<span class="key full" style="--k:{colours[source]}">{visible(source)}</span>'
        names = sorted(tasks_of)
        total = sum(loss[source, task] for task in names)
        rows.append([key, escape(names[0]) if len(names) == 1 else "", *cells(tasks_of.values(), total)])
        if len(names) > 1:
            rows += [
                ["", f"<span class=sub>{escape(task)}</span>", *cells([tasks_of[task]], loss[source, task])]
                for task in names
            ]
    head = ["source", "task", "samples", "questions", "tokens", "targets", "images", "of the loss"]
    return (
        f"<p>All rows of the planned steps. A sample may ask several questions about the same image, whose tokens "
        f"it pays once. Targets are the tokens that are learned; the last column is their share of the loss with "
        f"weighting “{escape(weighting)}”.</p>" + table(head, rows, set(range(2, 8)))
    )


def _counts(planner: Planner) -> Counter[str]:
    """`source/seen`, `skipped/source/reason`, ... of all that was drawn, also of samples that no
    step holds yet."""
    counts: Counter[str] = Counter()
    for partition in planner.partitions.values():
        counts.update(partition.mixture.counts)
        counts.update(partition.mixture.left_out)
    return counts


def _left_out(planner: Planner, decoded: Counter[str]) -> str:
    """A table of what was drawn, what of it was skipped, and what happened to the rest, with
    examples."""
    counts = _counts(planner)
    examples: dict[str, list[str]] = defaultdict(list)
    for partition in planner.partitions.values():
        for name, stream in partition.mixture.streams.items():
            for counter, details in stream.examples.items():
                examples[counter_of(name, counter)] += details
    rows = []
    for name in sorted(planner.mixture.streams):
        found = []
        for key, number in sorted(counts.items()):
            source, what = split_counter(key)
            how, _, reason = what.partition("/")
            if source == name and reason and number:
                found.append((f"{how}: {reason}", number, _short("; ".join(filter(None, examples[key][:2])))))
            elif source == name and how not in MADE and number:
                found.append((f"used: {how}", number, _short("; ".join(filter(None, examples[key][:2])))))
        for key, number in sorted(decoded.items()):
            _, source, reason = key.split("/", 2)
            if source == name:
                found.append((f"decoded, then masked: {reason}", number, "<small>marked among the samples</small>"))
        seen = counts[f"{name}/seen"]
        begin = [f"<b>{visible(name)}</b>", f"{seen:,}"]
        for what, number, example in found or [("nothing", 0, "")]:
            share = [f"{number:,}", f"{number / seen:.1%}" if seen else ""] if number else ["", ""]
            rows.append([*begin, visible(what), *share, example])
            begin = ["", ""]
    head = ["source", "records read", "left out", "records", "", "for example"]
    return (
        "<p>Skipped: broken or unusable. Filtered: sound, but the source’s filters do not want it. Capped: enough of "
        "its task in this epoch. Used: what happened to records that are trained on. Images are decoded only for the "
        "samples below, so broken ones show only there.</p>" + table(head, rows, {1, 3, 4})
    )


def _short(text: str, limit: int = 240) -> str:
    return f"<small>{visible(text[:limit])}{'…' if len(text) > limit else ''}</small>" if text else ""


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each source; hues a golden angle apart never come near each other."""
    return {name: f"hsl({(210 + 137.5 * i) % 360:.0f} 48% 52%)" for i, name in enumerate(sorted(set(names)))}


# --- packing


def _packing(plans: Sequence[MicroPlan], shown: Sequence[ShownSample], row_length: int, colours: dict[str, str]) -> str:
    numbers = {id(item.sample): item.number for item in shown}
    blocks: list[str] = []
    left = DRAWN_ROWS
    for step, group in groupby(plans, key=lambda plan: plan.step):
        rows = [(plan, i, row) for plan in group for i, row in enumerate(plan.rows)]
        used = sum(sample.length for _, _, row in rows for sample in row)
        bars = [
            _bar(f"{plan.index + 1}.{i + 1}", row, row_length, numbers, colours)
            for plan, i, row in rows[: max(left, 0)]
        ]
        left -= len(rows)
        more = f"<p class=note>{_count(len(rows) - len(bars), 'more row')}.</p>" if len(rows) > len(bars) else ""
        positions = len(rows) * row_length
        share = f"step {step}: {used / positions:.1%} of {positions:,} positions hold tokens"
        opened = " open" if not blocks else ""
        blocks.append(f"<details{opened}><summary>{share}</summary>{''.join(bars)}{more}</details>")
    legend = "".join(
        f'<span class="key full" style="--k:{colour}">{visible(name)}</span>' for name, colour in colours.items()
    )
    return (
        "<p>Each bar is a row of a step, named micro-batch.row, with the share of its positions that hold tokens. "
        "A piece is a sample: its width is its number of tokens, the hatched parts are image tokens. What is blank "
        "at the end is padding. Numbers are those of the samples below.</p>"
        f"<p class=legend>{legend}</p>{''.join(blocks)}"
    )


def _bar(name: str, row: Sequence[Sample], length: int, numbers: dict[int, int], colours: dict[str, str]) -> str:
    pieces = []
    for sample in row:
        ids = [*sample.prefix, *(id for question in sample.questions for id in question.ids)]
        inner = ""
        for is_image, run in groupby(ids, key=lambda id: id == IMAGE_SLOT):
            inner += f'<i{" class=im" if is_image else ""} style="flex:{sum(1 for _ in run)}"></i>'
        number = numbers.get(id(sample))
        title = (
            f"{sample.source}: {_count(sample.length, 'token')}, {_count(len(sample.images), 'image')}, "
            f"{_count(len(sample.questions), 'question')}, {_count(sample.targets, 'target')}"
        )
        tag, link = ("a", f' href="#s{number}"') if number else ("span", "")
        pieces.append(
            f'<{tag} class=seg{link} style="flex:{sample.length};--k:{colours[sample.source]}" '
            f'title="{visible(title)}">{inner}<em>{number or ""}</em></{tag}>'
        )
    used = sum(sample.length for sample in row)
    if used < length:
        pieces.append(f'<span class=pad style="flex:{length - used}" title="{length - used} of padding"></span>')
    bar, share = "".join(pieces), f"{used / length:.0%}"
    return f"<div class=row><small>{name}</small><div class=bar>{bar}</div><small>{share}</small></div>"


# --- samples


def _samples(shown: Sequence[ShownSample], processor: Processor, grid: int, limit: int, colours: dict[str, str]) -> str:
    views = ""
    if grid > 1 and any(item.pictures for item in shown):
        views = f" <span><span class=cut></span> the {grid} × {grid} sub-images that it sees besides the whole"
        views += ", crossed out where they show only padding and are skipped" if processor.view_tokens else ""
        views += "</span>"
    options = {
        "source": sorted({item.sample.source for item in shown}),
        "task": sorted({question.task for item in shown for question, _ in item.questions}),
    }
    filters = "".join(
        f"<label>{name} <select name={name}><option value=''>all</option>"
        + "".join(f"<option>{visible(value)}</option>" for value in values)
        + "</select></label>"
        for name, values in options.items()
    )
    return (
        "<p class=legend><span class=text><b>supervised</b></span>what the model learns to write, "
        "<span class=text><i>not supervised</i></span>what it only reads, "
        "<span class=text><span class=im>image 1 × 16</span></span>visual tokens. Rest the pointer on a token for its "
        "id and weight.</p>"
        f'<p class=legend>On the pictures, read back from the text: <span class=key style="--k:{TRUE}">the answer’s '
        f'boxes and points</span> <span class=key style="--k:{GIVEN}">the question’s</span>{views}</p>'
        f"<form class=filter hidden>{filters}</form><div class=list>"
        + "".join(_card(item, processor, grid, limit, colours) for item in shown)
        + "</div>"
    )


def _card(item: ShownSample, processor: Processor, grid: int, limit: int, colours: dict[str, str]) -> str:
    sample = item.sample
    tasks = " ".join(sorted({question.task for question in sample.questions}))
    figures = "".join(_figure(item, i, processor, grid, limit // len(item.pictures)) for i in range(len(item.pictures)))
    drawn = ""
    if len(item.pictures) > 1 and _mentions(item, processor):
        drawn = "<p class=note>The text does not say which image it means: boxes are drawn on the first.</p>"
    parts = ""
    if item.shared:
        head = f"shared by {_count(len(item.questions), 'question')} · {_count(len(item.shared), 'token')}"
        parts += f"<p class=where>{head}</p><div class=text>{_text(item.shared, processor.tokenizer)}</div>"
    for question, tokens in item.questions:
        targets = sum(token.target for token in tokens)
        head = f"<span><b>{escape(question.task)}</b> · {visible(question.key)}</span>"
        if len(item.questions) > 1:
            head += f"<span>{_count(len(tokens), 'token')}, {targets:,} supervised</span>"
        parts += f"<p class=where>{head}</p><div class=text>{_text(tokens, processor.tokenizer)}</div>"
    broken = "<p class=notice>An image cannot be read, so nothing of this sample is learned.</p>" if item.broken else ""
    return (
        f'<article id=s{item.number} data-source="{visible(sample.source)}" data-task="{escape(tasks)}">'
        f"<p class=where><span><b>#{item.number}</b> "
        f'<span class="key full" style="--k:{colours[sample.source]}">{visible(sample.source)}</span></span>'
        f"<span>{_count(sample.length, 'token')}, {item.targets:,} supervised · {item.place}</span></p>"
        f'<div class="{"sides" if figures else "alone"}">'
        + (f"<div class=pictures>{figures}{drawn}</div>" if figures else "")
        + f"<div>{broken}{parts}</div></div></article>"
    )


def _mentions(item: ShownSample, processor: Processor) -> bool:
    """Whether the sample's text names a place in an image."""
    coordinates = processor.coordinates
    said = [text for pair in texts(item, processor.tokenizer) for text in pair]
    return any(coordinates.parse_boxes(text) or coordinates.parse_points(text) for text in said)


def _figure(item: ShownSample, index: int, processor: Processor, grid: int, limit: int) -> str:
    """One image as the model gets it, with outlined views; on the first image also the places that
    the text names."""
    picture = item.pictures[index]
    side = int(picture.pixels.shape[-1])
    name = f"image {index + 1}" if len(item.pictures) > 1 else "image"
    if picture.problem:
        return f"<figure class=broken><b>broken {name}</b>{visible(picture.problem)}</figure>"
    scale = 4 if side <= TINY else 1
    canvas = to_picture(picture.pixels, scale)
    if index == 0:
        for question, answer in texts(item, processor.tokenizer):
            canvas = draw(canvas, answer, "", processor.coordinates, question)
    count = 1 if grid == 1 else 1 + grid * grid
    caption = f"{name}, {side} × {side} pixels{f', shown {scale}×' if scale > 1 else ''}; {_count(count, 'view')}"
    skipped = picture.kept_views.count(False)
    caption += f", {skipped} skipped" if skipped else ""
    alt = f"{name} of sample {item.number}"
    enlarge = (
        f'<input type=checkbox title="press to enlarge" aria-label="enlarge {alt}">' if canvas.width > COLUMN else ""
    )
    tag = "label" if enlarge else "div"
    return (
        f"<figure><{tag} class=canvas>{enlarge}"
        f'<img alt="{alt}" width={canvas.width} height={canvas.height} src="{encode(canvas, scale > 1, limit)}">'
        f"{_views(grid, picture.kept_views)}</{tag}><figcaption>{caption}</figcaption></figure>"
    )


def _views(grid: int, kept_views: Sequence[bool]) -> str:
    """The outlines of the whole and of its grid x grid sub-images, row by row; skipped ones are
    crossed out."""
    lines = "".join(f"M{i} 0V{grid}M0 {i}H{grid}" for i in range(grid + 1))
    crosses = ""
    for i, visible_view in enumerate(kept_views[1:]):
        if not visible_view:
            y, x = divmod(i, grid)
            crosses += f"M{x} {y}l1 1m0 -1l-1 1"
    crossed = f'<path class=skipped d="{crosses}"/>' if crosses else ""
    return (
        f'<svg viewBox="0 0 {grid} {grid}" preserveAspectRatio=none aria-hidden=true>'
        f'{crossed}<path class=rim d="{lines}"/><path class=cuts d="{lines}"/></svg>'
    )


def encode(picture: Image.Image, flat: bool, limit: int) -> str:
    """A data URL of a picture, at most about `limit` bytes. It is exact if `flat` colours keep it
    small."""
    if flat and len(address := inline_png(picture)) * 3 / 4 <= limit:
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


def _text(tokens: Sequence[Token], tokenizer: Tokenizer) -> str:
    """Every token as an HTML element: <b> is supervised, <i> is not. A chip stands for an image's
    tokens."""
    html = ""
    held: list[Token] = []  # the bytes of a character, which is shown as one
    data = b""

    def flush() -> str:
        nonlocal data
        text, data = data.decode(errors="replace"), b""
        element = _element(held, text) if held else ""
        held.clear()
        return element

    for image, run in groupby(tokens, key=lambda token: token.image):
        if image:
            html += f"{flush()}<span class=im>image {image} × {sum(1 for _ in run)}</span>"
            continue
        for token in run:
            piece = tokenizer.piece(token.id)
            if isinstance(piece, str):
                html += flush() + _element([token], piece, special=tokenizer.is_special(token.id))
                continue
            if held and (held[0].target, held[0].weight) != (token.target, token.weight):
                html += flush()
            held.append(token)
            data += piece
            if _is_whole(data) or len(data) == 4:
                html += flush()
    return html + flush()


def _is_whole(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _element(tokens: Sequence[Token], text: str, special: bool = False) -> str:
    target = tokens[0].target
    title = "id " + " ".join(str(token.id) for token in tokens)
    title += f", weight {tokens[0].weight:.3g}" if target else ""
    many = f" data-n={len(tokens)}" if len(tokens) > 1 else ""
    tag = "b" if target else "i"
    # A line break is shown and made.
    shown = visible(text).replace("\n", "⏎\n")
    return f'<{tag}{" class=x" if special else ""}{many} title="{title}">{shown}</{tag}>'


_STYLE = """
body{max-width:84rem}
h2{margin-top:3rem}p.lead{max-width:52rem}
.notice{max-width:52rem;border-left:4px solid var(--bad);padding:.3rem .8rem;background:var(--card);color:var(--bad)}
.legend{max-width:none;font-size:.88rem;display:flex;flex-wrap:wrap;align-items:center;gap:.2rem .7rem;
font-family:system-ui,"Segoe UI",Helvetica,Arial,sans-serif}
.full::before{background:var(--k)}.key{overflow-wrap:anywhere;padding-left:1.5em}
td .key{margin:0}td small{white-space:normal;overflow-wrap:anywhere}td:last-child{min-width:12rem}
#totals td:last-child{min-width:0}
.row{display:grid;grid-template-columns:3.4rem 1fr 2.8rem;gap:.5rem;align-items:center;margin:.15rem 0}
.row small{font-variant-numeric:tabular-nums;white-space:nowrap}.row small:last-child{text-align:right}
.bar{display:flex;height:1.35rem;border:1px solid var(--line);border-radius:3px;overflow:hidden;background:var(--card)}
.seg{display:flex;position:relative;min-width:0;overflow:hidden;background:var(--k)}
.seg::after{content:"";position:absolute;inset:0 0 0 auto;width:2px;background:var(--card)}
.seg i{min-width:0}.seg .im{background:repeating-linear-gradient(135deg,#0007 0 3px,#0003 3px 6px)}
.seg em{position:absolute;inset:0;text-align:center;color:#fff;font:600 .72rem/1.3rem system-ui,sans-serif;
text-shadow:0 0 3px #000,0 0 2px #000}
.pad{min-width:0}a.seg:hover{filter:brightness(1.2)}
.list{display:grid;gap:1.2rem}
article{padding:.7rem .9rem .9rem;scroll-margin-top:1rem}article:target{outline:3px solid var(--c0)}
article p{max-width:none}.where{flex-wrap:wrap;gap:.1rem 1.2rem;margin:.2rem 0 .3rem;overflow-wrap:anywhere}
.where b{color:var(--ink)}
.sides{display:grid;grid-template-columns:minmax(9rem,24rem) minmax(0,1fr);gap:1.1rem;align-items:start}
.pictures figure{margin:0 0 .7rem}figcaption{margin-top:.2rem;font-size:.8rem}
.canvas{position:relative;display:block;width:fit-content;max-width:100%}
.canvas input{position:absolute;inset:0;width:100%;height:100%;margin:0;opacity:0;z-index:1;cursor:zoom-in}
.canvas:focus-within{outline:2px solid var(--c0)}
.canvas img{display:block;max-width:100%;height:auto;image-rendering:auto}
.canvas svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
.canvas path{fill:none;vector-effect:non-scaling-stroke}
.rim{stroke:#fff;stroke-width:2.5px;opacity:.8}.cuts{stroke:#111;stroke-width:1.2px;stroke-dasharray:6 4}
.skipped{stroke:#c21e1e;stroke-width:1.5px;opacity:.75}
.cut{width:1.6em;height:1.1em;border:1.5px dashed currentColor;display:inline-block;
vertical-align:middle}
.sides:has(:checked){grid-template-columns:1fr}.canvas :checked{cursor:zoom-out}
.broken{display:block;padding:1.2rem .9rem;border:2px dashed var(--bad);color:var(--bad);overflow-wrap:anywhere;
font:.85rem/1.4 system-ui,sans-serif}.broken b{display:block}
.text{font:.84rem/1.75 ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;white-space:pre-wrap;
overflow-wrap:anywhere;max-height:26rem;overflow:auto;margin-bottom:.8rem}
.text b,.text i{font:inherit;unicode-bidi:isolate;border-radius:2px;padding:.1em 0;
box-shadow:inset -1px 0 color-mix(in srgb,currentColor 28%,transparent)}
.text i{color:var(--soft)}.text b{color:var(--learn);background:var(--learned);border-bottom:2px solid var(--learn)}
.text .x{font-size:.8em;border:1px solid;border-radius:.6em;padding:0 .35em;margin:0 .1em}
.text .im{font-size:.9em;border-radius:.3em;padding:.05em .45em;margin:0 .15em;color:#fff;white-space:nowrap;
background:#5b616c}
.legend .text{margin:0;overflow:visible}
.filter[hidden]{display:none}.filter label{color:var(--soft)}
:root{--learn:#00684a;--learned:#00a87826}
@media(prefers-color-scheme:dark){:root{--learn:#7fe3c0;--learned:#00a87838}}
@media(max-width:44rem){body{padding:1.4rem .8rem 3rem}h1{font-size:1.9rem}h2{margin-top:2.2rem}
.sides{grid-template-columns:minmax(0,1fr)}th,td{padding-right:.8rem}
.row{grid-template-columns:2.4rem 1fr 2.4rem;gap:.3rem}}
"""

_SCRIPT = """
const form=document.querySelector("form.filter");form.hidden=false;
form.addEventListener("change",()=>{const s=form.source.value,t=form.task.value;
document.querySelectorAll("article").forEach(a=>a.hidden=(s&&a.dataset.source!==s)||
(t&&!a.dataset.task.split(" ").includes(t)))})
"""
