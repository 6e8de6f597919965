"""`make audit` asks about every pinned version, and says which is known to be vulnerable.

The service here is a small one of this test that speaks OSV's protocol (https://google.github.io/osv.dev/post-v1-query/):
what is really known changes by the day.
"""

import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ADVISORY = {
    "id": "PYSEC-0000-1",
    "modified": "2026-01-01T00:00:00Z",
    "published": "2026-01-01T00:00:00Z",
    "details": "planted",
    "affected": [
        {
            "package": {"name": "jinja2", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "9999"}]}],
        }
    ],
}


class Known(BaseHTTPRequestHandler):
    """Answers what `server.vulnerable` are known for, and keeps what was asked."""

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = query["package"]["name"]
        self.server.asked[name] = query["version"]  # type: ignore[attr-defined]
        answer = {"vulns": [ADVISORY]} if name in self.server.vulnerable else {}  # type: ignore[attr-defined]
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def service() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Known)
    server.asked, server.vulnerable = {}, set()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.full
def test_every_pin_is_asked_for_and_a_vulnerable_one_is_told(service: ThreadingHTTPServer) -> None:
    url = f"http://127.0.0.1:{service.server_address[1]}"

    def audit() -> subprocess.CompletedProcess[str]:
        command = ["make", "audit", f"AUDIT=--vulnerability-service osv --osv-url {url}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    clean = audit()
    assert clean.returncode == 0, clean.stdout + clean.stderr
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("#")[0].split(";")[0].strip().split("==") for line in lines if "==" in line)
    asked = {name.lower().replace("_", "-"): version for name, version in service.asked.items()}  # type: ignore[attr-defined]
    assert asked == {name.lower().replace("_", "-").replace(".", "-"): version for name, version in pins.items()}
    service.vulnerable.add("jinja2")  # type: ignore[attr-defined]
    found = audit()
    assert found.returncode != 0
    assert "Found 1 known vulnerability" in found.stderr and "PYSEC-0000-1" in found.stdout
