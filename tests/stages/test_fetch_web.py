"""fetch over http: connections break, servers cannot resume, files change, and what arrives is what was found."""

import hashlib
import http.client
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.errors import UserError
from stages.identity import canonical_json
from stages.sources import remote, unpack
from stages.stage import Part
from tests.stages.fetching import ROW, bring, home, pieces_of, shards, work_of
from tests.stages.test_fetch_unpack import gz, tarred, zst
from tests.stages.web_server import Page, Web, web_server

__all__ = ["home"]

ROWS = b"".join(b'{"text": "%d"}\n' % random.Random(0).getrandbits(400) for _ in range(3000))
STRONG = {"ETag": '"1"'}
WEAK = {"ETag": 'W/"1"'}
DATED = {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
NOTHING: dict[str, str] = {}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAIT", 0.001)


@pytest.fixture
def web() -> Iterator[Web]:
    with web_server() as server:
        yield server


def found_at(web: Web, page: Page, name: str = "/a.jsonl", **data: Any) -> Part:
    web.pages[name] = page
    [part] = shards({"files": f"{web.url}{name}", **data})
    return part


def whole(output: Path) -> bytes:
    return b"".join(data for _, data in pieces_of(output))


def test_a_file_is_named_by_its_version_at_its_address(web: Web, tmp_path: Path) -> None:
    part = found_at(web, Page(ROWS))
    assert part.config["found"]["etag"] == '"1"' and part.config["found"]["size"] == len(ROWS)
    assert web.url not in canonical_json(dict(part.config))
    assert whole(bring(part, tmp_path / "out")) == ROWS
    assert found_at(web, Page(ROWS)).config == part.config
    assert found_at(web, Page(ROWS, {"ETag": '"2"'})).config != part.config
    assert found_at(web, Page(ROWS), "/b.jsonl").config != part.config  # another address may use the same tag


@pytest.mark.parametrize("headers", [STRONG, WEAK, DATED])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_in_the_middle_is_gone_on_with(
    web: Web, tmp_path: Path, headers: dict[str, str], ranges: bool
) -> None:
    third = len(ROWS) // 3
    page = Page(ROWS, headers, ranges)
    part = found_at(web, page)
    page.break_after = third if ranges else None
    if not ranges:  # it breaks once, and the second time the server can only begin anew
        page.break_after, page.after = third, lambda: setattr(page, "break_after", None)
    web.asked.clear()
    assert whole(bring(part, tmp_path / "out")) == ROWS
    asked = [f"bytes={n * third}-" if n else "" for n in range(4 if len(ROWS) % 3 else 3)]
    assert web.ranges() == (asked if ranges else asked[:2])


@pytest.mark.parametrize("instead", [{"range_from": 0}, {"range_from": len(ROWS) - 10}, {"range_told": False}])
@pytest.mark.parametrize("first", [None, 2900])
def test_another_part_than_was_asked_for_is_not_taken_for_it(
    web: Web, tmp_path: Path, instead: dict[str, Any], first: int | None
) -> None:
    page = Page(ROWS)
    part = found_at(web, page, first=first)
    for name, value in instead.items():
        setattr(page, name, value)
    page.break_after, page.after = 1000, lambda: setattr(page, "break_after", None)
    web.asked.clear()
    assert whole(bring(part, tmp_path / "out")) == b"".join(ROWS.splitlines(keepends=True)[:first])
    assert web.ranges() == ["", "bytes=1000-"] + [""] * (instead != {"range_from": 0})


def test_a_server_that_never_gives_the_beginning_is_given_up(web: Web, tmp_path: Path) -> None:
    page = Page(ROWS)
    part = found_at(web, page)
    page.range_from, page.never_whole = 10, True
    with pytest.raises(UserError, match=r"a\.jsonl: the server gives another part than .* byte 0 on \(6 attempts\)"):
        bring(part, tmp_path / "out")


def test_what_an_attempt_left_is_not_downloaded_again(web: Web, tmp_path: Path) -> None:
    part = found_at(web, Page(ROWS))
    (work_of(part, tmp_path / "out") / "download").write_bytes(ROWS[:1000])
    web.asked.clear()
    assert whole(bring(part, tmp_path / "out")) == ROWS
    assert web.ranges() == ["bytes=1000-"]


def test_a_busy_server_is_asked_again_and_waited_for(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("stages.sources.remote.time.sleep", waited.append)
    page = Page(ROWS)
    part = found_at(web, page)
    page.refusals = [(503, {}), (429, {"Retry-After": "7"}), (500, {})]
    assert whole(bring(part, tmp_path / "out")) == ROWS
    assert waited[1] == 7.0 and waited[0] < 0.01 and waited[2] > 2 * waited[0]


def test_a_server_that_never_gives_it_is_given_up(web: Web, tmp_path: Path) -> None:
    page = Page(ROWS)
    part = found_at(web, page)
    page.break_after = 0
    web.asked.clear()
    with pytest.raises(UserError, match=rf"cannot read a.jsonl: .* after 0 of {len(ROWS)} bytes \(6 attempts\)"):
        bring(part, tmp_path / "out")
    assert len(web.asked) == remote.TRIES
    page.refusals = [(503, {})] * 10
    with pytest.raises(UserError, match="the server says 503"):
        bring(part, tmp_path / "out2")


@pytest.mark.parametrize("headers", [STRONG, WEAK, DATED])
def test_a_file_that_changes_in_the_middle_is_told(web: Web, tmp_path: Path, headers: dict[str, str]) -> None:
    page = Page(ROWS, headers)
    part = found_at(web, page)
    other = Page(ROWS[::-1], {name: value.replace("1", "2") for name, value in headers.items()})
    page.break_after, page.after = 1000, lambda: web.pages.update({"/a.jsonl": other})
    with pytest.raises(UserError, match=r"a\.jsonl changed while the run was going on: run again"):
        bring(part, tmp_path / "out")


def test_a_file_that_grows_under_the_same_tag_is_told(web: Web, tmp_path: Path) -> None:
    part = found_at(web, Page(ROWS))
    web.pages["/a.jsonl"] = Page(ROWS + ROW)
    with pytest.raises(UserError, match="changed while the run was going on"):
        bring(part, tmp_path / "out")


class TestDigest:
    """`sha256` in the recipe: what the file must have, wherever it is."""

    def test_a_server_without_versions_needs_one(self, web: Web, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"has neither ETag nor Last-Modified, .* give its `sha256`"):
            found_at(web, Page(ROWS, NOTHING))
        sha256 = hashlib.sha256(ROWS).hexdigest()
        part = found_at(web, Page(ROWS, NOTHING), sha256=sha256)
        assert part.config["found"] == {"suffix": ".jsonl", "size": len(ROWS), "sha256": sha256}
        assert whole(bring(part, tmp_path / "out")) == ROWS

    def test_other_bytes_are_refused_and_not_kept(self, web: Web, tmp_path: Path) -> None:
        part = found_at(web, Page(ROWS), sha256=hashlib.sha256(b"other").hexdigest())
        with pytest.raises(UserError, match=r"a\.jsonl changed"):
            bring(part, tmp_path / "out")
        assert list(work_of(part, tmp_path / "out").iterdir()) == []

    def test_the_same_file_on_this_disk_is_the_same(self, web: Web, home: Path) -> None:
        sha256 = hashlib.sha256(ROWS).hexdigest()
        (home / "b.jsonl").write_bytes(ROWS)
        [local] = shards({"files": "b.jsonl"})
        assert found_at(web, Page(ROWS), sha256=sha256).config == local.config
        with pytest.raises(UserError, match=r"b\.jsonl has the sha256"):
            shards({"files": "b.jsonl", "sha256": "0" * 64})
        with pytest.raises(UserError, match="sha256 is that of one file, and there are 2"):
            shards({"files": ["b.jsonl", f"{web.url}/a.jsonl"], "sha256": sha256})


@pytest.mark.parametrize("breaks", [False, True])
def test_a_page_without_a_length(web: Web, tmp_path: Path, breaks: bool) -> None:
    page = Page(ROWS, ends="chunks", ranges=False)
    part = found_at(web, page)
    assert part.config["found"]["size"] is None
    if breaks:  # once, in the middle of a chunk
        page.break_after, page.after = len(ROWS) // 2, lambda: setattr(page, "break_after", None)
    assert whole(bring(part, tmp_path / "out")) == ROWS


def test_a_page_that_ends_with_the_connection_needs_a_digest(web: Web, tmp_path: Path) -> None:
    page = Page(ROWS, ends="close", ranges=False)
    with pytest.raises(UserError, match="without a length, so a part would be taken for the whole: give its `sha256`"):
        found_at(web, page)
    part = found_at(web, page, sha256=hashlib.sha256(ROWS).hexdigest())
    assert whole(bring(part, tmp_path / "out")) == ROWS
    page.break_after = len(ROWS) // 2
    with pytest.raises(UserError, match=r"a\.jsonl changed"):
        bring(part, tmp_path / "cut")


@pytest.mark.parametrize(
    ("page", "name", "says"),
    [
        (Page(b""), "/a.jsonl", r"a\.jsonl is empty"),
        (Page(b"", ranges=False), "/a.jsonl", r"a\.jsonl is empty"),
        (Page(ROWS), "/a", r"a is none of \.jsonl"),
        (Page(ROWS), "/*.jsonl", "nobody can list files: name each"),
        (Page(ROWS, refusals=[(404, {})]), "/a.jsonl", "the server says 404 Not Found: there is no such file"),
        (Page(ROWS, refusals=[(403, {})]), "/a.jsonl", "the server says 403 .*check the address"),
    ],
)
def test_what_is_not_there_is_told_at_once(web: Web, page: Page, name: str, says: str) -> None:
    with pytest.raises(UserError, match=f"fetch.data.mine.files: .*{says}"):
        found_at(web, page, name)


def test_no_server_and_no_host() -> None:
    with pytest.raises(UserError, match=r"cannot read http://127.0.0.1:1/a.jsonl: no connection: .*\(6 attempts\)"):
        shards({"files": "http://127.0.0.1:1/a.jsonl"})
    with pytest.raises(UserError, match=r"the host nowhere.invalid is not known"):
        shards({"files": "https://nowhere.invalid/a.jsonl"})


class TestCredentials:
    def test_headers_come_from_the_environment_and_are_kept_nowhere(
        self, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MY_TOKEN", "Bearer s3cret")
        options = {"storage_options": {"headers": {"Authorization": "env:MY_TOKEN"}}}
        part = found_at(web, Page(ROWS, needs="Bearer s3cret"), **options)
        assert "s3cret" not in canonical_json([dict(part.config), dict(part.where)])
        output = bring(part, tmp_path / "out")
        assert whole(output) == ROWS
        assert not any(b"s3cret" in path.read_bytes() for path in output.rglob("*") if path.is_file())
        monkeypatch.delenv("MY_TOKEN")
        with pytest.raises(UserError, match=r"storage_options.headers.Authorization: .* MY_TOKEN is not set"):
            shards({"files": f"{web.url}/a.jsonl", **options})
        with pytest.raises(UserError, match=r"401 .*: name credentials in storage_options"):
            shards({"files": f"{web.url}/a.jsonl"})

    def test_another_host_gets_none(self, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MY_TOKEN", "s3cret")
        with web_server() as other:
            other.pages["/b.jsonl"] = Page(ROWS)
            away = (302, {"Location": f"{other.url}/b.jsonl"})
            page = Page(ROWS, refusals=[away, away])
            part = found_at(web, page, storage_options={"headers": {"X-Key": "env:MY_TOKEN"}})
            assert whole(bring(part, tmp_path / "out")) == ROWS
            assert [headers.get("x-key") for _, headers in web.asked] == ["s3cret"] * 2
            assert [headers.get("x-key") for _, headers in other.asked] == [None] * 2

    def test_only_headers(self, web: Web) -> None:
        with pytest.raises(UserError, match="has `headers` only, not anon"):
            found_at(web, Page(ROWS), storage_options={"anon": True})


@pytest.mark.parametrize("name", ["/a.jsonl.gz", "/a.jsonl.zst", "/a.tar", "/a.tar.gz", "/a.tar.zst"])
def test_the_first_rows_of_what_is_packed(web: Web, tmp_path: Path, name: str) -> None:
    data = tarred({"a.jsonl": ROWS}) if ".tar" in name else ROWS
    page = Page(gz(data) if name.endswith("gz") else zst(data) if name.endswith("zst") else data)
    part = found_at(web, page, name, first=2900)
    page.break_after = len(page.data) // 3
    assert whole(bring(part, tmp_path / "out")) == b"".join(ROWS.splitlines(keepends=True)[:2900])


def test_what_a_page_without_a_length_may_unpack_to(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as of any other file, and no more."""
    monkeypatch.setattr(unpack, "ALWAYS", 1 << 16)
    part = found_at(web, Page(gz(ROWS), ends="chunks", ranges=False), "/a.jsonl.gz", first=2900)
    assert whole(bring(part, tmp_path / "out")) == b"".join(ROWS.splitlines(keepends=True)[:2900])
    bomb = Page(gz(ROW + b" " * (16 << 20)), ends="chunks", ranges=False)
    part = found_at(web, bomb, "/b.jsonl.gz", first=2900)
    with pytest.raises(UserError, match=r"unpacks to more than 250 times its [1-9]\d+ bytes"):
        bring(part, tmp_path / "bomb")


def test_the_first_rows_of_a_long_file_need_not_the_rest(web: Web, tmp_path: Path) -> None:
    page = Page(ROWS * 200)
    part = found_at(web, page, first=3)
    sent: list[int] = []
    write = http.client.HTTPResponse.read1

    def counted(answer: http.client.HTTPResponse, size: int = -1) -> bytes:
        data = write(answer, size)
        sent.append(len(data))
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http.client.HTTPResponse, "read1", counted)
        output = bring(part, tmp_path / "out")
    assert whole(output) == b"".join(ROWS.splitlines(keepends=True)[:3])
    assert sum(sent) < len(page.data) // 10
