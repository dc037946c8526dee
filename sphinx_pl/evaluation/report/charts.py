"""Line charts and interval bars as inline SVG; colours are the page's CSS variables, so they follow
light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sphinx_pl.evaluation.report.render import render

Points = Sequence[tuple[float, float]]
COLOURS = 7


@dataclass(frozen=True)
class Series:
    """A line through (x, y) points. `faint`: thin and without a name; `dots`: with marks."""

    name: str
    points: Points
    colour: int = 0
    faint: bool = False
    dots: bool = False


def smooth(points: Points, share: float = 0.04) -> list[tuple[float, float]]:
    """Moving average over `share` of the points, centred but for the last ones."""
    reach = max(1, round(len(points) * share / 2))
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    smoothed = []
    for i, (x, _) in enumerate(points):
        # Shorter at the start, where a loss falls steeply and a one-sided window would bend it;
        # one-sided at the end.
        before = min(reach, i)
        after = min(before, len(points) - 1 - i)
        smoothed.append((x, (sums[i + after + 1] - sums[i - before]) / (before + after + 1)))
    return smoothed


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) from low to high."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def line_chart(
    series: Sequence[Series], x_label: str = "", y_label: str = "", mark: float | None = None, small: bool = False
) -> Markup:
    """An SVG with axes, and names at the lines' right ends (none when `small`).

    Args:
        mark: an x with a vertical line.
    """
    width, height = (240, 110) if small else (960, 340)
    left, right, top, bottom = (30, 4, 6, 16) if small else (56, 190, 12, 44)
    xs = [x for line in series for x, _ in line.points]
    # A few early, huge values would flatten the rest, so the axis covers only the drawn averages.
    ys = [y for line in series if not line.faint for _, y in line.points] or [
        y for line in series for _, y in line.points
    ]
    if not xs:
        return Markup()
    x_low, x_high = min(xs), max(xs)
    margin = 0.05 * (max(ys) - min(ys)) or 0.5
    y_low, y_high = min(ys) - margin, max(ys) + margin

    def at_x(x: float) -> float:
        return left + (x - x_low) / ((x_high - x_low) or 1) * (width - left - right)

    def at_y(y: float) -> float:
        y = min(max(y, y_low), y_high)
        return height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom)

    def anchor(x: float) -> str:
        return "middle" if not small else "start" if x == x_low else "end"

    named = [] if small else [line for line in series if line.name and line.points]
    places = _apart([at_y(line.points[-1][1]) for line in named], 16, top + 6, height - bottom)
    x_ticks = [x_low, x_high] if small else ticks(x_low, x_high, 8)
    return render(
        "line_chart.html",
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        size=10 if small else 13,
        x_label=x_label,
        y_label=y_label,
        x_ticks=[(at_x(x), f"{x:,.6g}", anchor(x)) for x in x_ticks],
        y_ticks=[(at_y(y), y) for y in ticks(y_low, y_high, 2 if small else 5)],
        mark=None if mark is None else at_x(mark),
        lines=[
            {
                "points": [(at_x(x), at_y(y)) for x, y in line.points],
                "colour": line.colour % COLOURS,
                "faint": line.faint,
                "dots": line.dots,
            }
            for line in series
        ],
        names=[(line.name, line.colour % COLOURS, y) for line, y in zip(named, places, strict=True)],
    )


def interval_bar(score: float, low: float, high: float, baseline: float | None) -> Markup:
    """A score from 0 to 1 as a bar, with its interval as a thin line and the baseline as a tick."""
    width = 170
    tick = None if baseline is None else min(max(baseline * width, 1.0), width - 1.0)
    places = {"score": score * width, "low": low * width, "high": high * width, "baseline": tick}
    return render("interval_bar.html", width=width, **places)


def _apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near `wanted`, at least `gap` apart, between low and high where there is room."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places: list[float] = []
    for i in order:
        places.append(max(wanted[i], low if not places else places[-1] + gap))
    overflow = max(0.0, places[-1] - high) if places else 0.0
    limit = high
    for k in reversed(range(len(places))):
        places[k] = min(places[k], limit) if overflow else places[k]
        limit = places[k] - gap
    result = [0.0] * len(wanted)
    for place, i in zip(places, order, strict=True):
        result[i] = place
    return result
