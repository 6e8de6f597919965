"""The data report's charts as SVG that can be read on a light and on a dark page."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH = 840
INK, RULE = "#7b8794", "#7b879440"
TRAINED, GIVEN, OVER = "#4c9a7d", "#94a3b8", "#d0803f"


def lengths(report: Mapping[str, Any]) -> str:
    """Rows by their length on a logarithmic axis, with a line at the sequence length if rows go beyond it."""
    edges, counts = report["lengths"]["edges"], report["lengths"]["counts"]
    limit, height, foot = report["sequence_length"], 220, 24
    low, span = math.log(max(1, edges[0])), math.log(edges[-1] / max(1, edges[0])) or 1.0
    top = max(counts)

    def x(tokens: float) -> float:
        return WIDTH * (math.log(max(1, tokens)) - low) / span

    parts = []
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        tall = (height - foot - 16) * count / top
        parts.append(
            f'<rect fill="{OVER if left > limit else TRAINED}" x="{x(left) + 0.5:.1f}" y="{height - foot - tall:.1f}" '
            f'width="{max(x(right) - x(left) - 1, 0.5):.1f}" height="{tall:.1f}">'
            f"<title>{left:,} to {right - 1:,} tokens: {count:,} rows</title></rect>"
        )
    parts.append(f'<line stroke="{RULE}" x1="0" x2="{WIDTH}" y1="{height - foot}" y2="{height - foot}"/>')
    every = max(1, (len(edges) - 1) // 6)
    parts += [_text(x(tick), height - 6, f"{tick:,}", "middle") for tick in edges[every:-1:every]]
    if edges[0] <= limit < edges[-1] - 1:
        parts.append(
            f'<line stroke="{OVER}" stroke-dasharray="3 3" x1="{x(limit):.1f}" x2="{x(limit):.1f}" y1="0" '
            f'y2="{height - foot}"/>'
        )
        parts.append(_text(x(limit) - 5, 11, f"sequence length {limit:,}", "end"))
    return _svg(height, "rows by length", parts)


def tokens(report: Mapping[str, Any]) -> str:
    """The tokens of each source that train and that are only read, as bars."""
    sources = [source for source in report["sources"] if source["tokens"]]
    most = max(source["tokens"] for source in sources)
    left, right, tall = 150.0, 700.0, 26
    parts = []
    for number, source in enumerate(sources):
        y, name = number * tall, source["name"]
        whole = (right - left) * source["tokens"] / most
        share = source["trained_tokens"] / source["tokens"]
        parts.append(_text(left - 8, y + 16, name if len(name) <= 20 else f"{name[:19]}…", "end"))
        for color, start, width in ((TRAINED, left, whole * share), (GIVEN, left + whole * share, whole * (1 - share))):
            parts.append(f'<rect fill="{color}" x="{start:.1f}" y="{y + 4}" width="{width:.1f}" height="{tall - 9}"/>')
        parts.append(_text(left + whole + 8, y + 16, f"{source['tokens']:,}", "start"))
    return _svg(len(sources) * tall, "tokens by source", parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{INK}">{escape(text)}</text>'


def _svg(height: int, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}" '
        f'font-family="system-ui, sans-serif" font-size="12">{"".join(parts)}</svg>'
    )
