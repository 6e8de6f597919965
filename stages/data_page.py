"""The data report as one HTML page, without scripts and without anything from elsewhere."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from stages import data_charts
from stages.data_report import UNREAD, by_reason, by_source, headline, places, unread

STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --quiet: #66727f; --rule: #dfe3e8; --page: #fff;
  --trained: #d5ede2; --trained-ink: #14532d; --warn: #9a5b16; --warn-page: #fdf4e7 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --quiet: #9aa5b1; --rule: #3a434d; --page: #171c21;
    --trained: #1d4535; --trained-ink: #c8f0da; --warn: #e8b06a; --warn-page: #2b2318 }
}
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 880px; margin: 3rem auto; padding: 0 1.2rem }
h1 { font-size: 1.35rem; font-weight: 600; margin-bottom: 1.6rem }
h2 { font-size: 1rem; font-weight: 600; margin: 2.4rem 0 .6rem }
h3 { font-size: .88rem; font-weight: 500; color: var(--quiet); margin: 1.4rem 0 .4rem }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 1.1rem; margin: 0 }
dd { font-size: 1.45rem; margin: 0; font-variant-numeric: tabular-nums }
dt, p, figcaption, summary, details li { color: var(--quiet); font-size: .88rem }
ul.warnings { list-style: none; margin: 2rem 0 0; padding: .7rem 1rem; border-radius: 6px;
  background: var(--warn-page) }
ul.warnings li { color: var(--warn); padding: .15rem 0 .15rem 1.5rem; text-indent: -1.5rem }
ul.warnings li::before { content: "⚠"; display: inline-block; width: 1.5rem; text-indent: 0 }
div.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { font-weight: 500; color: var(--quiet); font-size: .88rem }
th, td { text-align: right; padding: .4rem .7rem; border-bottom: 1px solid var(--rule) }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
figure { margin: 0 }
svg { width: 100%; height: auto; display: block }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace; color: var(--quiet);
  border: 1px solid var(--rule); border-radius: 6px; padding: .7rem .9rem; margin: 0 0 .6rem }
mark { background: var(--trained); color: var(--trained-ink); border-radius: 3px }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .3em 0 0 }
.key ~ .key { margin-left: .8em }
"""


def html(report: Mapping[str, Any]) -> str:
    """The report as one self-contained page."""
    tiles = "".join(f"<div><dd>{value}</dd><dt>{escape(name)}</dt></div>" for name, value in headline(report))
    warnings = "".join(f"<li>{escape(warning)}.</li>" for warning in report["warnings"])
    lengths = report["lengths"]
    body = [
        "<h1>What became of the data</h1>",
        f"<dl>{tiles}</dl>",
        f'<ul class="warnings">{warnings}</ul>' if warnings else "",
        "<h2>Tokens of each source</h2>",
        _figure(
            data_charts.tokens(report),
            f"{_key(data_charts.TRAINED)}trained{_key(data_charts.GIVEN)}only read; a row that trains several times "
            "counts as often.",
        ),
        "<h2>Tokens in a row</h2>",
        _figure(
            data_charts.lengths(report),
            f"Shortest {lengths['min']:,}, median {lengths['median']:,}, 95th percentile {lengths['p95']:,}, longest "
            f"{lengths['max']:,}, before any cut; the axis is logarithmic.",
        ),
        f"<h2>Packing</h2><p>{_packing(report)}</p>",
        f"<h2>Sources</h2>{_table(*by_source(report))}",
        *(f"<p>{UNREAD} {escape(source)}: {escape(columns)}</p>" for source, columns in unread(report).items()),
        f"<h2>Dropped rows</h2>{_table(*by_reason(report))}" if report["dropped"] else "",
        *(_details(reason, where) for reason, where in places(report).items()),
        _samples(report["samples"]) if report["samples"] else "",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    told = "\n".join(part for part in body if part)
    return f'<!doctype html>\n<html lang="en"><title>Data report</title>{head}\n{told}\n</html>\n'


def _packing(report: Mapping[str, Any]) -> str:
    steps = f"{report['steps']:,} steps of {report['global_batch']:,}"
    cut = "Documents are cut where a sequence is full and go on in the next one. " if report.get("wrapped") else ""
    return (
        f"{report['documents']:,} documents in {report['bins']:,} sequences of {report['sequence_length']:,} tokens: "
        f"{report['fill']:.2%} full. Their tokens alone would need {report['fewest_bins']:,}. {cut}At most "
        f"{report['max_documents']:,} documents share a sequence. {steps} in one pass."
    )


def _key(color: str) -> str:
    return f'<span class="key" style="background: {color}"></span>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _details(reason: str, where: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(place)}</li>" for place in where)
    return f"<details><summary>{escape(reason)}: the first rows</summary><ul>{items}</ul></details>"


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    told = ["<h2>Rows as they train</h2><p><mark>Marked text</mark> trains, the rest is only read.</p>"]
    for sample in samples:
        told.append(f"<h3>{escape(sample['place'])}</h3>")
        for pieces in sample["sequences"]:
            marked = "".join(f"<mark>{escape(t)}</mark>" if trains else escape(t) for t, trains in pieces)
            told.append(f"<pre>{marked}</pre>")
    return "".join(told)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
