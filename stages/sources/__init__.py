"""Where data and models come from: one file a kind of source.

Each has a `resolve...`, which looks and must be quick, and a `bring...`, which makes one part's files out of what was
found: of a model `bring(found, where, output, work)`, of data `bring(found, where, pieces, work)` (see
`stages.sources.pieces`). Heavy libraries are imported only while bringing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from stages.identity import Json


@dataclass(frozen=True)
class Found:
    """One thing that a source resolved to."""

    identity: Mapping[str, Json]
    """What it is: digests, sizes, commits, versions, never a place. Enters the key."""
    where: Mapping[str, Json] = field(default_factory=dict)
    """Where it is, and under `name` what messages call it. Never enters the key."""


def beside(found: list[Found], others: int) -> list[Found]:
    """Files of a folder, of which the first says how many others there are that are not taken."""
    if not others or not found:
        return found
    return [Found(found[0].identity, {**found[0].where, "other_files": others}), *found[1:]]
