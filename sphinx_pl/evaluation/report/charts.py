"""Line charts and interval bars as inline SVG; colours are the page's CSS variables, so they follow
light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]
COLOURS = 7


@dataclass(frozen=True)
class Series:
    """A line through (x, y) points. `faint`: thin, behind, without a name; `dots`: with a mark at
    each point."""

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
) -> str:
    """An SVG with axes, and names at the lines' right ends (none when `small`). `mark`: an x with a
    vertical line."""
    width, height = (240, 110) if small else (960, 340)
    left, right, top, bottom = (30, 4, 6, 16) if small else (56, 190, 12, 44)
    xs = [x for line in series for x, _ in line.points]
    # A few early, huge values would flatten the rest: the axis covers what the drawn averages
    # cover.
    ys = [y for line in series if not line.faint for _, y in line.points] or [
        y for line in series for _, y in line.points
    ]
    if not xs:
        return ""
    x_low, x_high = min(xs), max(xs)
    margin = 0.05 * (max(ys) - min(ys)) or 0.5
    y_low, y_high = min(ys) - margin, max(ys) + margin

    def at_x(x: float) -> float:
        return left + (x - x_low) / ((x_high - x_low) or 1) * (width - left - right)

    def at_y(y: float) -> float:
        y = min(max(y, y_low), y_high)
        return height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom)

    size = 10 if small else 13
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" font-size="{size}" fill="var(--soft)">']
    for y in ticks(y_low, y_high, 2 if small else 5):
        parts.append(f'<path d="M{left} {at_y(y):.1f}H{width - right}" stroke="var(--line)"/>')
        parts.append(f'<text x="{left - 6}" y="{at_y(y) + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in [x_low, x_high] if small else ticks(x_low, x_high, 8):
        anchor = "middle" if not small else ("start" if x == x_low else "end")
        parts.append(f'<text x="{at_x(x):.1f}" y="{height - bottom + size + 3}" text-anchor="{anchor}">{x:,.6g}</text>')
    if x_label:
        middle = left + (width - left - right) / 2
        parts.append(f'<text x="{middle}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>')
    if y_label:
        middle = top + (height - top - bottom) / 2
        parts.append(
            f'<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
        )
    if mark is not None:
        parts.append(
            f'<path d="M{at_x(mark):.1f} {top}V{height - bottom}" stroke="var(--ink)" stroke-dasharray="3 4"/>'
        )
    for line in series:
        colour = f"var(--c{line.colour % COLOURS})"
        path = "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in line.points)
        style = 'stroke-width="1" opacity=".28"' if line.faint else 'stroke-width="2"'
        if path:
            parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-linejoin="round" {style}/>')
        if line.dots:
            parts += [
                f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3.2" fill="{colour}"/>' for x, y in line.points
            ]
    if not small:
        named = [line for line in series if line.name and line.points]
        places = _apart([at_y(line.points[-1][1]) for line in named], 16, top + 6, height - bottom)
        for line, y in zip(named, places, strict=True):
            x = width - right + 12
            parts.append(
                f'<text x="{x}" y="{y + 4:.1f}" fill="var(--c{line.colour % COLOURS})">{escape(line.name)}</text>'
            )
    return "".join([*parts, "</svg>"])


def interval_bar(score: float, low: float, high: float, baseline: float | None) -> str:
    """A score in 0..1 as a bar, its interval as a thin line and the baseline as a tick."""
    width = 170
    parts = [
        f'<svg width="{width}" height="16" viewBox="0 0 {width} 16" role="img">',
        f'<path d="M0 8H{width}" stroke="var(--line)"/>',
        f'<rect y="4" width="{score * width:.1f}" height="8" rx="1.5" fill="var(--c0)" opacity=".55"/>',
        f'<path d="M{low * width:.1f} 8H{high * width:.1f}" stroke="var(--ink)" stroke-width="1.4"/>',
    ]
    if baseline is not None:
        x = min(max(baseline * width, 1.0), width - 1.0)
        parts.append(f'<path d="M{x:.1f} 0V16" stroke="var(--c1)" stroke-width="2.4"/>')
    return "".join([*parts, "</svg>"])


def _apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near `wanted`, at least `gap` apart, between low and high where there is room."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed: list[float] = []
    for i in order:
        placed.append(max(wanted[i], low if not placed else placed[-1] + gap))
    overflow = max(0.0, placed[-1] - high) if placed else 0.0
    limit = high
    for k in reversed(range(len(placed))):
        placed[k] = min(placed[k], limit) if overflow else placed[k]
        limit = placed[k] - gap
    result = [0.0] * len(wanted)
    for place, i in zip(placed, order, strict=True):
        result[i] = place
    return result
