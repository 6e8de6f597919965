"""A proxy before a bucket's server that does what networks do: drops requests, loses answers, cuts them short, is late,
answers 500, changes bytes. Which request suffers is drawn from a seed, so that a failure can be looked at again.
"""

import http.client
import random
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["drop", "lose", "truncate", "delay", "500", "garble"]
"""`drop`: the request never arrives. `lose`: it is done, but its answer is not heard. `truncate`: the answer ends half
way. `delay`: the answer comes late. `500`: not done, and the server says it has trouble. `garble`: of a request of
more than 1 MiB another byte arrives."""


@dataclass
class FaultyProxy:
    """Forwards to `upstream`; while `faults` is not empty, each request suffers one with the chance `share`."""

    upstream: str
    faults: tuple[Fault, ...] = ()
    share: float = 0.25
    suffered: Counter[str] = field(default_factory=Counter)
    asked: list[str] = field(default_factory=list)
    """Each request's method and path, as they came."""
    endpoint: str = ""
    carried: Counter[str] = field(default_factory=Counter)
    """Bytes of bodies that arrived, by method, there and back."""
    _chance: random.Random = field(default_factory=lambda: random.Random(7))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def draw(self) -> Fault | None:
        with self._lock:
            if not self.faults or self._chance.random() >= self.share:
                return None
            fault = self._chance.choice(self.faults)
            self.suffered[fault] += 1
            return fault

    def carry(self, method: str, size: int) -> None:
        with self._lock:
            self.carried[method] += size


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.proxy.asked.append(f"{self.command} {self.path}")
        fault = self.proxy.draw()
        if fault == "drop":
            return self._hang_up()
        if fault == "500":
            self._answer(500, [("Content-Type", "application/xml")], _INTERNAL_ERROR)
            return None
        if fault == "garble" and len(body) > 2**20:
            body = bytes([body[0] ^ 1]) + body[1:]
        server = http.client.HTTPConnection(urlsplit(self.proxy.upstream).netloc, timeout=60)
        try:
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # the host too: it is signed
                server.putheader(name, value)
            server.endheaders(body)
            response = server.getresponse()
            data = response.read()
            headers = response.getheaders()
            self.proxy.carry(self.command, len(body) + len(data))
        except OSError:
            return self._hang_up()
        finally:
            server.close()
        if fault == "lose":
            return self._hang_up()
        if fault == "delay":
            time.sleep(0.2)
        self._answer(response.status, headers, data, cut=fault == "truncate")
        return None

    do_GET = do_PUT = do_HEAD = do_POST = do_PATCH = do_DELETE = handle_any

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        told = {name.lower() for name, _ in headers}
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        if "content-length" not in told:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


_INTERNAL_ERROR = b'<?xml version="1.0"?><Error><Code>InternalError</Code><Message>Try again.</Message></Error>'


@contextmanager
def faulty_proxy(upstream: str, tls: ssl.SSLContext | None = None) -> Iterator[FaultyProxy]:
    """A proxy on a port of its own, faultless until told otherwise."""
    proxy = FaultyProxy(upstream)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    server.daemon_threads = True
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    proxy.endpoint = f"http{'s' if tls else ''}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
