"""The data report: what became of every row, as JSON, as Markdown tables, and as one HTML page without scripts.

Every row that was read is accounted for, by source: `rows = packed + heldout + dropped`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BARS = 36
"""Bars in the histogram of lengths, at most."""


@dataclass(frozen=True)
class Source:
    """What became of one source."""

    name: str
    split: str
    rows: int
    """Rows read."""
    dropped: Mapping[str, int]
    """Rows dropped on the whole way, by reason."""
    places: Mapping[str, Sequence[str]]
    """Where some of the rows that convert dropped are, by reason."""
    unwritten: Mapping[str, int]
    """Turns with something that the chat template leaves out, by what it is."""
    turns_without_end: int
    """Turns for the model to write that nothing ends."""
    packed: int
    """Rows packed for training."""
    heldout: int
    """Rows packed for the held-out loss."""
    taken: int
    """Rows packed for training, each as often as it is taken."""
    truncated: int
    tokens: int
    """Tokens of the rows taken."""
    trained_tokens: int


def added(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Counts by name, added up."""
    return {name: sum(each.get(name, 0) for each in counts) for name in sorted({n for each in counts for n in each})}


def joined(lists: Sequence[Mapping[str, Sequence[str]]]) -> dict[str, list[str]]:
    """Lists by name, one after another."""
    names = sorted({name for each in lists for name in each})
    return {name: [item for each in lists for item in each.get(name, ())] for name in names}


def compile_report(
    plan: Mapping[str, Any], sources: Sequence[Source], lengths: NDArray[np.integer[Any]]
) -> dict[str, Any]:
    """The report as JSON: the plan's figures, the sources, their sums, and how long rows are before any cut."""
    for source in sources:
        assert source.rows == source.packed + source.heldout + sum(source.dropped.values()), "a row got lost"
    edges, counts = histogram(lengths)
    return {
        **{name: value for name, value in plan.items() if name != "shards"},
        "rows": sum(source.rows for source in sources),
        "packed": sum(source.packed for source in sources),
        "heldout": sum(source.heldout for source in sources),
        "taken": sum(source.taken for source in sources),
        "dropped": added([source.dropped for source in sources]),
        "lengths": {
            "min": int(lengths.min()),
            "median": int(np.median(lengths)),
            "p95": int(np.quantile(lengths, 0.95, method="lower")),
            "max": int(lengths.max()),
            "edges": edges,
            "counts": counts,
        },
        "sources": [asdict(source) for source in sources],
    }


def histogram(lengths: NDArray[np.integer[Any]]) -> tuple[list[int], list[int]]:
    """Edges and counts of bars of equal ratio: bar i counts lengths from edges[i] up to edges[i + 1] - 1 tokens."""
    low, high = max(1, int(lengths.min())), int(lengths.max()) + 1
    edges = np.unique(np.round(np.geomspace(low, high, BARS + 1)).astype(np.int64))
    edges[0], edges[-1] = min(low, int(lengths.min())), high
    return edges.tolist(), np.histogram(lengths, edges)[0].tolist()


