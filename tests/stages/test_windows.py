"""Training by windows: two of them on the disk at most, and not a bit differs from training with everything there."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages import pack, train
from stages.build import Built, Hooks, build
from stages.child import ChildFailed
from stages.identity import Action, Tree, tree_of
from stages.runtime import Runtime
from stages.stage import Stage, Work
from stages.store import Store, open_store
from stages.train.data import open_bins, step_order
from stages.train.windows import Windows
from tests.conftest import S3
from tests.stages import tiny
from tests.stages.packed import TOKENIZER, Packed, row, shard

SHARDS, WINDOW = 11, 200
TRAIN = train.TrainConfig.model_validate({"epochs": 2, "learning_rate": 1e-2, "lora": {"dropout": 0.1}})

WATCH = '''
"""Loaded by every Python that finds it: before a file comes or goes, adds up what of the tokens is on the disk."""
import os, pathlib, signal, sys

cache, log, kill = pathlib.Path(os.environ["WATCHED"]), os.environ["WATCHED_LOG"], os.environ.get("KILLED_AFTER")
names = set(os.environ["WATCHED_BLOBS"].split(","))

def watch(event, arguments):
    if event not in ("os.link", "os.rename", "os.remove") or str(cache) not in str(arguments[0]):
        return
    inodes = {}
    places = [*cache.glob("blobs/*/*"), *cache.glob("tmp/*"), *cache.glob("work/*/*/streamed/**/tokens.arrow")]
    for path in places:
        if path.parent.name == "tmp" or path.name == "tokens.arrow" or path.name in names:
            try:
                found = path.stat()
            except FileNotFoundError:
                continue
            inodes[found.st_ino] = found.st_size
    with open(log, "a") as file:
        file.write(f"{sum(inodes.values())}\\n")
    if kill and event == "os.link" and sum(1 for _ in open(log)) > int(kill):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
'''


class Watched:
    """A machine whose children write down how many bytes of the tokens are on its disk."""

    def __init__(self, folder: Path, url: str, tokens: Tree, patch: pytest.MonkeyPatch) -> None:
        self.log, cache = folder / "log", folder / "cache"
        (folder / "watch").mkdir(parents=True)
        (folder / "watch" / "sitecustomize.py").write_text(WATCH)
        patch.setenv("PYTHONPATH", f"{folder / 'watch'}:{Path(__file__).parents[2]}")
        patch.setenv("WATCHED", str(cache))
        patch.setenv("WATCHED_LOG", str(self.log))
        patch.setenv("WATCHED_BLOBS", ",".join(file.sha256 for file in tokens.files))
        self.runtime = Runtime.model_validate(
            {"store": url, "cache": cache, "device": "cpu", "lease_seconds": 2, "save_seconds": 1e-9}
        )
        self.store = open_store(url, cache)

    def build(self, stage: Stage[Any], config: Any, inputs: dict[str, Tree], hooks: Hooks | None = None) -> Built:
        return build(stage, config, inputs, self.store, self.runtime, hooks=hooks)

    def most(self) -> int:
        return max(map(int, self.log.read_text().split()))


def corpus(folder: Path, documents: str) -> None:
    """Shards of conversations, or of raw text where documents are wrapped; no row is like another."""
    random = np.random.default_rng(0)
    for number in range(SHARDS):
        sizes = random.integers(2, 25, 6 + number)
        wrapped = documents == "wrapped"
        rows = [
            row(("text", int(6 + size))) if wrapped else row(("user", 3), ("assistant", int(size))) for size in sizes
        ]
        for each in rows:
            each["ids"] = random.integers(3, tiny.VOCABULARY, len(each["ids"])).tolist()
        shard(folder, f"chat/{number:05}", rows)


@pytest.fixture(scope="module", params=["isolated", "wrapped"])
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    common = {"sequence_length": 64, "global_batch": 2, "window": WINDOW, "near_duplicates": 0.9}
    return {**common, "documents": request.param}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> Path:
    """Plain folders: tokens, their plan in windows, a model, and what comes out of training with all of it there."""
    folder = tmp_path_factory.mktemp("everything")
    corpus(folder / "tokens", settings["documents"])
    Packed(folder / "tokens", folder / "plan", **settings)
    tiny.llama(folder / "model")
    inputs = {name: folder / name for name in ("model", "tokens", "plan")}
    (folder / "trained").mkdir()
    torch.set_num_threads(1)
    train.STAGE.run(TRAIN, inputs, folder / "trained", Work(folder / "work", Runtime(device="cpu")))
    return folder


def stored(store: Store, folder: Path) -> Tree:
    """Copies, as the store keeps the files that it is given."""
    copy = folder.parent / "copies" / folder.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    tree = tree_of(copy)
    return store.commit(Action(folder.name, {folder.name: 1}, {"digest": tree.digest}, {}), copy, {}, {}).tree


def two_windows(plan: Path, tokens: Tree) -> int:
    """Bytes of the tokens in the largest two windows that follow one another."""
    sizes = {file.path.removesuffix("/tokens.arrow"): file.size for file in tokens.files}
    by_window: dict[int, int] = {}
    for each in json.loads((plan / "plan.json").read_text())["shards"]:
        by_window[each["window"]] = by_window.get(each["window"], 0) + sizes[each["path"]]
    assert len(by_window) >= 5
    return max(by_window[one] + by_window[(one + 1) % len(by_window)] for one in by_window)


@pytest.mark.full
def test_a_bucket_of_windows_trains_to_the_same_bits_with_two_on_the_disk(
    everything: Path, settings: dict[str, Any], s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in `everything`: threads share sums out in another order
    maker = open_store(s3.url, tmp_path / "maker")
    tokens, model = (stored(maker, everything / name) for name in ("tokens", "model"))
    ids = tokens.select("*/tokens.arrow")
    packer = Watched(tmp_path / "packer", s3.url, ids, monkeypatch)
    inputs = {
        "spans": tokens.select("*/spans.arrow", "*/counts.json"),
        "tokens": ids,
        "tokenizer": stored(maker, TOKENIZER),
    }
    plan = packer.build(pack.STAGE, pack.PackConfig(**settings), inputs).artifact.tree
    assert plan == tree_of(everything / "plan"), "the plan of tokens that come in windows is another one"
    assert 0 < packer.most() <= 2 * (2 * WINDOW + ids.size // 3)

    inputs = {"model": model, "plan": plan, "tokens": ids}
    trainer = Watched(tmp_path / "trainer", s3.url, ids, monkeypatch)
    bound = two_windows(everything / "plan", ids)
    monkeypatch.setenv("KILLED_AFTER", "30")
    with pytest.raises(ChildFailed, match="SIGKILL"):
        trainer.build(train.STAGE, TRAIN, inputs)
    monkeypatch.delenv("KILLED_AFTER")
    assert bound / 2 < trainer.most() <= bound
    built = trainer.build(train.STAGE, TRAIN, inputs)
    assert 2 < built.artifact.facts["resumed_at_step"] < built.artifact.facts["steps"]
    assert trainer.most() <= bound < ids.size / 2
    assert built.artifact.tree == tree_of(everything / "trained")


@pytest.mark.parametrize(
    ("device", "ranks"),
    [
        pytest.param("cpu", 2, marks=pytest.mark.full),
        pytest.param("cuda", 1, marks=pytest.mark.gpu),  # a process of its own reads ahead for a GPU
        pytest.param("cuda", 2, marks=pytest.mark.gpu),
    ],
)
def test_ranks_and_gpus_read_windows_as_one_process_reads_everything(
    everything: Path, tmp_path: Path, device: str, ranks: int
) -> None:
    if device == "cuda" and torch.cuda.device_count() < ranks:
        pytest.skip("needs two GPUs")
    store = open_store(str(tmp_path / "store"), tmp_path / "cache")
    inputs = {name: stored(store, everything / name) for name in ("model", "plan", "tokens")}
    inputs["tokens"] = inputs["tokens"].select("*/tokens.arrow")
    config = train.TrainConfig.model_validate(
        {"epochs": 2, "learning_rate": 1e-2, "precision": "fp32", "lora": {"dropout": 0}}
    )
    (tmp_path / "plain").mkdir()
    plain = {name: everything / name for name in inputs}
    train.STAGE.run(config, plain, tmp_path / "plain", Work(tmp_path / "work", Runtime(device="cpu")))
    runtime = Runtime(store=str(tmp_path / "store"), cache=tmp_path / "cache", device=device, ranks=ranks)
    built = build(train.STAGE, config, inputs, store, runtime)
    assert built.artifact.facts["ranks"] == ranks
    found, wanted = (
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (store.view(built.artifact.tree), tmp_path / "plain")
    )
    assert found == pytest.approx(wanted, rel=1e-3)


def test_what_is_read_in_between_takes_no_window_from_the_next_step(everything: Path) -> None:
    bins = open_bins({"tokens": everything / "tokens", "plan": everything / "plan"})
    on_the_disk: list[set[str]] = []
    windows = Windows(bins, lambda name, now, then: on_the_disk.append(set(now)))
    windows.begin(list(range(len(bins) // bins.global_batch)), 0)
    (first,) = on_the_disk[1:]
    windows.read([len(bins) - 1])
    assert not first <= on_the_disk[-1]
    windows.reach(0)
    assert on_the_disk[-1] == first


def test_a_window_of_less_than_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="a step alone reads up to 32768"):
        pack.PackConfig(window=32_767)


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    batch=st.integers(1, 6),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_an_epoch_reads_window_after_window(sizes: list[int], batch: int, epochs: int, seed: int) -> None:
    windows = [0, *itertools.accumulate(sizes)]
    steps = -(-windows[-1] // batch)
    order = step_order(windows, batch, steps * epochs, seed)
    for begin in range(0, len(order), steps):
        one = order[begin : begin + steps]
        assert sorted(one) == list(range(steps))
        read = [range(step * batch, min((step + 1) * batch, windows[-1])) for step in one]
        of = [[np.searchsorted(windows, b, side="right") for b in bins] for bins in read]
        assert all(max(before) <= min(after) for before, after in itertools.pairwise(of)), "a window is read again"
    assert order[:steps] == list(range(steps))
