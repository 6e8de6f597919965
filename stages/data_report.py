"""The data report: what became of every row, as JSON and as Markdown; `stages.data_page` makes one HTML page of it.

Every row that was read is accounted for, by source: `rows = packed + heldout + dropped`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BARS = 36
"""Bars in the histogram of lengths, at most."""
MANY_CONTAMINATED = 0.1
"""Share of the rows that are left out as contaminated from which on that is more than a few leaks."""
LONG_WINDED = 30
"""Times as many tokens as the assistant's from which on what users say looks like a mistake in the roles."""

UNREAD = "not read of"
"""What stands before a source and its columns of which nothing was read, with how many rows have something there."""

Table = tuple[list[str], list[list[str]]]
"""A header and rows of cells; the first column holds words, the others numbers."""


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
    """Where the first of the dropped rows are, by reason."""
    unwritten: Mapping[str, int]
    """Turns with something that the chat template leaves out, by what it is."""
    unread: Mapping[str, int]
    """Rows that have something in it, by each column of which their format reads nothing."""
    absent: Sequence[str]
    """Columns and fields of messages that the recipe names, and that no row has."""
    turns_without_end: int
    """Turns for the model to write that nothing ends."""
    ends_in_words: Sequence[str]
    """What the chat template ends answers with, where the tokenizer has no token for it."""
    control_as_text: int
    """Conversations that hold the text of a special token, which is encoded as text."""
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
    said: Mapping[str, int]
    """Tokens of contents by role, in all rows that came out of convert."""
    sequences: int
    """Conversations among them."""
    own_ends: bool
    """Whether the rows say themselves where turns end, in whatever way."""
    endings: int
    """Ends of turns that train."""
    unanswered: int
    """Conversations whose last word is a user's."""
    opened: int
    """Conversations in which the assistant speaks first."""
    empty: int
    """The assistant's turns, and texts, that say nothing."""


