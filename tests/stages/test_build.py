"""Building a stage: one build for many, only what changed, and what is damaged grows back."""

import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from stages.build import Built, build
from stages.child import ChildRefused
from stages.identity import Action, File, Tree, tree_of
from stages.jobs import Hooks, Job, _workplaces
from stages.objects import blob_path
from stages.runtime import Runtime
from stages.stage import Part, part_action
from stages.store import BadBlob, Store, open_store

TOYS = Path(__file__).parent / "toys"


@pytest.fixture(autouse=True)
def _toys_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{TOYS}:{Path(__file__).parents[2]}")
    monkeypatch.syspath_prepend(str(TOYS))


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    (tmp_path / "cache").mkdir()
    return Runtime(store=str(tmp_path / "store"), cache=tmp_path / "cache", lease_seconds=5)


@pytest.fixture
def store(runtime: Runtime) -> Store:
    return open_store(runtime.store, runtime.cache)


def rows(store: Store, tmp_path: Path, **texts: str) -> Tree:
    """Texts stored as the files of an artifact of some earlier stage."""
    folder = tmp_path / "rows"
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    tree = tree_of(folder)
    return store.commit(Action("rows", {"rows": 1}, {"digest": tree.digest}, {}), folder, {}, {}).tree


def shards(store: Store, runtime: Runtime, tree: Tree, suffix: str = "!", **options: Any) -> Built:
    import shard_stage  # type: ignore[import-not-found]

    return build(shard_stage.STAGE, shard_stage.ShardsConfig(suffix=suffix), {"rows": tree}, store, runtime, **options)


def calls(runtime: Runtime) -> list[str]:
    log = runtime.cache / "calls"
    return sorted(log.read_text().split()) if log.exists() else []


def test_a_second_build_is_a_hit_without_a_child(store: Store, runtime: Runtime, tmp_path: Path) -> None:
    tree = rows(store, tmp_path, a="one", b="two")
    first, second = shards(store, runtime, tree), shards(store, runtime, tree)
    assert (first.hit, second.hit) == (False, True)
    assert first.artifact == second.artifact
    assert first.artifact.facts == {"rows": 2, "by": {"a": 1, "b": 1}}
    assert calls(runtime) == ["a.txt", "b.txt"]
    assert (store.view(second.artifact.tree) / "a" / "upper.txt").read_text() == "ONE!"


@pytest.mark.parametrize("allow_code", [False, True])
def test_a_stage_that_does_without_a_module_does_not_load_it_unless_code_of_others_may(
    store: Store, runtime: Runtime, allow_code: bool
) -> None:
    import lean_stage  # type: ignore[import-not-found]

    pytest.importorskip("pandas")
    runtime = runtime.model_copy(update={"allow_code": allow_code})
    built = build(lean_stage.STAGE, lean_stage.LeanConfig(), {}, store, runtime)
    assert built.artifact.facts == {"pandas": allow_code}


def test_new_data_costs_only_itself(store: Store, runtime: Runtime, tmp_path: Path) -> None:
    shards(store, runtime, rows(store, tmp_path, a="one", b="two"))
    more = shards(store, runtime, rows(store, tmp_path, a="one", b="two", c="three"))
    assert not more.hit
    assert calls(runtime) == ["a.txt", "b.txt", "c.txt"]
    assert list(more.artifact.parts) == ["a", "b", "c"]


def test_more_parts_than_files_that_may_be_open(
    store: Store, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.jobs.PORTION_PARTS", 12)
    tree = rows(store, tmp_path, **{f"r{n}": f"text {n}" for n in range(60)})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 48, limits[1]))
    try:
        built = shards(store, runtime, tree)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert built.artifact.facts["rows"] == 60 and len(calls(runtime)) == 60


def test_two_shards_with_the_same_rows_are_one_action_done_once(store: Store, runtime: Runtime, tmp_path: Path) -> None:
    import shard_stage

    tree = rows(store, tmp_path, a="same", b="same")

    def parts(config: Any, inputs: Any) -> list[Part]:
        files = inputs["rows"].files
        return [Part(f.path[0], config.model_dump(), {"rows": Tree((File("x.txt", f.size, f.sha256),))}) for f in files]

    stage = replace(shard_stage.STAGE, parts=parts)
    built = build(stage, shard_stage.ShardsConfig(), {"rows": tree}, store, runtime)
    assert {f.path for f in built.artifact.tree.files} == {"a/upper.txt", "b/upper.txt"}
    assert calls(runtime) == ["x.txt"]


def test_when_a_part_is_refused_nobody_waits_for_the_others(store: Store, runtime: Runtime, tmp_path: Path) -> None:
    tree = rows(store, tmp_path, a="for ever", b="refused")
    with pytest.raises(ChildRefused, match="this part is refused"):
        shards(store, runtime.model_copy(update={"workers": 2}), tree)
    assert calls(runtime) == ["a.txt"]


def test_an_interrupted_build_waits_for_no_part(store: Store, runtime: Runtime, tmp_path: Path) -> None:
    rows(store, tmp_path, a="for ever", b="for ever")
    program = (
        "import signal, sys; from pathlib import Path; from stages.identity import tree_of; import shard_stage as s\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in the background, and so inherited
        "from stages.build import build; from stages.runtime import Runtime; from stages.store import open_store\n"
        "from stages.identity import Action\n"
        "runtime = Runtime(store=sys.argv[1], cache=Path(sys.argv[2]), workers=2)\n"
        "store, folder = open_store(runtime.store, runtime.cache), Path(sys.argv[3])\n"
        "tree = tree_of(folder)\n"
        "store.commit(Action('rows', {'rows': 2}, {}, {}), folder, {}, {})\n"
        "build(s.STAGE, s.ShardsConfig(), {'rows': tree}, store, runtime)\n"
    )
    command = [sys.executable, "-c", program, runtime.store, str(runtime.cache), str(tmp_path / "rows")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 120
            while calls(runtime) != ["a.txt", "b.txt"]:
                assert process.poll() is None and time.monotonic() < deadline, "both parts were to begin"
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) != 0
        finally:
            process.kill()
        assert process.stderr is not None and "KeyboardInterrupt" in process.stderr.read()


