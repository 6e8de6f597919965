"""The shards that a training has on the disk: those that a step reads, and the next window's, which come meanwhile."""

from collections.abc import Iterable, Sequence

import numpy as np

from packing.collate import Bin, PackedBins
from stages.stage import Show


class Windows:
    """Shows what is read of `bins`: in the first place a few of them, then step after step of an order."""

    def __init__(self, bins: PackedBins, show: Show) -> None:
        self._bins, self._show = bins, show
        self._needed = np.empty((0, 2), np.int64)
        self._now: list[int] | None = None

    def read(self, numbers: Iterable[int]) -> list[Bin]:
        """Some bins."""
        numbers = list(numbers)
        self._have({self._bins.paths[shard] for shard in self._bins.shards_of(numbers)}, set())
        found = [self._bins[number] for number in numbers]
        self._bins.close()  # another process may be the one that goes on reading
        self._now = None  # what was there before is gone
        return found

    def begin(self, order: Sequence[int], position: int) -> Bin:
        """Get ready to `reach` the steps of an order, from a position on; return a bin to try the model out on.

        That one is the order's first wherever training goes on, as what is tried decides how the loss is computed.
        """
        first = np.asarray(order) * self._bins.global_batch
        last = np.minimum(first + self._bins.global_batch, len(self._bins)) - 1
        self._needed = np.searchsorted(self._bins.windows, np.stack([first, last], axis=1), side="right") - 1
        (example,) = self.read([int(first[0])])
        self.reach(min(position, len(order) - 1))
        return example

    def reach(self, position: int) -> None:
        """Have the shards of a step on the disk, and the next window's on their way."""
        first, last = self._needed[position].tolist()
        now = list(range(first, last + 1))
        if now == self._now:
            return
        self._now = now
        ahead = self._needed[position:]
        beyond = ahead[(ahead < first) | (ahead > last)]
        self._have(self._paths(now), self._paths(beyond[:1].tolist() if len(now) == 1 else []))

    def _paths(self, windows: Sequence[int]) -> set[str]:
        of_shard = zip(self._bins.paths, self._bins.window_of_shard, strict=True)
        return {path for path, window in of_shard if window in windows}

    def _have(self, now: set[str], then: set[str]) -> None:
        self._bins.close()  # what is forgotten while it is open stays on the disk
        self._show("tokens", now, then - now)