def added(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Counts by name, added up."""
    return {name: sum(each.get(name, 0) for each in counts) for name in sorted({n for each in counts for n in each})}


def joined(lists: Sequence[Mapping[str, Sequence[str]]]) -> dict[str, list[str]]:
    """Lists by name, one after another."""
    names = sorted({name for each in lists for name in each})
    return {name: [item for each in lists for item in each.get(name, ())] for name in names}


def compile_report(
    plan: Mapping[str, Any],
    sources: Sequence[Source],
    lengths: NDArray[np.integer[Any]],
    samples: Sequence[Mapping[str, Any]],
    too_short: int,
) -> dict[str, Any]:
    """The report as JSON: the plan's figures, the sources, their sums, how long rows are before any cut, and `samples`.

    `too_short` counts held-out rows whose question is too short to be looked for among those that train.
    """
    for source in sources:
        assert source.rows == source.packed + source.heldout + sum(source.dropped.values()), "a row got lost"
    edges, counts = histogram(lengths)
    report = {
        **{name: value for name, value in plan.items() if name not in ("shards", "windows")},
        "windows": len(plan["windows"]) - 1,
        **{name: sum(getattr(source, name) for source in sources) for name in ("rows", "packed", "heldout", "taken")},
        "fewest_bins": -(-plan["tokens"] // plan["sequence_length"]),
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
        "too_short": too_short,
        "samples": list(samples),
    }
    return {**report, "warnings": list(_warnings(report))}


def histogram(lengths: NDArray[np.integer[Any]]) -> tuple[list[int], list[int]]:
    """Edges and counts of bars of equal ratio: bar i counts lengths from edges[i] up to edges[i + 1] - 1 tokens."""
    low, high = max(1, int(lengths.min())), int(lengths.max()) + 1
    edges = np.unique(np.round(np.geomspace(low, high, BARS + 1)).astype(np.int64))
    edges[0], edges[-1] = min(low, int(lengths.min())), high
    return edges.tolist(), np.histogram(lengths, edges)[0].tolist()


def _warnings(report: Mapping[str, Any]) -> Iterator[str]:
    """What a person should know before paying for GPUs, the worst first."""
    for source in report["sources"]:
        for warning in _of_source(source, report["kind"]):
            yield f"{source['name']}: {warning}"
    if (count := report["dropped"].get("contaminated", 0)) > MANY_CONTAMINATED * report["rows"]:
        yield (
            f"{count:,} of {report['rows']:,} rows are left out because they hold the question of a held-out row: hold "
            "out whole questions, as a source with `split: heldout`, or set pack.decontaminate: 0"
        )
    if report["too_short"]:
        yield (
            f"{report['too_short']:,} held-out rows have a question that is too short, or whose words all stand in "
            "many others, to look for it in those that train: only exact copies of those rows were left out"
        )


def _of_source(source: Mapping[str, Any], kind: str) -> Iterator[str]:
    said, sequences = source["said"], source["sequences"]
    # Answers to prompts are still to come, and steps are raw text.
    talks = set() if kind in ("prompt", "stepwise") else set(said) - {"text"}
    for name in source["absent"]:
        yield f"no row has `{name}`, which convert names: is it called otherwise?"
    if source["trained_tokens"] and not source["endings"] and not source["own_ends"]:
        yield "no token that ends a turn trains, so the model would not learn to stop"
    elif count := source["turns_without_end"]:
        yield f"nothing ends {count:,} of the turns to learn, so the model would not learn to stop there"
    for end in source["ends_in_words"]:
        yield (
            f"the chat template ends answers with {end!r}, for which the tokenizer has no token, so nothing would make "
            "the model stop there: add one with fetch.model.new_tokens, or choose a template that ends with eos_token"
        )
    if talks and not said.get("assistant"):
        yield f"the assistant says nothing in it, only {_listed(sorted(talks))}: look at convert.roles"
    elif talks and said.get("user", 0) > LONG_WINDED * max(1, said.get("assistant", 0)):
        ratio = said["user"] / max(1, said.get("assistant", 0))
        yield f"users say {ratio:,.0f} times as much as the assistant: are the roles the right way round?"
    if count := source["opened"]:
        yield f"in {_of(count, sequences)} conversations the assistant speaks first: are the roles the right way round?"
    if (count := source["unanswered"]) and kind != "prompt":
        yield f"{_of(count, sequences)} conversations end with a user's words, which nobody answers"
    if count := source["empty"]:
        what = "texts" if set(said) <= {"text"} else "of the assistant's turns"
        yield f"{count:,} {what} are empty: the model would learn to say nothing"
    if count := source["control_as_text"]:
        yield (
            f"{_of(count, sequences)} conversations hold the text of a special token, which is encoded as text: where "
            "it is the model's own markup, set convert.trust_special_tokens"
        )
    for what, count in source["unwritten"].items():
        yield f"the chat template leaves out {what} ({count:,} times)"
    if (count := sum(source["dropped"].values())) * 2 > source["rows"]:
        reason = max(source["dropped"], key=lambda name: source["dropped"][name])
        yield f"{_of(count, source['rows'])} rows are dropped, most of them as {reason}"


def _of(count: int, total: int) -> str:
    return f"{count:,} of {total:,}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def write(report: Mapping[str, Any], folder: Path) -> None:
    """Write report.json, report.md and report.html."""
    from stages.data_page import html

    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (folder / "report.md").write_text(markdown(report), "utf-8")
    (folder / "report.html").write_text(html(report), "utf-8")


def headline(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures of the whole: (what, how much)."""
    repeated = [("with repeats", f"{report['taken']:,}")] if report["taken"] != report["packed"] else []
    windows = [("windows", f"{report['windows']:,}")] if report["windows"] > 1 else []
    return [
        ("rows read", f"{report['rows']:,}"),
        ("packed", f"{report['packed']:,}"),
        *repeated,
        ("held out", f"{report['heldout']:,}"),
        ("dropped", f"{sum(report['dropped'].values()):,}"),
        ("tokens", f"{report['tokens']:,}"),
        ("of them trained", f"{report['trained_tokens'] / report['tokens']:.1%}"),
        (f"sequences of {report['sequence_length']:,}", f"{report['bins']:,}"),
        ("filled", f"{report['fill']:.1%}"),
        *windows,
        ("steps an epoch", f"{report['steps']:,}"),
    ]


def by_source(report: Mapping[str, Any]) -> Table:
    """What became of each source's rows."""
    header = ["source", "rows", "packed", "held out", "dropped", "truncated", "tokens", "trained"]
    rows = []
    for source in report["sources"]:
        share = f"{source['trained_tokens'] / source['tokens']:.1%}" if source["tokens"] else "–"
        numbers = [source[name] for name in ("rows", "packed", "heldout")]
        numbers += [sum(source["dropped"].values()), source["truncated"], source["tokens"]]
        rows.append([source["name"], *(f"{number:,}" for number in numbers), share])
    return header, rows


def by_reason(report: Mapping[str, Any]) -> Table:
    """Why rows are dropped, and where the first of each kind are."""
    names = [source["name"] for source in report["sources"]]
    rows = []
    for reason, count in sorted(report["dropped"].items(), key=lambda item: (-item[1], item[0])):
        by_source = [f"{source['dropped'].get(reason, 0):,}" for source in report["sources"]]
        rows.append([reason, *(by_source if len(names) > 1 else []), f"{count:,}"])
    return ["dropped because", *(names if len(names) > 1 else []), "rows"], rows


def places(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """Where the first dropped rows are, by reason."""
    return joined([source["places"] for source in report["sources"]])


def unread(report: Mapping[str, Any]) -> dict[str, str]:
    """The columns of which nothing was read, by source, those that most rows have first."""
    told = {}
    for source in report["sources"]:
        columns = sorted(source["unread"].items(), key=lambda item: (-item[1], item[0]))
        if columns:
            told[source["name"]] = ", ".join(f"{name} ({count:,})" for name, count in columns)
    return told


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a few Markdown tables, without its charts."""
    told = [" · ".join(f"**{value}** {name}" for name, value in headline(report))]
    told += [f"⚠ {warning}." for warning in report["warnings"]]
    told += [markdown_table(*table) for table in (by_source(report), by_reason(report)) if table[1]]
    told += [f"{reason}: {where[0]}{', …' * (len(where) > 1)}" for reason, where in places(report).items() if where]
    told += [f"{UNREAD} {source}: {columns}" for source, columns in unread(report).items()]
    return "\n\n".join(told) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in Markdown."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, rule, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
