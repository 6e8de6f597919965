"""Small SVG charts as Markdown images: the stages, a loss curve, scores with their intervals.

The dashboard strips inline `<svg>` but shows images from data URIs, on a light or a dark page: so the charts have no
background and use tones that can be read on both.
"""

import base64
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import pairwise

INK, GRID = "#6b7785", "#6b778540"
TUNED, BASE = "#3b82f6", "#94a3b8"
WIDTH = 640
POINTS = 240
"""A line is drawn through at most so many means: more cannot be seen at this width."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A named step and what is to say of it."""

    label: str
    note: str
    color: str
    dashed: bool


@dataclass(frozen=True)
class Bar:
    """A value with its confidence interval."""

    label: str
    value: float
    low: float
    high: float
    tuned: bool
    """Drawn in the accent colour; what it is compared with is drawn in grey."""


def image(svg: str, title: str) -> str:
    """Markdown that shows an SVG."""
    return f"![{title}](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})"


def chain(boxes: Sequence[Box]) -> str:
    """SVG of boxes in a row, an arrow from each to the next."""
    height, gap = 54, 14.0
    width = (WIDTH - 2 - gap * (len(boxes) - 1)) / len(boxes)
    body = []
    for index, box in enumerate(boxes):
        left, dashes = 1 + index * (width + gap), ' stroke-dasharray="4 3"' * box.dashed
        if index:
            body.append(f'<path d="M{left - gap + 2:.1f} 27h{gap - 5}m-4 -4l4 4l-4 4" stroke="{INK}" fill="none"/>')
        body += [
            f'<rect x="{left:.1f}" y="2" width="{width:.1f}" height="50" rx="6" fill="{box.color}" '
            f'fill-opacity="0.16" stroke="{box.color}" stroke-width="1.5"{dashes}/>',
            _text(left + width / 2, 24, box.label),
            f'<g font-size="11">{_text(left + width / 2, 41, box.note, color=box.color)}</g>',
        ]
    return _svg(height, body)


def curve(values: Sequence[Point], up: str, height: int = 280) -> str:
    """SVG of (step, value): every step faint, their moving mean strong, and the upward axis named `up`. What is no
    number is left out."""
    steps = thinned([(step, value) for step, value in values if math.isfinite(value)])
    plot = _Plot(steps, height)
    body = [
        *plot.axes("step", up),
        plot.line(steps, TUNED, 1.0, 0.45),
        plot.line(smoothed(steps), TUNED, 2.0, 1.0),
    ]
    return _svg(height, body)


def interval_bars(bars: Sequence[Bar], label: str) -> str:
    """SVG of horizontal bars from zero with interval whiskers, one a line, in the order given; axis named `label`."""
    left, right, top, row = 190.0, WIDTH - 70.0, 8.0, 30.0
    height = int(top + row * len(bars) + 42)
    ticks = nice_ticks(min(0.0, *(b.low for b in bars)), max(1e-9, *(b.high for b in bars)), 5)
    low, high = ticks[0], ticks[-1]

    def x(value: float) -> float:
        return left + (right - left) * (value - low) / (high - low)

    bottom = top + row * len(bars)
    body = []
    for tick in ticks:
        body.append(_rule(x(tick), top, x(tick), bottom, GRID))
        body.append(_text(x(tick), bottom + 16, number(tick)))
    for index, bar in enumerate(bars):
        middle = top + row * index + row / 2
        start, end = sorted((x(0.0), x(bar.value)))
        color = TUNED if bar.tuned else BASE
        body += [
            _text(left - 10, middle + 4, bar.label, anchor="end"),
            f'<rect x="{start:.1f}" y="{middle - 9:.1f}" width="{max(end - start, 1):.1f}" height="18" rx="3" '
            f'fill="{color}" fill-opacity="0.75"/>',
            _rule(x(bar.low), middle, x(bar.high), middle, INK, 1.5),
            _rule(x(bar.low), middle - 5, x(bar.low), middle + 5, INK, 1.5),
            _rule(x(bar.high), middle - 5, x(bar.high), middle + 5, INK, 1.5),
            _text(x(bar.high) + 8, middle + 4, number(bar.value), anchor="start"),
        ]
    body.append(_text((left + right) / 2, height - 4, label))
    return _svg(height, body)


def thinned(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """The points, or the means of `most` even runs of them."""
    if len(points) <= most:
        return list(points)
    edges = [round(i * len(points) / most) for i in range(most + 1)]
    return [_mean(points[a:b]) for a, b in pairwise(edges)]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """A centred moving mean of the losses over about a twentieth of the points."""
    reach = max(1, len(points) // 40)
    around = (points[max(0, i - reach) : i + reach + 1] for i in range(len(points)))
    return [(x, _mean(near)[1]) for (x, _), near in zip(points, around, strict=True)]


def _mean(points: Sequence[Point]) -> Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that enclose low…high, some `about` of them."""
    size = max(abs(low), abs(high))
    span = max((high - low) or size or 1.0, 1e-6 * size, 1e-9)
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """A number for an axis or a table: counts in full, else three digits that matter."""
    if abs(value) >= 1000 or isinstance(value, int):
        return f"{value:,.0f}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class _Plot:
    """A plot area with linear axes around points: across from the first to the last, up between round numbers."""

    points: Sequence[Point]
    height: int
    left: float = 58.0
    right: float = WIDTH - 14.0
    top: float = 26.0

    @property
    def bottom(self) -> float:
        return self.height - 42.0

    @cached_property
    def across(self) -> tuple[float, float]:
        values = [x for x, _ in self.points] or [0.0]
        return min(values), max(max(values), min(values) + 1)

    @cached_property
    def up(self) -> list[float]:
        values = [y for _, y in self.points] or [0.0]
        return nice_ticks(min(values), max(values))

    def x(self, value: float) -> float:
        low, high = self.across
        return self.left + (self.right - self.left) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * (value - self.up[0]) / (self.up[-1] - self.up[0])

    def axes(self, across: str, up: str) -> Iterator[str]:
        for tick in self.up:
            yield _rule(self.left, self.y(tick), self.right, self.y(tick), GRID)
            yield _text(self.left - 8, self.y(tick) + 4, number(tick), anchor="end")
        low, high = self.across
        for tick in (t for t in nice_ticks(low, high, 8) if low <= t <= high):
            yield _rule(self.x(tick), self.bottom, self.x(tick), self.bottom + 4, INK)
            yield _text(self.x(tick), self.bottom + 18, number(tick))
        yield _text((self.left + self.right) / 2, self.height - 6, across)
        yield _text(self.left - 8, 14, up, anchor="end")

    def line(self, points: Sequence[Point], color: str, width: float, opacity: float) -> str:
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        return (
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}" '
            f'stroke-opacity="{opacity}" stroke-linejoin="round"/>'
        )


def _svg(height: int, body: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12">{"".join(body)}</svg>'
    )


def _rule(x1: float, y1: float, x2: float, y2: float, color: str, width: float = 1.0) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle", color: str = INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'
