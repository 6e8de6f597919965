"""Quick looks into a bucket: they say what s3fs says, need neither it nor its libraries, and leave to it what they
cannot tell."""

import json
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from stages.errors import UserError
from stages.objects.network import Place
from stages.objects.s3 import S3Objects, open_s3
from stages.objects.s3_looks import looks_into
from stages.store import open_store
from tests.conftest import ADMIN, READER, S3, _client
from tests.stages.faulty_proxy import Fault, faulty_proxy


def objects_of(s3: S3, **options: str) -> S3Objects:
    return open_s3(s3.url.removeprefix("s3://"), options)


def without(objects: S3Objects) -> S3Objects:
    """The same objects, through s3fs alone."""
    return replace(objects, looks=None)


def in_a_fresh_process(s3: S3, **options: str) -> set[str]:
    """Which libraries a process imports that opens the store and looks into it."""
    code = (
        "import sys, json, pathlib, stages.store\n"
        "store = stages.store.open_store(sys.argv[1], pathlib.Path(sys.argv[2]), json.loads(sys.argv[3]))\n"
        "assert store.find('pack', '0' * 64) is None and dict(store.runs()) == {'run': {}}\n"
        "assert store.objects.stat('runs/run.json').size == 2\n"
        "print(json.dumps(sorted({'s3fs', 'fsspec', 'botocore', 'aiohttp'} & set(sys.modules))))"
    )
    command = [sys.executable, "-c", code, s3.url, "cache", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


@pytest.fixture
def filled(s3: S3, tmp_path: Path) -> S3:
    open_store(s3.url, tmp_path / "cache").write_run("run", {})
    return s3


@pytest.fixture
def profiles(filled: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home whose configuration files alone say how the bucket is reached."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    folder = tmp_path / "home" / ".aws"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(folder.parent))
    where = f"endpoint_url = {filled.endpoint}\nregion = us-east-1\n"
    (folder / "config").write_text(f"[default]\n{where}[profile reader]\n{where}")
    pairs = {"default": ADMIN, "reader": READER}
    (folder / "credentials").write_text(
        "".join(f"[{n}]\naws_access_key_id = {k}\naws_secret_access_key = {s}\n" for n, (k, s) in pairs.items())
    )
    return folder


def test_looking_needs_no_s3fs_where_options_and_environment_say_all(filled: S3) -> None:
    assert in_a_fresh_process(filled) == set()
    assert in_a_fresh_process(filled, key=READER[0], secret=READER[1], region_name="us-east-1") == set()


def test_looking_with_a_profile_needs_botocore_alone(profiles: Path, filled: S3) -> None:
    assert in_a_fresh_process(filled) == {"botocore"}
    assert in_a_fresh_process(filled, profile="reader") == {"botocore"}
    reader = objects_of(filled, profile="reader")
    assert reader.looks is not None and reader.read("runs/run.json") == without(reader).read("runs/run.json")
    with pytest.raises(UserError, match="may not write there"):
        reader.put("runs/run.json", b"{}")


def test_keys_in_the_environment_go_before_the_default_profile(
    profiles: Path, filled: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER[1])
    assert in_a_fresh_process(filled) == {"botocore"}  # the endpoint stands in the file
    monkeypatch.setenv("AWS_ENDPOINT_URL", filled.endpoint)
    assert in_a_fresh_process(filled) == set()


def test_a_profile_with_what_only_s3fs_obeys_is_left_to_it(profiles: Path, filled: S3) -> None:
    (profiles / "config").write_text(
        f"[default]\nservices = here\n[services here]\ns3 =\n  endpoint_url = {filled.endpoint}\n"
    )
    objects = objects_of(filled)
    assert objects.looks is None and objects.read("runs/run.json") is not None


def test_a_role_of_the_machine(filled: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    until = "2999-01-01T00:00:00Z"
    told = {"AccessKeyId": READER[0], "SecretAccessKey": READER[1], "Token": None, "Expiration": until}
    with serving(200, {"Content-Type": "application/json"}, json.dumps(told).encode()) as server:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{server}/role")
        assert in_a_fresh_process(filled) == {"botocore"}


def test_looks_say_what_s3fs_says(filled: S3) -> None:
    objects = objects_of(filled)
    assert objects.looks is not None
    slow = without(objects)
    names = ("refs/a.json", "refs/a/b.json", "runs/ä b%20+&=.json")
    made = {name: objects.create(name, name.encode()) for name in names}
    for name in (*names, "runs/run.json", "runs/none.json", "runs"):
        assert objects.read(name) == slow.read(name)
        assert objects.stat(name) == slow.stat(name)
    for prefix in ("", "refs/", "runs/", "none/"):
        assert sorted(objects.list(prefix)) == sorted(slow.list(prefix))
    found = objects.read("refs/a.json")
    assert found is not None and found.version == made["refs/a.json"]
    assert objects.swap("refs/a.json", b"2", found.version) and not objects.swap("refs/a.json", b"3", found.version)
    assert objects.read("refs/a.json") == slow.read("refs/a.json")


@pytest.mark.parametrize("quick", [True, False])
def test_what_somebody_else_writes_between_two_looks_is_seen(filled: S3, quick: bool) -> None:
    """A listing that is remembered would hide another machine's runs, or show what it has removed."""
    objects = objects_of(filled) if quick else without(objects_of(filled))
    somebody, there = _client(filled.endpoint), {"Bucket": filled.bucket, "Key": "store/runs/new.json"}

    def looks() -> list[bool]:
        listed = "runs/new.json" in [entry.path for entry in objects.list("runs/")]
        return [listed, objects.stat("runs/new.json") is not None, objects.read("runs/new.json") is not None]

    assert looks() == [False] * 3
    somebody.call_s3("put_object", **there, Body=b"{}")
    assert looks() == [True] * 3
    somebody.call_s3("delete_object", **there)
    assert looks() == [False] * 3


def test_folders_that_a_console_made_are_no_objects(filled: S3) -> None:
    objects = objects_of(filled)
    for path in ("runs/", "runs/folder/"):
        objects.put(path, b"")
    assert [entry.path for entry in objects.list("runs/")] == ["runs/run.json"]


def test_a_long_list_comes_page_by_page(filled: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.objects.s3_looks.MANY", 2)
    objects = objects_of(filled)
    for n in range(3):
        objects.put(f"refs/{n}.json", b"{}")
    assert sorted(entry.path for entry in objects.list("refs/")) == [f"refs/{n}.json" for n in range(3)]


def test_a_forked_process_opens_the_store_anew(filled: S3) -> None:
    code = (
        "import os, sys\n"
        "from stages.objects.s3 import open_s3\n"
        "before = open_s3(sys.argv[1], {})\n"
        "assert before.looks.read('runs/run.json').data == b'{}'\n"
        "if not os.fork():\n"
        "    after = open_s3(sys.argv[1], {})\n"
        "    os._exit(int(after.read('runs/run.json').data != b'{}' or len(list(after.list('runs/'))) != 1))\n"
        "sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))\n"
    )
    subprocess.run([sys.executable, "-c", code, filled.url.removeprefix("s3://")], check=True, timeout=120)


@pytest.mark.parametrize("fault", ["drop", "truncate", "500"])
def test_what_a_look_cannot_tell_is_asked_of_s3fs(filled: S3, fault: Fault) -> None:
    with faulty_proxy(filled.endpoint) as proxy:
        objects = objects_of(filled, endpoint_url=proxy.endpoint)
        assert objects.looks is not None
        proxy.faults, proxy.share = (fault,), 0.3
        for _ in range(3):
            assert objects.read("runs/run.json") == without(objects).read("runs/run.json")
            assert [entry.path for entry in objects.list("runs/")] == ["runs/run.json"]
            assert objects.stat("runs/none.json") is None
        assert proxy.suffered[fault] > 1


def test_settings_of_obstores_own_change_nothing(filled: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = {"AWS_ENDPOINT": "http://127.0.0.1:9", "AWS_SKIP_SIGNATURE": "true", "AWS_REGION": "nowhere"}
    for name, value in {**nowhere, "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true", "AWS_BUCKET": "other"}.items():
        monkeypatch.setenv(name, value)
    assert in_a_fresh_process(filled) == set()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    assert in_a_fresh_process(filled, endpoint_url=filled.endpoint) == set()


def test_a_server_whose_certificate_a_company_signed(
    filled: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    authority, tls = signed(tmp_path)
    with faulty_proxy(filled.endpoint, tls) as proxy:
        options = {"endpoint_url": proxy.endpoint}
        assert looks_into(Place("s3", filled.bucket, "store"), options, anonymous=False) is None
        with pytest.raises(UserError, match="certificate verify failed"):
            objects_of(filled, **options)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(authority))
        assert in_a_fresh_process(filled, **options) == set()


@pytest.mark.parametrize("status", [200, 307])
def test_a_page_that_answers_instead_of_the_server_is_not_read(s3: S3, status: int) -> None:
    with (
        serving(200, {"Content-Type": "text/html"}, b"<html>Please log in</html>") as page,
        serving(status, {"Location": page}, b"") as portal,
    ):
        assert looks_into(Place("s3", s3.bucket, "store"), {"endpoint_url": portal}, anonymous=False) is None


def signed(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """An authority's certificate, and what a server on the loopback needs to show one that it signed."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.now(UTC)
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("authority", "server")}
    names = {name: x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in keys}
    address = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))])
    for name in keys:
        made = (
            x509.CertificateBuilder(names["authority"], names[name], keys[name].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(name == "authority", None), critical=True)
            .add_extension(address, critical=False)
            .sign(keys["authority"], hashes.SHA256())
        )
        (folder / f"{name}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(keys["server"].private_bytes(serialization.Encoding.PEM, *plain))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(folder / "server.pem", folder / "key.pem")
    return folder / "authority.pem", tls


@contextmanager
def serving(status: int, headers: dict[str, str], body: bytes) -> Iterator[str]:
    """A server that answers everything alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
