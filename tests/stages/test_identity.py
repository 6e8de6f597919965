"""Canonical JSON, keys and trees: one text per value, one key per action, one digest per set of files."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.identity import Action, File, Tree, canonical_json, join, sha256_text, tree_of

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
files = st.builds(File, st.from_regex(r"[a-z]{1,4}(/[a-z]{1,4}){0,2}", fullmatch=True), st.integers(0, 2**40), digests)
trees = st.lists(files, max_size=6, unique_by=lambda f: f.path).map(lambda fs: Tree(tuple(fs)))


def shuffled(value: object, random: object) -> object:
    """The same JSON value with every dictionary in another order."""
    if isinstance(value, dict):
        items = [(k, shuffled(v, random)) for k, v in value.items()]
        random.shuffle(items)  # type: ignore[attr-defined]
        return dict(items)
    return [shuffled(v, random) for v in value] if isinstance(value, list) else value


def same(a: object, b: object) -> bool:
    """Equality that tells 1, 1.0 and True apart, and 0.0 from -0.0."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


@given(values, st.randoms())
def test_equal_values_have_one_text_that_reads_back(value: object, random: object) -> None:
    text = canonical_json(value)
    assert canonical_json(shuffled(value, random)) == text
    assert same(json.loads(text), value)
    assert canonical_json(json.loads(text)) == text


@given(values, values)
def test_different_values_have_different_texts(a: object, b: object) -> None:
    assert (canonical_json(a) == canonical_json(b)) == same(a, b)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"train": {"rate": math.nan}}, "$.train.rate"),
        ([1, [math.inf]], "$[1][0]"),
        ({"a": {1: "x"}}, "$.a"),
        ({"targets": {"q", "v"}}, "$.targets"),
        ({"path": Path("x")}, "$.path"),
        ({"n": type("Count", (int,), {})(3)}, "$.n"),
    ],
)
def test_what_has_no_stable_form_is_refused_by_place(value: object, place: str) -> None:
    with pytest.raises((ValueError, TypeError), match=place.replace("$", r"\$").replace("[", r"\[")):
        canonical_json(value)


ACTION = Action("train", {"train": 1}, {"rate": 1e-3, "lora": {"rank": 16}}, {"tokens": "a" * 64, "model": "b" * 64})


@pytest.mark.parametrize(
    "other",
    [
        Action("merge", ACTION.version, ACTION.config, ACTION.inputs),
        Action("train", {"train": 2}, ACTION.config, ACTION.inputs),
        Action("train", {"train": 1, "objective:dpo": 1}, ACTION.config, ACTION.inputs),
        Action("train", ACTION.version, {**ACTION.config, "rate": 2e-3}, ACTION.inputs),
        Action("train", ACTION.version, {**ACTION.config, "rate": "0.001"}, ACTION.inputs),
        Action("train", ACTION.version, {**ACTION.config, "lora": {"rank": 8}}, ACTION.inputs),
        Action("train", ACTION.version, ACTION.config, {**ACTION.inputs, "model": "c" * 64}),
        Action("train", ACTION.version, ACTION.config, {"tokens": "b" * 64, "model": "a" * 64}),
        Action("train", ACTION.version, ACTION.config, {"tokens": "a" * 64}),
    ],
)
def test_everything_an_action_says_moves_its_key(other: Action) -> None:
    assert other.key != ACTION.key


def test_the_key_is_the_same_in_every_process_and_for_ever() -> None:
    code = (
        "from stages.identity import Action; print(Action('train', {'train': 1}, "
        "{'lora': {'rank': 16}, 'rate': 1e-3}, {'model': 'b' * 64, 'tokens': 'a' * 64}).key)"
    )
    keys = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert keys == {ACTION.key}
    assert ACTION.key == sha256_text(canonical_json(ACTION.document))
    assert ACTION.key == "40c7d05290adeeb518fc6881d4479ca3d03e95e8bd620704177fc7f1c3c09c8c"


@given(trees, st.randoms())
def test_a_trees_digest_ignores_order_and_sees_everything_else(tree: Tree, random: object) -> None:
    listed = list(tree.files)
    random.shuffle(listed)  # type: ignore[attr-defined]
    assert Tree(tuple(listed)).digest == tree.digest
    for n, file in enumerate(tree.files):
        rest = tree.files[:n] + tree.files[n + 1 :]
        for other in (
            File(file.path + "x", file.size, file.sha256),
            File(file.path, file.size + 1, file.sha256),
            File(file.path, file.size, sha256_text(file.sha256)),
        ):
            assert Tree((*rest, other)).digest != tree.digest
        assert Tree(rest).digest != tree.digest


@given(trees, st.from_regex(r"[a-z]{1,3}(/[a-z]{1,3})?", fullmatch=True))
def test_moving_below_a_folder_and_looking_from_there_is_the_identity(tree: Tree, folder: str) -> None:
    assert tree.under(folder).folder(folder) == tree
    assert tree.under(folder).size == tree.size


@given(trees, trees)
def test_joined_trees_hold_both(a: Tree, b: Tree) -> None:
    both = join([a.under("a"), b.under("b")])
    assert both.folder("a").digest == a.digest
    assert both.folder("b").digest == b.digest
    assert len(both.files) == len(a.files) + len(b.files)


@given(st.dictionaries(st.from_regex(r"[a-z]{1,3}", fullmatch=True), st.binary(max_size=50), max_size=4))
def test_the_tree_of_a_folder_is_what_sha256sum_says(contents: dict[str, bytes]) -> None:
    import hashlib
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "empty").mkdir()
        for path, data in contents.items():
            (folder / "in" / path).parent.mkdir(exist_ok=True)
            (folder / "in" / path).write_bytes(data)
        expected = {(f"in/{p}", len(d), hashlib.sha256(d).hexdigest()) for p, d in contents.items()}
        assert {(f.path, f.size, f.sha256) for f in tree_of(folder).files} == expected


def test_links_and_pipes_have_no_place_in_an_artifact(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(ValueError, match="link is not a plain file"):
        tree_of(tmp_path)
    (tmp_path / "link").unlink()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is not a plain file"):
        tree_of(tmp_path)
