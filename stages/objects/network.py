"""What stores over a network have in common, whoever serves them: keys below a prefix, patience with outages, a lost
answer that is recognised, and transfers whose broken attempts are taken back.

What a service's errors mean only its own file knows (`stages.objects.s3`, `azure`, `gcs`): it hands functions in.
"""

import logging
import random
import time
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, TypeVar
from uuid import uuid4

from stages.errors import UserError
from stages.objects import MayNotDelete
from stages.sources.credentials import opened
from stages.transfers import Moved

_log = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE = 90.0
"""Seconds for which a store that was once reached is retried before an operation fails."""
FIRST_ANSWER = 6.0
"""Seconds for which a store that was never reached may keep silent."""
OPENING = 3.0
"""Seconds for which one that answers with an error of its own, or not to the end, is tried again while it is opened."""
SINGLE_PUT = 16 * 2**20
"""Bytes up to which a blob goes up in one request; beyond, in parts."""


class Place(NamedTuple):
    """A prefix in a bucket (Azure calls it a container)."""

    scheme: str
    bucket: str
    prefix: str
    server: str = ""
    """The server's address, where messages should tell it."""

    @property
    def at(self) -> str:
        """Where that is, for the middle of a message."""
        return f" at {self.server}" if self.server else ""

    @property
    def url(self) -> str:
        """Its address."""
        return f"{self.scheme}://{self.bucket}/{self.prefix}".rstrip("/")

    def key(self, path: str) -> str:
        """The key of a path in the store."""
        return f"{self.prefix}/{path}" if self.prefix else path

    def path(self, key: str) -> str:
        """The path that a key stands for."""
        return key.removeprefix(f"{self.prefix}/") if self.prefix else key


def place_of(scheme: str, address: str, credentials: str) -> Place:
    """The place that `bucket/prefix` names; `credentials` says where they belong. Raises UserError."""
    bucket, _, prefix = address.strip("/").partition("/")
    if "@" in bucket or ":" in bucket or not bucket:
        raise UserError(f"store: write {scheme}://bucket/prefix; credentials belong in the environment ({credentials})")
    return Place(scheme, bucket, prefix)


def chosen(options: Mapping[str, str], known: Collection[str]) -> dict[str, str]:
    """The storage options with references looked up. Raises UserError for one that the service does not know."""
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UserError(f"storage_options: {', '.join(unknown)} is not known; choose from {', '.join(known)}")
    return {name: str(value) for name, value in opened(options, "runtime").items()}


def patiently(
    operation: Callable[[], T],
    seconds: float,
    place: Place,
    outage: Callable[[Exception], bool],
    told: Callable[[Exception], Exception | None],
    check: str,
) -> T:
    """Run an operation; wait out outages for so many seconds; raise what `told` makes of any other error, or the error
    itself for None. `check` says what to look at when the store stays out of reach. Raises UserError then."""
    deadline, wait = time.monotonic() + seconds, 0.5
    while True:
        try:
            return operation()
        except Exception as error:  # of the service's library, of aiohttp and of the system: `outage` tells them apart
            if isinstance(error, UserError):
                raise
            if not outage(error):
                mended = told(error)
                if mended is None:
                    raise
                raise mended from error
            if time.monotonic() + wait > deadline:
                raise UserError(
                    f"{place.url}: cannot be reached{place.at} ({type(error).__name__}); check the network and {check}"
                ) from error
            _log.warning("%s: %s; trying again in %.1f s", place.url, type(error).__name__, wait)
        time.sleep(wait * random.uniform(0.5, 1.0))  # or all who met the outage come back at once
        wait = min(2 * wait, 10.0)


def no_bucket(place: Place, what: str = "bucket") -> UserError:
    """The error for a bucket that is not there."""
    return UserError(f"{place.url}: there is no {what} {place.bucket!r}{place.at}; create it or mend the URL")


def may_not_write(place: Place, asked: str) -> UserError:
    """The error for a write (`asked`, in the service's words) that the credentials do not allow."""
    return UserError(
        f"{place.url}: these credentials may not write there ({asked}){place.at}; a run needs the rights of a worker "
        "(docs/object-storage.md), or set REGROW_READ_ONLY=1 to use what is there"
    )


def may_not_delete(place: Place, asked: str) -> MayNotDelete:
    """The error for a removal that they do not allow."""
    return MayNotDelete(
        f"{place.url}: these credentials may not delete there ({asked}){place.at}; `regrow gc --delete` and mending "
        "what is damaged need the rights of an operator (docs/object-storage.md)"
    )


def refused(place: Place, code: str, check: str) -> UserError:
    """The error for credentials that the server does not take. `check` says where they come from."""
    return UserError(f"{place.url}: the server refused these credentials ({code}){place.at}; check {check}")


def conditionally(
    write: Callable[[str], str],
    unmet: Callable[[Exception], bool],
    look: Callable[[], tuple[str, str | None] | None],
) -> str | None:
    """A conditional write: the new version, or None where the condition did not hold, which `unmet` tells.

    `write` marks the object with the name it is given; `look` gives the version and the mark of what stands there.
    """
    writer = uuid4().hex
    try:
        return write(writer)
    except Exception as error:
        if not unmet(error):
            raise
    # Refused may be a second attempt whose first went through, but was never answered.
    found = look()
    return found[0] if found and found[1] == writer else None


def taken_back(attempt: Callable[[Moved], T], moved: Moved) -> T:
    """One attempt of a transfer that `moved` hears of, what a broken one brought taken back."""
    sent = 0

    def heard(more: int) -> None:
        nonlocal sent
        sent += more
        moved(more)

    try:
        return attempt(heard)
    except BaseException:
        moved(-sent)
        raise


def unless_gone(operation: Callable[[], T]) -> T | None:
    """What the operation gives, or None where there is no such object."""
    try:
        return operation()
    except FileNotFoundError:
        return None
