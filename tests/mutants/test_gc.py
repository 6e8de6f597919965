"""What gc lets go and when, where a changed line went unnoticed by all other tests."""

from pathlib import Path
from typing import Any

from stages.gc import Tally, collect, verify
from stages.objects import blob_path
from stages.store import Store
from tests.stages.conftest import make_action, make_folder, store  # noqa: F401
from tests.stages.test_gc import age

DAY = 24 * 3600.0


def test_what_was_damaged_is_kept_as_long_as_runs_are(store: Store) -> None:  # noqa: F811
    """Somebody may want to know what is wrong with it: longer than two days."""
    store.objects.put("quarantine/abc", b"x")
    for days, left in ((20.0, 1), (31.0, 0)):
        age(store, days * DAY)
        collect(store, delete=True)
        assert len(list(store.objects.list("quarantine/"))) == left


def test_every_damaged_blob_is_told_once(store: Store, make_folder: Any, make_action: Any) -> None:  # noqa: F811
    """Also one that no artifact lists any more."""
    made = store.commit(make_action(), make_folder({"a": b"a", "b": b"b"}), {}, {})
    for number, file in enumerate(made.tree.files):
        path = Path(store.url) / blob_path(file.sha256)
        path.chmod(0o600)
        path.write_bytes(b"xy"[number : number + 1])
    store.objects.delete(f"actions/pack/{made.key}.json")
    kept = store.commit(make_action(name="kept"), make_folder({"c": b"c"}), {}, {})
    [file] = kept.tree.files
    path = Path(store.url) / blob_path(file.sha256)
    path.chmod(0o600)
    path.write_bytes(b"z")
    told = sorted((problem.artifact, problem.path) for problem in verify(store, deep=True).problems)
    unlisted = sorted(("", blob_path(file.sha256)) for file in made.tree.files)
    assert told == [*unlisted, (f"pack/{kept.key}", "c")]


def test_a_digest_names_all_artifacts_with_these_bytes(store: Store, make_folder: Any, make_action: Any) -> None:  # noqa: F811
    """One of them is what a later run finds by its key."""
    one, other = (store.commit(make_action(n=n), make_folder({"a": b"a"}), {}, {}) for n in range(2))
    assert one.digest == other.digest and one.key != other.key
    store.swap_ref("pins/bytes", None, {"digest": one.digest})
    age(store, 40 * DAY)
    collect(store, delete=True)
    assert [store.find("pack", each.key) for each in (one, other)] == [one, other]


def test_a_dry_run_tells_nothing_young_as_going(store: Store) -> None:  # noqa: F811
    store.objects.put(blob_path("0" * 64), b"nobody lists it yet")
    assert collect(store).freed["blobs"] == Tally(0, 0) == collect(store, delete=True).freed["blobs"]
    age(store, 3 * DAY)
    assert collect(store).freed["blobs"].count == 1 == collect(store, delete=True).freed["blobs"].count
