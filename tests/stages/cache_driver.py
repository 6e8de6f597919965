"""A process that uses views of a store, as if it were on another machine, over and over::

python cache_driver.py STORE CACHE LIMIT SEED TIMES    TIMES: a number, or `forever` to hold one view until killed
"""

import random
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.identity import tree_of
from stages.objects import Objects
from stages.store import Store, open_store


@dataclass(frozen=True)
class Far:
    """Objects that are not on this disk."""

    objects: Objects

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objects, name)

    def local(self, path: str) -> None:
        return None


def main(url: str, cache: str, limit: str, seed: str, times: str) -> None:
    store = Store(Far(open_store(url, Path(cache)).objects), Path(cache), float(limit))  # type: ignore[arg-type]
    trees = [a.tree for stage, key, _ in store.manifests() if (a := store.find(stage, key))]
    chance = random.Random(int(seed))
    if times == "forever":
        with store.hold() as hold:
            store.view(chance.choice(trees), hold)
            print("holding", flush=True)
            signal.pause()
    for _ in range(int(times)):
        with store.hold() as hold:
            chosen = chance.sample(trees, 2)
            views = [store.view(tree, hold) for tree in chosen]
            for tree, view in zip(chosen, views, strict=True):
                assert tree_of(view).digest == tree.digest, "a view in use lost files"
    print(f"{times} views, all whole")


if __name__ == "__main__":
    main(*sys.argv[1:])