def write(report: Mapping[str, Any], folder: Path) -> None:
    """Write report.json, report.md and report.html."""
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (folder / "report.md").write_text(markdown(report), "utf-8")
    (folder / "report.html").write_text(html(report), "utf-8")


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a few Markdown tables."""
    told = [" · ".join(f"**{value}** {name}" for name, value in _headline(report))]
    tables = [_by_source(report), _by_reason(report)]
    told += [_markdown_table(*table) for table in tables if table[1]]
    told += [f"Note: {note}." for note in _notes(report)]
    return "\n\n".join(told) + "\n"


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, rule, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _headline(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("rows read", f"{report['rows']:,}"),
        ("packed", f"{report['packed']:,}"),
        ("held out", f"{report['heldout']:,}"),
        ("dropped", f"{sum(report['dropped'].values()):,}"),
        ("tokens", f"{report['tokens']:,}"),
        ("of them trained", f"{report['trained_tokens'] / report['tokens']:.1%}"),
        (f"sequences of {report['sequence_length']:,}", f"{report['bins']:,}"),
        ("filled", f"{report['fill']:.1%}"),
        ("steps an epoch", f"{report['steps']:,}"),
    ]


def _by_source(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["source", "rows", "packed", "held out", "dropped", "truncated", "tokens", "trained"]
    rows = []
    for source in report["sources"]:
        dropped = sum(source["dropped"].values())
        numbers = [source[name] for name in ("rows", "packed", "heldout")]
        share = f"{source['trained_tokens'] / source['tokens']:.1%}" if source["tokens"] else "–"
        numbers += [dropped, source["truncated"], source["tokens"]]
        rows.append([source["name"], *(f"{number:,}" for number in numbers), share])
    return header, rows


def _by_reason(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    names = [source["name"] for source in report["sources"]]
    rows = []
    for reason, count in sorted(report["dropped"].items(), key=lambda item: (-item[1], item[0])):
        by_source = [f"{source['dropped'].get(reason, 0):,}" for source in report["sources"]]
        rows.append([reason, *(by_source if len(names) > 1 else []), f"{count:,}"])
    return ["dropped because", *(names if len(names) > 1 else []), "rows"], rows


def _notes(report: Mapping[str, Any]) -> list[str]:
    notes = []
    for source in report["sources"]:
        name = source["name"]
        if source["turns_without_end"]:
            notes.append(
                f"{name}: nothing ends {source['turns_without_end']:,} of the turns to learn, so the model would not "
                "learn to stop there"
            )
        notes += [
            f"{name}: the chat template leaves out {what} ({count:,} times)"
            for what, count in source["unwritten"].items()
        ]
        notes += [f"{name}: {reason}, for example {places[0]}" for reason, places in source["places"].items() if places]
    return notes


STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --quiet: #66727f; --rule: #dfe3e8; --fill: #4c7d6d; --over: #c2703d }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --quiet: #9aa5b1; --rule: #3a434d; --fill: #7fb5a2; --over: #e39a6b }
  body { background: #171c21 }
}
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink) }
body { max-width: 880px; margin: 3rem auto; padding: 0 1.2rem }
h1 { font-size: 1.35rem; font-weight: 600; margin-bottom: 1.6rem }
h2 { font-size: 1rem; font-weight: 600; margin: 2.4rem 0 .6rem }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 1.1rem; margin: 0 }
dd { font-size: 1.45rem; margin: 0; font-variant-numeric: tabular-nums }
dt, p, figcaption { color: var(--quiet); font-size: .88rem }
div { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { font-weight: 500; color: var(--quiet); font-size: .88rem }
th, td { text-align: right; padding: .4rem .7rem; border-bottom: 1px solid var(--rule) }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
figure { margin: 0 }
svg { width: 100%; height: auto }
svg text { fill: var(--quiet); font-size: 11px }
.bar { fill: var(--fill) } .over { fill: var(--over) } .axis { stroke: var(--rule) }
.limit { stroke: var(--over); stroke-dasharray: 3 3 }
"""


def html(report: Mapping[str, Any]) -> str:
    """The report as one self-contained page."""
    tiles = "".join(f"<div><dd>{value}</dd><dt>{escape(name)}</dt></div>" for name, value in _headline(report))
    lengths = report["lengths"]
    tables = [("Sources", _by_source(report)), ("Dropped rows", _by_reason(report))]
    body = [
        "<h1>What became of the data</h1>",
        f"<dl>{tiles}</dl>",
        "<h2>Tokens in a row</h2>",
        f"<figure>{chart(lengths['edges'], lengths['counts'], report['sequence_length'])}<figcaption>Shortest "
        f"{lengths['min']:,}, median {lengths['median']:,}, 95th percentile {lengths['p95']:,}, longest "
        f"{lengths['max']:,}; the axis is logarithmic.</figcaption></figure>",
        *(f"<h2>{title}</h2><div>{_html_table(*table)}</div>" for title, table in tables if table[1]),
        *(f"<p>{escape(note)}.</p>" for note in _notes(report)),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><title>Data report</title>{head}\n' + "\n".join(body) + "\n</html>\n"


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


WIDTH, HEIGHT, FOOT = 840, 220, 24


def chart(edges: Sequence[int], counts: Sequence[int], limit: int) -> str:
    """Inline SVG: rows by length on a logarithmic axis, with a line at the sequence length if rows go beyond it."""
    low, span = math.log(max(1, edges[0])), math.log(edges[-1] / max(1, edges[0])) or 1.0
    top = max(counts)

    def x(tokens: float) -> float:
        return WIDTH * (math.log(max(1, tokens)) - low) / span

    parts = []
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        height = (HEIGHT - FOOT - 16) * count / top
        kind = "over" if left > limit else "bar"
        parts.append(
            f'<rect class="{kind}" x="{x(left) + 0.5:.1f}" y="{HEIGHT - FOOT - height:.1f}" '
            f'width="{max(x(right) - x(left) - 1, 0.5):.1f}" height="{height:.1f}">'
            f"<title>{left:,} to {right - 1:,} tokens: {count:,} rows</title></rect>"
        )
    parts.append(f'<line class="axis" x1="0" x2="{WIDTH}" y1="{HEIGHT - FOOT}" y2="{HEIGHT - FOOT}"/>')
    every = max(1, (len(edges) - 1) // 6)
    for tick in edges[every:-1:every]:
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{tick:,}</text>')
    if edges[0] <= limit < edges[-1] - 1:
        parts.append(f'<line class="limit" x1="{x(limit):.1f}" x2="{x(limit):.1f}" y1="0" y2="{HEIGHT - FOOT}"/>')
        parts.append(f'<text x="{x(limit) - 5:.1f}" y="11" text-anchor="end">sequence length {limit:,}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="rows by length">{"".join(parts)}</svg>'
