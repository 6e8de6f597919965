"""Leases: who is at work on an action, so that nobody does it twice. Correctness never rests on them.

`locks/<stage>/<key>.json` is created by its holder and renewed by compare-and-swap. Clocks of machines are never
compared: a waiter takes a lease over when it has watched it stay unchanged for its whole life on its own monotonic
clock, or when the holder was a process of this machine that is dead. A holder counts from the *start* of its last
renewal that succeeded, so it knows that it lost before anybody may take over. That clock stands still while a machine
sleeps, unlike the store's: who slept renews on waking, and has lost only if somebody took over by then. By a clock that
goes on, every run of a laptop would be lost as its lid opens, and a waiter there would take over from a holder that was
given no moment to renew.
"""

import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from stages.errors import UserError
from stages.objects import Objects
from stages.store import Store

_log = logging.getLogger(__name__)


@dataclass
class Lease:
    """A lease that is held."""

    lost: threading.Event = field(default_factory=threading.Event)
    """Set for good when another holder was found, or no renewal succeeded for the lease's life: stop at the next
    save."""
    why: str = ""
    """Why it was lost, in words; empty while it is held."""
    trouble: str = ""
    """What the last renewal met that did not succeed."""

    def lose(self, why: str) -> None:
        """Know that it is lost."""
        self.why = self.why or why
        self.lost.set()


@contextmanager
def lease(
    store: Store, stage: str, key: str, seconds: float, owner: str, on_wait: Callable[[str], None] = _log.info
) -> Iterator[Lease]:
    """Hold the lease of an action while the block runs; wait for whoever holds it.

    `seconds` is the lease's life without renewal; `owner` tells people who holds it (host, process, run);
    `on_wait(line)` is called once for every other holder. After the block has begun, look into the store again: the
    former holder may have finished.
    """
    path = f"locks/{stage}/{key}.json"
    document = {
        "owner": owner,
        "seconds": seconds,
        "token": uuid4().hex,
        "renewals": 0,
        "process": _process(os.getpid()),
    }
    version, began = _acquire(store.objects, path, document, on_wait)
    held, done = Lease(), threading.Event()
    renewals = (store.objects, path, document, version, began, held, done)
    keeper = threading.Thread(target=_keep, args=renewals, name=f"lease {stage}", daemon=True)
    keeper.start()
    try:
        yield held
    finally:
        done.set()
        keeper.join(timeout=10.0)


def _acquire(
    objects: Objects, path: str, document: dict[str, Any], on_wait: Callable[[str], None]
) -> tuple[str, float]:
    """Wait until the lease is ours. Returns its version and when (monotonic) it began."""
    data = _dump(document)
    told, seen, since = "", "", 0.0
    while True:
        began = time.monotonic()
        found = objects.read(path)
        if found is None:
            version = objects.create(path, data)
        else:
            holder = _parsed(found.data)
            if found.version != seen:
                seen, since = found.version, began
            unchanged_for = began - since
            if holder["released"] or unchanged_for > holder["seconds"] or _is_dead(holder["process"]):
                version = objects.swap(path, data, found.version)
            else:
                version = None
                if holder["token"] != told:
                    told = holder["token"]
                    on_wait(f"waiting for {holder['owner']}, who is at work on {path[len('locks/') : -len('.json')]}")
        if version is not None:
            return version, began
        time.sleep(min(1.0, document["seconds"] / 10) * random.uniform(0.5, 1.0))


def _keep(
    objects: Objects,
    path: str,
    document: dict[str, Any],
    version: str,
    began: float,
    held: Lease,
    done: threading.Event,
) -> None:
    """Renew the lease until the work is done or the lease lost; then release it."""
    alarm = _alarm(held, began, document["seconds"])
    while not done.wait(document["seconds"] / 3) and not held.lost.is_set():
        began = time.monotonic()
        document = {**document, "renewals": document["renewals"] + 1}
        try:
            renewed = _renewed(objects, path, document, version)
        except (OSError, UserError) as error:  # an outage: the alarm ends it
            _log.warning("%s: the lease could not be renewed: %s", path, error)
            held.trouble = str(error)
            continue
        if renewed is None:
            held.lose("another run took it over")
            break
        version = renewed
        alarm.cancel()
        alarm = _alarm(held, began, document["seconds"])
    alarm.cancel()
    if not held.lost.is_set():
        try:
            objects.swap(path, _dump({**document, "released": True}), version)
        except (OSError, UserError) as error:
            _log.warning("%s: the lease could not be released and will run out: %s", path, error)


def _renewed(objects: Objects, path: str, document: dict[str, Any], version: str) -> str | None:
    """The lease's new version, or None when somebody else holds it."""
    renewed = objects.swap(path, _dump(document), version)
    if renewed is not None:
        return renewed
    found = objects.read(path)
    if found is None:  # swept: as good as ours while nobody else creates it
        return objects.create(path, _dump(document))
    if _parsed(found.data)["token"] == document["token"]:  # an earlier renewal went through unheard
        return objects.swap(path, _dump(document), found.version)
    return None


def _alarm(held: Lease, began: float, seconds: float) -> threading.Timer:
    def ring() -> None:
        held.lose(f"it could not be renewed for {seconds:g} s: {held.trouble or 'the store does not answer'}")

    alarm = threading.Timer(max(0.0, began + seconds - time.monotonic()), ring)
    alarm.daemon = True
    alarm.start()
    return alarm


def _process(pid: int) -> list[str]:
    """What tells a process from all others, ever: machine start, pid namespace, pid, its own start. Empty where the
    kernel does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return [boot, str(Path("/proc/self/ns/pid").readlink()), str(pid), started]
    except OSError:
        return []


def _is_dead(process: list[str]) -> bool:
    """Whether a process of this machine has ended. Unknown counts as alive."""
    here = _process(os.getpid())
    return bool(here and process) and process[:2] == here[:2] and _process(int(process[2])) != process


def _dump(document: dict[str, Any]) -> bytes:
    return json.dumps({"released": False, **document}).encode()


def _parsed(data: bytes) -> dict[str, Any]:
    """A lease's document. What cannot be read counts as released: it protects nobody."""
    try:
        document = json.loads(data)
        if {"owner", "seconds", "token", "released", "process"} <= set(document):
            return dict(document)
    except (ValueError, TypeError):
        pass
    return {"owner": "nobody", "seconds": 0.0, "token": "", "released": True, "process": []}
