"""Servers on the loopback that do all that can be done to a download: break off, begin anew, change, refuse."""

import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, cast
from urllib.parse import urlsplit


@dataclass
class Page:
    """What stands at one address."""

    data: bytes
    headers: dict[str, str] = field(default_factory=lambda: {"ETag": '"1"'})
    ranges: bool = True
    range_from: int | None = None
    """Where each range begins instead of where it was asked for."""
    range_told: bool = True
    """Whether `Content-Range` says which part it is."""
    never_whole: bool = False
    """Who asks for all gets a range, too."""
    break_after: int | None = None
    """Bytes of each answer after which the connection breaks; headers promise the rest too."""
    refusals: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """Answers given first, one a request: status and headers."""
    needs: str = ""
    """The `Authorization` without which it is 401."""
    ends: Literal["length", "chunks", "close"] = "length"
    """How the end of a body is told: by its length before it, by a last chunk as of pages that are made on the spot, or
    by nothing but the end of the connection."""
    after: Callable[[], Any] | None = None
    """Called before each body is sent: the next request may find another page."""


@dataclass
class Web:
    """A running server: pages by path, and what was asked for."""

    url: str
    pages: dict[str, Page] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """(path, headers) of every request."""

    def ranges(self) -> list[str]:
        """The ranges asked for, "" for all of a page."""
        return [headers.get("range", "") for _, headers in self.asked]


@contextmanager
def web_server() -> Iterator[Web]:
    """Serves until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            return None

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            asked = {name.lower(): value for name, value in self.headers.items()}
            web.asked.append((path, asked))
            page = web.pages.get(path)
            if page is None:
                self.plain(404, {})
            elif page.refusals:
                self.plain(*page.refusals.pop(0))
            elif page.needs and asked.get("authorization") != page.needs:
                self.plain(401, {})
            else:
                self.answer(page, asked)

        def plain(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": "0", **headers}.items():
                self.send_header(name, value)
            self.end_headers()

        def answer(self, page: Page, asked: dict[str, str]) -> None:
            # As they are when the question comes: who asks goes on, and may change them, once it has the headers.
            break_after, after = page.break_after, page.after
            begin, end = 0, len(page.data)
            known = (page.headers.get("ETag"), page.headers.get("Last-Modified"))
            ranged = page.ranges and "range" in asked and asked.get("if-range", known[0] or known[1]) in known
            if ranged:
                first, _, last = asked["range"].removeprefix("bytes=").partition("-")
                begin, end = int(first), min(end, int(last) + 1) if last else end
            if page.range_from is not None and (ranged or page.never_whole):
                ranged, begin = True, page.range_from
            if ranged and begin >= len(page.data):
                self.plain(416, {"Content-Range": f"bytes */{len(page.data)}"})
                return
            body = page.data[begin:end]
            self.send_response(206 if ranged else 200)
            if ranged and page.range_told:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(page.data)}")
            for name, value in page.headers.items():
                self.send_header(name, value)
            if page.ends == "chunks":
                self.send_header("Transfer-Encoding", "chunked")
            elif page.ends == "length":
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            sent = body if break_after is None else body[:break_after]
            if after and len(body) > 1:
                after()
            cut = len(sent) < len(body)
            chunks = page.ends == "chunks"
            head, tail = b"%x\r\n" % len(body) * chunks, b"\r\n0\r\n\r\n" * (chunks and not cut)
            self.wfile.write(head + sent + tail)
            if cut or page.ends == "close":
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web = Web(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class Proxy:
    """Passes connections on, and breaks the next `breaks` that answer with more than `after` bytes."""

    url: str
    after: int
    breaks: int = 0


@contextmanager
def breaking_proxy(target: str, after: int) -> Iterator[Proxy]:
    """Stands before the server at `target` until the block ends."""
    there = urlsplit(target)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            ours = cast(socket.socket, self.request)
            with socket.create_connection((there.hostname, there.port)) as theirs:
                threading.Thread(target=self.ask, args=(ours, theirs), daemon=True).start()
                passed = 0
                while data := theirs.recv(65536):
                    passed += len(data)
                    if passed > proxy.after and proxy.breaks:
                        proxy.breaks -= 1
                        break
                    ours.sendall(data)
                with suppress(OSError):
                    ours.shutdown(socket.SHUT_RDWR)

        def ask(self, ours: socket.socket, theirs: socket.socket) -> None:
            with suppress(OSError):
                while data := ours.recv(65536):
                    theirs.sendall(data)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            return None

    server = Server(("127.0.0.1", 0), Handler)
    proxy = Proxy(f"http://127.0.0.1:{server.server_address[1]}", after)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