def test_a_config_change_makes_all_parts_again(store: Store, runtime: Runtime, tmp_path: Path) -> None:
    tree = rows(store, tmp_path, a="one")
    keys = {shards(store, runtime, tree, suffix).artifact.key for suffix in ("!", "?")}
    assert len(keys) == 2


def test_force_replaces_and_keeps_the_old_manifest(store: Store, runtime: Runtime, tmp_path: Path) -> None:
    tree = rows(store, tmp_path, a="one")
    shards(store, runtime, tree)
    forced = shards(store, runtime, tree, force=True)
    assert not forced.hit
    assert calls(runtime) == ["a.txt", "a.txt"]


def test_only_the_damaged_part_grows_back(store: Store, runtime: Runtime, tmp_path: Path) -> None:
    tree = rows(store, tmp_path, a="one", b="two")
    artifact = shards(store, runtime, tree).artifact
    lost = next(f for f in artifact.tree.files if f.path == "b/upper.txt")
    store.objects.delete(blob_path(lost.sha256))
    assert "b/upper.txt" in store.missing(artifact.tree)[0]
    grown = shards(store, runtime, tree, regrow=True).artifact
    assert store.missing(grown.tree) == []
    assert grown.digest == artifact.digest
    assert calls(runtime) == ["a.txt", "b.txt", "b.txt"]


def test_a_damaged_input_is_told_before_the_stage_runs(store: Store, runtime: Runtime, tmp_path: Path) -> None:
    tree = rows(store, tmp_path, a="one")
    blob = Path(runtime.store) / blob_path(tree.files[0].sha256)
    blob.chmod(0o644)
    blob.write_text("0ne")
    with pytest.raises(BadBlob):
        shards(store, runtime, tree)
    assert calls(runtime) == []


RACER = """
import sys
from pathlib import Path
import shard_stage
from stages.build import build
from stages.identity import Tree, File
from stages.runtime import Runtime
from stages.stage import Part, part_action
from stages.store import open_store
store_url, cache, *files = sys.argv[1:]
Path(cache).mkdir(parents=True, exist_ok=True)
runtime = Runtime(store=store_url, cache=Path(cache), lease_seconds=5)
tree = Tree(tuple(File(p, int(s), d) for p, s, d in (f.split(",") for f in files)))
store = open_store(store_url, Path(cache))
built = build(shard_stage.STAGE, shard_stage.ShardsConfig(), {"rows": tree}, store, runtime)
print(built.hit, built.artifact.digest)
"""


def test_a_workplace_is_there_and_empty_for_one_at_a_time(tmp_path: Path) -> None:
    """Each removes it when it is done, while others wait for its lock; half of them ask in the other order."""
    jobs = [Job(str(n), Action("toy", {"toy": 1}, {"n": n}, {}), {}, {}, False) for n in range(3)]

    def work(number: int) -> None:
        for _ in range(40):
            with _workplaces(tmp_path, "toy", jobs[:: 1 if number % 2 else -1], print) as (folders, _):
                for folder in folders.values():
                    assert list((folder / "output").iterdir()) == []
                    (folder / "output" / "made").touch(exist_ok=False)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert list((tmp_path / "work" / "toy").iterdir()) == []


def test_a_part_that_another_run_makes_is_waited_for_and_adopted(
    store: Store, runtime: Runtime, tmp_path: Path
) -> None:
    import shard_stage

    tree = rows(store, tmp_path, a="one", b="two")
    part = shard_stage.parts(shard_stage.ShardsConfig(), {"rows": tree})[0]
    job = Job(part.name, part_action(shard_stage.STAGE, part), part.config, part.inputs, False)
    told: Queue[str] = Queue()
    with ThreadPoolExecutor(1) as pool:
        with _workplaces(runtime.cache, "shards", [job], print) as (folders, _):
            built = pool.submit(shards, store, runtime, tree, hooks=Hooks(on_wait=told.put))
            assert told.get(timeout=60).endswith("at work on shards a")
            (folders["a"] / "output" / "upper.txt").write_text("ONE!")
            store.commit(job.action, folders["a"] / "output", {"rows": 1, "by": {"a": 1}}, {})
        assert built.result(60).artifact.facts["rows"] == 2
    assert calls(runtime) == ["b.txt"]


def test_racing_processes_build_once_and_all_adopt_it(store: Store, runtime: Runtime, tmp_path: Path) -> None:
    tree = rows(store, tmp_path, a="one", b="two")
    files = [f"{f.path},{f.size},{f.sha256}" for f in tree.files]
    hosts = 5

    def race(number: int) -> str:
        cache = tmp_path / f"host{number}"
        return subprocess.run(
            [sys.executable, "-c", RACER, runtime.store, str(cache), *files],
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout.strip()

    with ThreadPoolExecutor(hosts) as pool:
        told = list(pool.map(race, range(hosts)))
    assert sorted(line.split()[0] for line in told) == ["False", *["True"] * (hosts - 1)]
    assert len({line.split()[1] for line in told}) == 1
    built = [tmp_path / f"host{n}" / "calls" for n in range(hosts)]
    assert sum(log.exists() for log in built) == 1
