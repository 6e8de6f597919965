"""What came out of a stage that has no picture of its own: its facts in words, for a page of the dashboard."""

from collections.abc import Iterator, Mapping
from typing import Any

from flows.charts import number

TITLES = {
    "fetch": "What was fetched",
    "convert": "What the rows became",
    "tokenize": "What the tokenizer made of the rows",
    "score": "What the other model was asked",
    "merge": "How the merged model compares",
}
"""The stages whose page is their facts; each page's key is the stage's name."""

WORDS = {
    "parameters": "parameters of the model",
    "bytes": "bytes copied",
    "shards": "files of rows, cut to size",
    "first": "rows asked for",
    "repeated": "rows left out, as they were there before",
    "members": "files of rows in archives",
    "other_files": "other files in archives and folders, left alone",
    "new_tokens": "new token",
    "dropped": "dropped",
    "unwritten": "not written",
    "formats": "files read as",
    "rows_by_offsets": "rows whose trained tokens were found by offsets",
    "rows_by_backend": "rows tokenized by",
    "top_k": "likeliest tokens kept at each place",
    "tensors": "tensors",
    "changed_tensors": "of them changed by training",
    "dtype": "number format",
    "update_kept": "of the update kept when rounded",
    "likeness": "likeness to the trained adapter",
    "top1_agreement": "the same likeliest token",
}
"""Facts whose own names would have to be explained."""

SHARES = ("update_kept", "top1_agreement")
"""Facts that are parts of one."""

COUNTED = ("dropped", "unwritten")
"""Facts that count by reason: nobody should have to guess that none means none."""


def facts_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What came out, a fact a row: its words and its value."""
    return list(_rows(facts, ""))


def _rows(facts: Mapping[str, Any], above: str) -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        words = WORDS.get(name, name if above else name.replace("_", " "))
        told = f"{above}: {words}" if above else words
        if name in COUNTED:
            yield told, f"{sum(value.values()):,}"
        if isinstance(value, Mapping):
            yield from _rows(value, told)
        elif isinstance(value, list):
            yield told, ", ".join(map(str, value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield told, f"{value:.1%}" if name in SHARES else number(value)
        elif value is not None:
            yield told, str(value)
