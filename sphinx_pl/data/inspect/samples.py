"""A page with the samples as the model sees them: the first thing to look at in a new data set.

    sphinx-data show experiment=demo stage=finetune n=64 out=page.html

Nothing here is a second way to read data: steps come from the planner, micro-batches from the
collator, and targets from `Batch.labels`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

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
from sphinx_pl.utils.html import Templates, inline_picture, page

TINY = 128
"""Images of at most this many pixels a side are enlarged four times, in flat squares."""
PICTURE_BYTES = 7_500_000
"""Bytes of all pictures together, before base64. Each sample gets an equal part."""
DRAWN_ROWS = 128
COLUMN = 384
"""Width of the pictures' column in pixels; larger pictures can be enlarged."""


_TEMPLATES = Templates(Path(__file__).with_name("templates"))


def build_page(
    data: DataModule, n: int, accumulate: int, grid: int, what: str, notices: Sequence[str] = ()
) -> tuple[str, int]:
    """The page, and the number of samples on it: the first `n`, fewer if the mixture ends before.

    Args:
        accumulate: micro-batches of an optimizer step.
        grid: sub-images a side that the model cuts an image into.
        what: the configuration in words.
        notices: sentences at the beginning of the page.

    Raises:
        UserError: nothing can be read.
    """
    planner = data.planner(accumulate)
    plans: list[MicroPlan] = []
    samples: list[ShownSample] = []
    decoded: Counter[str] = Counter()
    while len(samples) < n and (micro_batches := planner.plan()):
        plans += micro_batches
        for plan in micro_batches:
            if len(samples) < n:
                batch = data.collator(plan.rows)
                decoded.update({key: int(v) for key, v in batch.counters.items() if key.startswith("skipped/")})
                samples += unpack(batch, plan, data.processor, len(samples) + 1)[: n - len(samples)]
    limit = max(PICTURE_BYTES // n, 16_000)
    header = _TEMPLATES.render(
        "header.html",
        lead=f"The first {len(samples)} samples that training would get, as the model gets them: {what}. They come "
        f"from {_count(plans[-1].step if plans else 0, 'step')}, each with the "
        f"{_count(accumulate * data.packing.micro_batch_rows, 'row')} of {data.packing.row_length:,} positions that "
        "one process reads for it.",
        notices=[*notices, *_problems(planner, samples, data.max_skipped)],
    )
    main = _TEMPLATES.render(
        "samples.html",
        colours=_colours(name for plan in plans for row in plan.rows for sample in row for name in [sample.source]),
        totals=_totals(plans, data.packing.weighting),
        weighting=data.packing.weighting,
        skips=_skips(planner, decoded),
        steps=_steps(plans, samples, data.packing.row_length),
        cards=[_card(item, data.processor, grid, limit) for item in samples],
        filters={
            "source": sorted({item.sample.source for item in samples}),
            "task": sorted({question.task for item in samples for question, _ in item.questions}),
        },
        places={"answer": TRUE, "question": GIVEN},
        grid=grid if any(item.pictures for item in samples) else 1,
        skips_views=bool(data.processor.view_tokens),
    )
    return page("The data, seen", header, main, *map(_TEMPLATES.asset, ("samples.css", "samples.js"))), len(samples)


def _problems(planner: Planner, samples: Sequence[ShownSample], max_skipped: float) -> Iterator[str]:
    if broken := [item.number for item in samples if item.broken]:
        numbers = ", ".join(f"#{number}" for number in broken[:10]) + (", …" if len(broken) > 10 else "")
        yield (
            f"{_count(len(broken), 'sample')} of the {len(samples)} shown cannot be learned from, for an image that "
            f"cannot be read: {numbers}"
        )
    counts = _counts(planner)
    records = sum(value for key, value in counts.items() if key.endswith("/seen"))
    skipped = sum(value for key, value in counts.items() if key.startswith("skipped/"))
    if skipped > max_skipped * max(records, 1):
        yield (
            f"{skipped / max(records, 1):.0%} of {records:,} records could not be used: training stops above "
            f"data.max_skipped={max_skipped:.0%}"
        )
    if not samples:
        yield "There is not a single sample: every source has ended"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each source; hues a golden angle apart never come near each other."""
    return {name: f"hsl({(210 + 137.5 * i) % 360:.0f} 48% 52%)" for i, name in enumerate(sorted(set(names)))}


def _totals(plans: Sequence[MicroPlan], weighting: str) -> list[dict[str, Any]]:
    """The rows of the first table: all samples, each source, and its tasks if it has several.

    What questions of several tasks share is in a row of its own.
    """
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

    every = cells((counter for tasks in sums.values() for counter in tasks.values()), whole_loss)
    rows: list[dict[str, Any]] = [{"source": None, "task": "", "cells": every}]
    for source, tasks_of in sorted(sums.items()):
        names = sorted(tasks_of)
        total = sum(loss[source, task] for task in names)
        task = names[0] if len(names) == 1 else ""
        rows.append({"source": source, "task": task, "cells": cells(tasks_of.values(), total)})
        if len(names) > 1:
            rows += [{"source": "", "task": n, "cells": cells([tasks_of[n]], loss[source, n])} for n in names]
    return rows


def _counts(planner: Planner) -> Counter[str]:
    """`source/seen`, `skipped/source/reason`, ... of all that was drawn, also of samples that no
    step holds yet."""
    counts: Counter[str] = Counter()
    for partition in planner.partitions.values():
        counts.update(partition.mixture.counts)
        counts.update(partition.mixture.left_out)
    return counts


def _skips(planner: Planner, decoded: Counter[str]) -> list[dict[str, Any]]:
    """The rows of the second table: the records that each source drew, those that it skipped, and
    what happened to the rest, with examples."""
    counts = _counts(planner)
    examples: dict[str, list[str]] = defaultdict(list)
    for partition in planner.partitions.values():
        for name, stream in partition.mixture.streams.items():
            for counter, details in stream.examples.items():
                examples[counter_of(name, counter)] += details
    rows: list[dict[str, Any]] = []
    for name in sorted(planner.mixture.streams):
        reasons: list[tuple[str, int, str]] = []
        for key, number in sorted(counts.items()):
            source, what = split_counter(key)
            how, _, reason = what.partition("/")
            if source == name and number and (reason or how not in MADE):
                label = f"{how}: {reason}" if reason else f"used: {how}"
                reasons.append((label, number, "; ".join(filter(None, examples[key][:2]))))
        for key, number in sorted(decoded.items()):
            _, source, reason = key.split("/", 2)
            if source == name:
                reasons.append((f"decoded, then masked: {reason}", number, "marked among the samples"))
        total = counts[f"{name}/seen"]
        for place, (label, number, example) in enumerate(reasons or [("nothing", 0, "")]):
            share = f"{number / total:.1%}" if number and total else ""
            row = {"reason": label, "number": number, "share": share, "example": example}
            rows.append(row | {"source": "" if place else name, "records": "" if place else f"{total:,}"})
    return rows


def _steps(plans: Sequence[MicroPlan], samples: Sequence[ShownSample], row_length: int) -> Iterator[dict[str, Any]]:
    """The rows of each step; those of the first DRAWN_ROWS as bars."""
    numbers = {id(item.sample): item.number for item in samples}
    left = DRAWN_ROWS
    for step, group in groupby(plans, key=lambda plan: plan.step):
        rows = [(plan, i, row) for plan in group for i, row in enumerate(plan.rows)]
        used, positions = sum(sample.length for _, _, row in rows for sample in row), len(rows) * row_length
        bars = [_bar(f"{plan.index + 1}.{i + 1}", row, row_length, numbers) for plan, i, row in rows[: max(left, 0)]]
        left -= len(rows)
        more = _count(len(rows) - len(bars), "more row") if len(rows) > len(bars) else ""
        share = f"step {step}: {used / positions:.1%} of {positions:,} positions hold tokens"
        yield {"share": share, "bars": bars, "more": more}


def _bar(name: str, row: Sequence[Sample], length: int, numbers: dict[int, int]) -> dict[str, Any]:
    pieces = []
    for sample in row:
        ids = [*sample.prefix, *(id for question in sample.questions for id in question.ids)]
        title = (
            f"{sample.source}: {_count(sample.length, 'token')}, {_count(len(sample.images), 'image')}, "
            f"{_count(len(sample.questions), 'question')}, {_count(sample.targets, 'target')}"
        )
        pieces.append(
            {
                "sample": sample,
                "number": numbers.get(id(sample)),
                "title": title,
                "runs": [(image, sum(1 for _ in run)) for image, run in groupby(ids, key=lambda i: i == IMAGE_SLOT)],
            }
        )
    used = sum(sample.length for sample in row)
    return {"name": name, "pieces": pieces, "padding": length - used, "share": f"{used / length:.0%}"}


def _card(item: ShownSample, processor: Processor, grid: int, limit: int) -> dict[str, Any]:
    several = len(item.questions) > 1
    parts: list[dict[str, Any]] = []
    if item.shared:
        size = f"shared by {_count(len(item.questions), 'question')} · {_count(len(item.shared), 'token')}"
        parts.append({"question": None, "size": size, "elements": _elements(item.shared, processor.tokenizer)})
    for question, tokens in item.questions:
        targets = sum(token.target for token in tokens)
        size = f"{_count(len(tokens), 'token')}, {targets:,} supervised" if several else ""
        parts.append({"question": question, "size": size, "elements": _elements(tokens, processor.tokenizer)})
    pictures = len(item.pictures)
    return {
        "item": item,
        "tasks": " ".join(sorted({question.task for question in item.sample.questions})),
        "size": f"{_count(item.sample.length, 'token')}, {item.targets:,} supervised · {item.place}",
        "figures": [_figure(item, i, processor, grid, limit // pictures) for i in range(pictures)],
        "on_first": pictures > 1 and _mentions(item, processor),
        "parts": parts,
    }


def _mentions(item: ShownSample, processor: Processor) -> bool:
    """Whether the sample's text names a place in an image."""
    coordinates = processor.coordinates
    every = [text for pair in texts(item, processor.tokenizer) for text in pair]
    return any(coordinates.parse_boxes(text) or coordinates.parse_points(text) for text in every)


def _figure(item: ShownSample, index: int, processor: Processor, grid: int, limit: int) -> dict[str, Any]:
    """One image as the model gets it, with the outlines of its views.

    The places that the text names are drawn on the first image.
    """
    picture = item.pictures[index]
    side = int(picture.pixels.shape[-1])
    name = f"image {index + 1}" if len(item.pictures) > 1 else "image"
    if picture.problem:
        return {"name": name, "problem": picture.problem}
    scale = 4 if side <= TINY else 1
    canvas = to_picture(picture.pixels, scale)
    if index == 0:
        for question, answer in texts(item, processor.tokenizer):
            canvas = draw(canvas, answer, "", processor.coordinates, question)
    count = 1 if grid == 1 else 1 + grid * grid
    caption = f"{name}, {side} × {side} pixels{f', shown {scale}×' if scale > 1 else ''}; {_count(count, 'view')}"
    skipped = [divmod(place, grid) for place, is_kept in enumerate(picture.kept_views[1:]) if not is_kept]
    return {
        "problem": "",
        "alt": f"{name} of sample {item.number}",
        "canvas": canvas,
        "address": inline_picture(canvas, scale > 1, limit),
        "large": canvas.width > COLUMN,
        "skipped": skipped,
        "caption": caption + (f", {len(skipped)} skipped" if skipped else ""),
    }


def _elements(tokens: Sequence[Token], tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """The elements that a text is shown as: a token, the tokens that are one character together, or
    all tokens of an image."""
    character: list[Token] = []
    data = b""

    def flush() -> Iterator[dict[str, Any]]:
        nonlocal data
        if character:
            yield _element(character, data.decode(errors="replace"))
        character.clear()
        data = b""

    for image, run in groupby(tokens, key=lambda token: token.image):
        if image:
            yield from flush()
            yield {"image": image, "count": sum(1 for _ in run)}
            continue
        for token in run:
            piece = tokenizer.piece(token.id)
            if isinstance(piece, str):
                yield from flush()
                yield _element([token], piece, special=tokenizer.is_special(token.id))
                continue
            if character and (character[0].target, character[0].weight) != (token.target, token.weight):
                yield from flush()
            character.append(token)
            data += piece
            if _is_whole(data) or len(data) == 4:
                yield from flush()
    yield from flush()


def _is_whole(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _element(tokens: Sequence[Token], text: str, special: bool = False) -> dict[str, Any]:
    target = tokens[0].target
    title = "id " + " ".join(str(token.id) for token in tokens)
    title += f", weight {tokens[0].weight:.3g}" if target else ""
    # A line break is shown and made.
    shown = text.replace("\n", "⏎\n")
    return {"image": 0, "target": target, "special": special, "count": len(tokens), "title": title, "text": shown}
