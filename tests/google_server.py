"""Google Cloud Storage's JSON API as far as a store asks it, with its conditions, in memory: PyPI's emulator has none.

with google_server() as server:
    server.buckets["mine"] = {}
    open_store("gs://mine/store", cache, {"endpoint_url": server.endpoint, "token": "anon"})
"""

import base64
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

PAGE = 100
"""Objects that a listing shows at once."""


@dataclass
class GoogleServer:
    """What it holds, and what it is told to refuse."""

    endpoint: str = ""
    buckets: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    uploads: dict[str, tuple[str, dict[str, Any], bytes]] = field(default_factory=dict)
    forbidden: set[str] = field(default_factory=set)
    """Permissions that nobody has, such as `storage.objects.delete`."""
    keeps: int | None = None
    """Bytes that it keeps of each part of an upload; None: all."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))


class Refused(Exception):
    """An HTTP status and what the service says with it."""


def write(server: GoogleServer, bucket: str, said: dict[str, Any], data: bytes, **query: str) -> dict[str, Any]:
    objects, digest = server.buckets[bucket], base64.b64encode(hashlib.md5(data).digest()).decode()
    if said.get("md5Hash", digest) != digest:
        raise Refused(400, "Provided MD5 hash doesn't match calculated MD5 hash")
    check(objects, said["name"], query, "create")
    if said["name"] in objects:
        allow(server, "delete")  # as the service has it: to replace is to delete
    objects[said["name"]] = {**said, "data": data, "md5Hash": digest, "size": str(len(data)), **stamp(server)}
    return objects[said["name"]]


def stamp(server: GoogleServer) -> dict[str, str]:
    return {"updated": datetime.now(UTC).isoformat(), "generation": str(next(server.numbers)), "metageneration": "1"}


def check(objects: dict[str, Any], name: str, query: dict[str, str], what: str) -> None:
    for condition, known in (("ifGenerationMatch", "generation"), ("ifMetagenerationMatch", "metageneration")):
        if condition in query and query[condition] != objects.get(name, {}).get(known, "0"):
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")


def allow(server: GoogleServer, what: str) -> None:
    if f"storage.objects.{what}" in server.forbidden:
        raise Refused(403, f"worker does not have storage.objects.{what} access to the Google Cloud Storage object.")


def shown(item: dict[str, Any]) -> bytes:
    return json.dumps({name: value for name, value in item.items() if name != "data"}).encode()


def answer(server: GoogleServer, method: str, url: str, headers: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
    path, query = urlsplit(url).path, dict(parse_qsl(urlsplit(url).query))
    if path.startswith("/session/"):
        bucket, said, have = server.uploads[path]
        have += body[: server.keeps]
        server.uploads[path] = (bucket, said, have)
        if len(have) < int(headers["Content-Range"].rpartition("/")[2]):
            return 308, {"Range": f"bytes=0-{len(have) - 1}"}, b""
        return 200, {}, shown(write(server, bucket, said, have))
    bucket, name, then = re.fullmatch(r"(?:/upload)?/storage/v1/b/([^/]+)/o/?([^/]*)(.*)", path).groups()  # type: ignore[union-attr]
    name = unquote(name)
    if bucket not in server.buckets:
        raise Refused(404, "The specified bucket does not exist.")
    objects = server.buckets[bucket]
    if query.get("uploadType"):
        allow(server, "create")
    if query.get("uploadType") == "resumable":
        session = f"/session/{next(server.numbers)}"
        server.uploads[session] = (bucket, json.loads(body), b"")
        return 200, {"Location": server.endpoint + session}, b""
    if query.get("uploadType") == "multipart":
        line = b"--" + headers["Content-Type"].partition("boundary=")[2].encode()
        _, said, data = (part.partition(b"\r\n\r\n")[2] for part in body.removesuffix(line + b"--").split(line))
        return 200, {}, shown(write(server, bucket, json.loads(said), data[:-2], **query))
    if not name:
        allow(server, "list")
        names = sorted(n for n in objects if n.startswith(query.get("prefix", "")) and n > query.get("pageToken", ""))
        more = {"nextPageToken": names[PAGE - 1]} if len(names) > PAGE else {}
        return 200, {}, json.dumps({"items": [json.loads(shown(objects[n])) for n in names[:PAGE]], **more}).encode()
    allow(server, {"GET": "get", "PATCH": "update", "DELETE": "delete", "POST": "get"}[method])
    if name not in objects:
        raise Refused(404, f"No such object: {bucket}/{name}")
    check(objects, name, query, method)
    item = objects[name]
    if method == "GET" and query.get("alt") == "media":
        told = {"X-Goog-Generation": item["generation"]}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", headers["Range"] or "")
        if asked is None:
            return 200, told, item["data"]
        start, stop, size = int(asked[1]), int(asked[2]) + 1, len(item["data"])
        if start >= size:
            raise Refused(416, "The requested range cannot be satisfied.")
        span = f"bytes {start}-{min(stop, size) - 1}/{size}"
        return 206, told | {"Content-Range": span}, item["data"][start:stop]
    if method == "PATCH":
        item |= {"updated": datetime.now(UTC).isoformat(), "metageneration": str(int(item["metageneration"]) + 1)}
    if method == "DELETE":
        return 204, {}, objects.pop(name) and b""
    if method == "POST":
        target = unquote(then.rpartition("/o/")[2])
        write(server, bucket, {"name": target}, item["data"])
        return 200, {}, b'{"done": true}'
    return 200, {}, shown(item)


@contextmanager
def google_server() -> Iterator[GoogleServer]:
    """A server on the loopback, for as long as the block runs."""
    server = GoogleServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # an answer goes out whole

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with server.lock:
                try:
                    status, headers, data = answer(server, self.command, self.path, self.headers, body)
                except Refused as refused:
                    status, text = refused.args
                    headers, data = {}, json.dumps({"error": {"code": status, "message": text}}).encode()
            self.send_response(status)
            for name, value in {**headers, **({} if status == 204 else {"Content-Length": str(len(data))})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_one

        def log_message(self, *_: Any) -> None:
            """Nothing on the screen."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.endpoint = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
