"""The columns of a source's rows beside those that its format reads, so that nobody finds out after the training that
half of a question stood in another one.

    columns = Columns(named)
    made = convert(watched := columns.watched(row))     # for each row
    columns.saw(watched)                                # where it could be converted
    columns.unread                                      # columns of which nothing is read: how many rows fill them
    columns.absent                                      # what the recipe names, and no row has

What a format reads is seen, not declared, so it holds for formats of one's own too: some rows are converted as dicts
that note what is asked of them.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from stages.row_fields import decoded, says

__all__ = ["Columns"]

MOST = 100
"""Columns, and sets of them, that are kept: a row for each of which every key is another one has no columns. And rows
that are watched because of a column: what is read may depend on what others say."""

Row = dict[str, Any]


class Columns:
    """What there is in the rows of one shard, and what is read of it. `named` are columns, and fields of messages, that
    the recipe names: they are read whether or not these rows show it."""

    def __init__(self, named: Collection[str] = ()) -> None:
        self._seen: Counter[tuple[str, ...]] = Counter()
        self._read = set(named)
        self._held: Counter[str] = Counter()
        self._open: set[str] = set()
        """Columns of which nothing was read so far, in fewer than `MOST` rows."""
        self._absent = set(named)

    def watched(self, row: Row) -> Row:
        """The row, as one that notes what is asked of it if it may have news: the 1st, 2nd, 4th, … of its columns, and
        the first that say something in a column of which nothing was read."""
        names = tuple(row)
        if self._absent:
            self._strike_out(row)
        if names in self._seen or len(self._seen) < MOST:
            self._seen[names] += 1
            if self._seen[names].bit_count() == 1:
                return _Noting(row)
        return _Noting(row) if any(name in self._open and says(row[name]) for name in names) else row

    def saw(self, watched: Row) -> None:
        """Count a row that was converted."""
        said = watched
        if isinstance(watched, _Noting):
            self._read |= watched.read
            self._open -= watched.read
            said = watched.before
        for name, value in said.items():
            if name not in self._read and says(value) and (name in self._held or len(self._held) < MOST):
                self._held[name] += 1
                if self._held[name] < MOST:
                    self._open.add(name)
                else:
                    self._open.discard(name)

    def _strike_out(self, row: Row) -> None:
        self._absent -= row.keys()
        for value in map(decoded, row.values()):
            for message in value if isinstance(value, list) else [value]:
                if isinstance(message, dict):
                    self._absent -= message.keys()

    @property
    def absent(self) -> list[str]:
        """Columns, and fields of messages, that the recipe names and no row has; of no rows that cannot be said."""
        return sorted(self._absent) if self._seen else []

    @property
    def unread(self) -> dict[str, int]:
        """Rows that say something there, by each column of which nothing was read."""
        return {name: self._held[name] for name in sorted(self._held.keys() - self._read)}


class _Noting(dict[str, Any]):
    """A row that knows which of its values were asked for. To know the names of its columns is not to read them."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self.before = row
        """As it was: a format may take values out."""
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As any dict."""
        self.read.add(name)
        return super().get(name, default)

    def pop(self, name: str, *default: Any) -> Any:
        """As any dict."""
        self.read.add(name)
        return super().pop(name, *default)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # without it `{**row}` would copy past `__getitem__`

    def values(self) -> Any:
        """As any dict."""
        self.read |= super().keys()
        return super().values()

    def items(self) -> Any:
        """As any dict."""
        self.read |= super().keys()
        return super().items()
