"""Azure and Google on this machine's loopback: Azurite, the Azure team's own emulator, a server of ours that obeys
Google's conditions, and PyPI's emulator of Google's service, which does not."""

import base64
import fcntl
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.google_server import GoogleServer, google_server

ROOT = Path(__file__).parents[1]
AZURITE = "azurite@3.35.0"
ACCOUNT, KEY = "regrowtests", base64.b64encode(b"a key of the tests, known to all").decode()


@dataclass(frozen=True)
class Azure:
    """A container of one's own on a running Azurite."""

    endpoint: str
    container: str

    @property
    def url(self) -> str:
        return f"az://{self.container}/store"

    @property
    def connection(self) -> str:
        return f"BlobEndpoint={self.endpoint};AccountName={ACCOUNT};AccountKey={KEY}"

    def through(self, endpoint: str) -> dict[str, str]:
        """Storage options that reach it by another address."""
        return {"connection_string": self.connection.replace(self.endpoint, f"{endpoint}/{ACCOUNT}")}

    def signed(self, rights: str) -> dict[str, str]:
        """Storage options with a signature for some rights on the container (`rl`: read and list)."""
        from datetime import UTC, datetime, timedelta

        from azure.storage.blob import generate_container_sas

        until = datetime.now(UTC) + timedelta(hours=1)
        told = generate_container_sas(ACCOUNT, self.container, account_key=KEY, permission=rights, expiry=until)
        return {"connection_string": f"BlobEndpoint={self.endpoint};SharedAccessSignature={told}"}


@dataclass(frozen=True)
class Google:
    """A bucket of one's own."""

    server: GoogleServer
    bucket: str

    @property
    def url(self) -> str:
        return f"gs://{self.bucket}/store"

    @property
    def endpoint(self) -> str:
        return self.server.endpoint

    def through(self, endpoint: str) -> dict[str, str]:
        """Storage options that reach it by another address."""
        return {"endpoint_url": endpoint}


def azurite() -> str:
    """The program; installed into build/ where only npm is there. Skips where neither is."""
    if found := shutil.which("azurite-blob"):
        return found
    folder = ROOT / "build" / "azurite"
    program = folder / "node_modules" / ".bin" / "azurite-blob"
    if not program.exists():
        if shutil.which("npm") is None:
            pytest.skip("needs Azurite: npm install -g azurite")
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            npm = ["npm", "install", "--no-save", "--no-audit", "--no-fund", "--prefix", str(folder), AZURITE]
            if not program.exists() and subprocess.run(npm, capture_output=True, timeout=300).returncode:
                pytest.skip("needs Azurite, which npm could not install into build/azurite")
    return str(program)


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Azurite's endpoint, for as long as the session lives."""
    folder = tmp_path_factory.mktemp("azurite")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dies_with_us = [shutil.which("setpriv"), "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    quiet = ("--silent", "--disableTelemetry", "--skipApiVersionCheck")
    command = [*dies_with_us, azurite(), "--location", str(folder), "--blobPort", str(port), *quiet]
    environment = {**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"}
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        _answers(f"http://127.0.0.1:{port}/{ACCOUNT}", process, folder / "log")
        yield f"http://127.0.0.1:{port}/{ACCOUNT}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def azure(azure_server: str, monkeypatch: pytest.MonkeyPatch) -> Azure:
    """A fresh container; the connection stands in the environment."""
    from azure.storage.blob import BlobServiceClient

    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    made = Azure(azure_server, f"test-{uuid4().hex[:16]}")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", made.connection)
    with BlobServiceClient.from_connection_string(made.connection) as client:
        client.create_container(made.container)
    return made


@pytest.fixture(scope="session")
def google_api() -> Iterator[GoogleServer]:
    """Our server of Google's API."""
    with google_server() as server:
        yield server


@pytest.fixture
def google(google_api: GoogleServer, monkeypatch: pytest.MonkeyPatch) -> Google:
    """A fresh bucket; the server stands in the environment."""
    return Google(google_api, _bucket(google_api.endpoint, monkeypatch, google_api))


@pytest.fixture
def google_emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A fresh bucket on the emulator from PyPI, which looks at no condition; its name."""
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="needs gcp-storage-emulator")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    server._api._httpd.handle_error = lambda *_: None  # it would print a traceback for every client that hangs up
    try:
        port = server._api._httpd.server_address[1]
        name = _bucket(f"http://127.0.0.1:{port}", monkeypatch)
        yield name
    finally:
        server.stop()


def _bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, ours: GoogleServer | None = None) -> str:
    for name, value in {"STORAGE_EMULATOR_HOST": endpoint, "NO_GCE_CHECK": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    bucket = f"test-{uuid4().hex[:16]}"
    if ours is not None:
        ours.buckets[bucket] = {}
    else:
        body = b'{"name": "%s"}' % bucket.encode()
        kind = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/storage/v1/b?project=tests", body, kind)).close()
    return bucket


def _answers(url: str, process: "subprocess.Popen[Any]", log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{url}?comp=list", timeout=5).close()
        except urllib.error.HTTPError:
            return  # it refuses who does not say who they are
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Azurite did not start:\n{log.read_text()[-2000:]}") from error
            time.sleep(0.1)
