"""Production: which model `<name>/production` names, how that moves, and the log of its moves.

The ref is one document: the model that stands and every move so far. A move and its line in the log are one
compare-and-swap, so they never disagree and of two moves at once one is refused. The log names the models that the
next rollbacks would bring back in full, so gc keeps those; all others it names by their first digits only.
"""

import getpass
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from stages.errors import UserError
from stages.identity import Json
from stages.store import Store

KEPT = 10
"""Models that gc keeps: the one that stands and those that rollbacks would bring back."""

SHORT = 16
"""Digits that the log keeps of any other model's key and digest."""

Name = Mapping[str, str]
"""An artifact by its `key` and `digest`."""


@dataclass(frozen=True)
class Move:
    """One line of the log: the ref came to name this model."""

    number: int
    """From 1."""
    at: str
    """When, in UTC."""
    what: Literal["promoted", "rolled back"]
    model: Name
    """merge's artifact: the weights."""
    card: Name
    """publish's artifact: the card with the scores."""
    run: str
    """The run that made it."""
    compared: Name | None
    """The model in production that its scores were compared with, if there was one."""
    by: str
    """`gate`, or the person's `user@host`."""
    why: str
    """The gate's words, or the person's."""
    restores: int | None = None
    """Of a rollback: the number of the move whose model it put back."""


@dataclass(frozen=True)
class Production:
    """The ref as it was at one moment."""

    version: str
    """What a move compares with: it is refused when the ref has moved since."""
    moves: Sequence[Move]
    """Oldest first; the last one names the model that stands."""

    @property
    def now(self) -> Move:
        """The move that brought the model that stands."""
        return self.moves[-1]

    def rival(self, weights: str) -> Name | None:
        """What a model, named by the digest of its weights, is compared with: the one that stands. A model that itself
        stands keeps being compared with what it replaced, so that looking again changes no key."""
        return self.now.compared if self.now.model["digest"] == weights else self.now.model

    def stood(self, weights: str) -> bool:
        """Whether this model was in production before and was replaced. It comes back only when a person says so."""
        return self.now.model["digest"] != weights and any(_same(m.model["digest"], weights) for m in self.moves)


def production(store: Store, name: str) -> Production | None:
    """What `name`'s production ref says now, or None when nothing was promoted yet."""
    ref = store.read_ref(f"{name}/production")
    return Production(ref.version, [Move(**move) for move in ref.document["log"]]) if ref else None


def promote(
    store: Store,
    name: str,
    seen: Production | None,
    *,
    model: Name,
    card: Name,
    run: str,
    compared: Name | None,
    why: str,
    by: str = "gate",
) -> Move | None:
    """Let the ref name this model. None when it has moved since it was `seen`: then nothing changes. Raises UserError
    when the store has lost some of the model or its card."""
    number = seen.now.number + 1 if seen else 1
    return _moved(store, name, seen, Move(number, _now(), "promoted", model, card, run, compared, by, why))


def rollback(
    store: Store, name: str, why: str = "", by: str = "", check: Callable[[Move], object] = lambda move: None
) -> Move:
    """Let the ref name the model that stood before the one that stands. `check` may refuse a move before it is made.
    Raises UserError when there is none, when the store has lost some of it, and when somebody moved the ref at the same
    moment (nothing changes then)."""
    seen = production(store, name)
    if seen is None:
        raise UserError(f"{name}: nothing was promoted yet, so there is nothing to go back to; see `regrow history`")
    before = _before(seen.moves, seen.now)
    if before is None:
        raise UserError(f"{name}: no model stood in production before this one; see `regrow history {name}`")
    if len(before.model["digest"]) <= SHORT:
        raise UserError(
            f"{name}: went back {KEPT - 1} models already, and older ones are not kept for it; name a run with "
            f"`regrow promote {name} RUN`"
        )
    move = Move(
        seen.now.number + 1,
        _now(),
        "rolled back",
        before.model,
        before.card,
        before.run,
        before.compared,
        by or person(),
        why,
        before.number,
    )
    check(move)
    if _moved(store, name, seen, move) is None:
        raise UserError(
            f"{name}: production moved at this moment, and was left as it is now; look at `regrow history {name}` "
            "and repeat the rollback if you still want it"
        )
    return move


def person() -> str:
    """Who does it: `user@host`."""
    try:
        return f"{getpass.getuser()}@{platform.node()}"
    except (KeyError, OSError):  # no name for this user id, as in some containers
        return f"@{platform.node()}"


def _before(moves: Sequence[Move], move: Move) -> Move | None:
    """The move whose model stood before that of `move`; of a rollback, before that of the move it restored."""
    while move.restores is not None:
        move = moves[move.restores - 1]
    return moves[move.number - 2] if move.number > 1 else None


def _chain(moves: Sequence[Move]) -> Iterator[int]:
    """The numbers of the last move and of those that so many rollbacks would bring back."""
    move: Move | None = moves[-1]
    for _ in range(KEPT):
        if move is None:
            return
        yield move.number
        move = _before(moves, move)


def _moved(store: Store, name: str, seen: Production | None, move: Move) -> Move | None:
    moves = [*(seen.moves if seen else ()), move]
    kept = set(_chain(moves))
    log: list[Json] = [asdict(m) if m.number in kept else _shortened(asdict(m)) for m in moves]
    document = {"model": dict(move.model), "card": dict(move.card), "run": move.run, "log": log}
    for stage, artifact in (("merge", move.model), ("publish", move.card)):
        if gone := store.renew(stage, artifact["key"], artifact["digest"]):
            raise UserError(
                f"{name}: production was left as it is, because the model is no longer whole in {store.url} "
                f"({gone[0]}); run its recipe again"
            )
    swapped = store.swap_ref(f"{name}/production", seen.version if seen else None, document)
    return move if swapped else None


def _shortened(move: dict[str, Json]) -> dict[str, Json]:
    def short(name: Name | None) -> Name | None:
        return {field: value[:SHORT] for field, value in name.items()} if name else None

    # Without its run as well: a run that a ref names keeps all it used.
    return {**move, "run": "", **{field: short(move[field]) for field in ("model", "card", "compared")}}


def _same(a: str, b: str) -> bool:
    return a[:SHORT] == b[:SHORT]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
