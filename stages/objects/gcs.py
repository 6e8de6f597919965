"""Objects in a bucket of Google Cloud Storage (`gs://bucket/prefix`).

Small objects go up in one request with their condition (ifGenerationMatch) and their MD5, which the service checks;
larger ones by a resumable upload, a part at a time, whose MD5 it checks at the end.
"""

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from math import inf
from pathlib import Path
from typing import Any
from uuid import uuid4

from stages.errors import UserError
from stages.identity import Json
from stages.objects import Entry, Versioned
from stages.objects.google_api import NOTHING, GoogleApi, Refusal, unmet
from stages.objects.network import (
    OPENING,
    PATIENCE,
    SINGLE_PUT,
    chosen,
    conditionally,
    place_of,
    taken_back,
    unless_gone,
)
from stages.objects.ranges import Piece, all_from, download_in_ranges
from stages.sources.urls import PLAIN_GCSFS
from stages.transfers import Moved, nobody

OPTIONS = ("project", "token", "endpoint_url", "requester_pays")
UPLOADS = "/upload/storage/v1"
MEDIA = {"alt": "media"}
LOOKED_AT = "name,size,updated,generation,metageneration"


def open_gcs(address: str, options: Mapping[str, str], reached: bool = False) -> "GoogleObjects":
    """The objects under `bucket/prefix`. Raises UserError when the bucket cannot be reached or read with these rights,
    within seconds; afterwards, or if it was `reached` before, outages are waited out for `PATIENCE` seconds."""
    place = place_of("gs", address, "GOOGLE_APPLICATION_CREDENTIALS, …")
    given: dict[str, Any] = chosen(options, OPTIONS)
    os.environ.setdefault(*PLAIN_GCSFS)
    try:
        from aiohttp import ClientTimeout
        from gcsfs.core import GCSFileSystem
    except ImportError as error:
        raise UserError(f"store {place.url}: needs gcsfs; pip install 'regrow[gcs]'") from error
    timeout = ClientTimeout(total=None, sock_connect=4, sock_read=60)
    how = {"requests_timeout": timeout, "use_listings_cache": False, "skip_instance_cache": True}
    fs = GCSFileSystem(**given, access="read_write", **how)
    server = given.get("endpoint_url") or os.environ.get("STORAGE_EMULATOR_HOST", "")
    api = GoogleApi(fs, place._replace(server=server), PATIENCE if reached else OPENING)
    GoogleObjects(api).read("format.json")
    return GoogleObjects(replace(api, patience=PATIENCE))


@dataclass(frozen=True)
class GoogleObjects:
    """See `Objects`. A version is the generation."""

    api: GoogleApi

    def hasty(self) -> "GoogleObjects":
        return GoogleObjects(replace(self.api, patience=0))

    @property
    def fs(self) -> Any:
        """gcsfs's file system, for who delivers there."""
        return self.api.fs

    @property
    def url(self) -> str:
        return self.api.place.url

    def local(self, path: str) -> None:
        return None

    def read(self, path: str) -> Versioned | None:
        found = unless_gone(lambda: self.api.ask("GET", self.api.object(path), MEDIA))
        return None if found is None else Versioned(found.data, found.headers.get("X-Goog-Generation", ""))

    def create(self, path: str, data: bytes) -> str | None:
        return self._conditional(path, data, "0")

    def swap(self, path: str, data: bytes, version: str) -> str | None:
        return self._conditional(path, data, version) if version.isdigit() else None

    def put(self, path: str, data: bytes) -> None:
        self._write(path, data)

    def upload(self, source: Path, path: str, sha256: str, moved: Moved = nobody) -> None:
        size = source.stat().st_size
        if size <= SINGLE_PUT:
            self._write(path, source.read_bytes())
            moved(size)
        else:
            taken_back(lambda heard: self._write_in_parts(source, size, path, heard), moved)

    def touch(self, entry: Entry) -> bool:
        """By metadata, which the service writes without the bytes."""
        changed = {"metadata": {"touched": uuid4().hex}}
        return unless_gone(lambda: self.api.ask("PATCH", self.api.object(entry.path), data=changed)) is not None

    def download(self, path: str, target: Path, moved: Moved = nobody) -> str:
        return download_in_ranges(lambda start, stop: self._range(path, start, stop), target, moved)

    def stat(self, path: str) -> Entry | None:
        found = self._look(path)
        return self._entry(found) if found else None

    def list(self, prefix: str) -> Iterator[Entry]:
        query = {"prefix": self.api.place.key(prefix), "fields": f"items({LOOKED_AT}),nextPageToken"}
        while True:
            page = json.loads(self.api.ask("GET", self.api.bucket(), query).data)
            for item in page.get("items", []):
                if not item["name"].endswith("/"):
                    yield self._entry(item)
            if "nextPageToken" not in page:
                return
            query["pageToken"] = page["nextPageToken"]

    def delete(self, path: str, before: float = inf) -> bool:
        condition: dict[str, str] = {}
        if before < inf:
            found = self._look(path)
            if found is None or self._entry(found).modified >= before:
                return False
            condition = {"ifGenerationMatch": found["generation"], "ifMetagenerationMatch": found["metageneration"]}
        try:
            self.api.ask("DELETE", self.api.object(path), condition)
        except (Refusal, FileNotFoundError) as error:
            if not unmet(error):
                raise
            return False
        return True

    def move(self, path: str, target: str) -> None:
        to = f"{self.api.object(path)}/rewriteTo/b/{self.api.object(target).partition('/b/')[2]}"
        query: dict[str, str] = {}
        while (found := unless_gone(lambda: self.api.ask("POST", to, query))) is not None:
            told = json.loads(found.data)
            if told["done"]:
                self.delete(path)
                return
            query["rewriteToken"] = told["rewriteToken"]

    def unfinished(self, before: float, remove: bool) -> int:
        """None that could be removed: the service drops resumable uploads after a week, and lists them to nobody."""
        return 0

    def _range(self, path: str, start: int, stop: int) -> Piece | None:
        async def some() -> Piece | None:
            span = {"Range": f"bytes={start}-{stop - 1}"}
            try:
                async with self.api.request("GET", self.api.object(path), MEDIA, headers=span) as answer:
                    data, told = await answer.read(), answer.headers.get("Content-Range")
                    return Piece(data, int(told.rpartition("/")[2])) if told else all_from(start, data)
            except Refusal as refusal:
                if refusal.status != 416:
                    raise
                return None

        return self.api.patiently(lambda: self.api.wait(some))

    def _entry(self, item: Mapping[str, str]) -> Entry:
        modified = datetime.fromisoformat(item["updated"]).timestamp()
        return Entry(self.api.place.path(item["name"]), int(item["size"]), modified)

    def _look(self, path: str) -> dict[str, Any] | None:
        """What the service says of an object, or None."""
        fields = f"{LOOKED_AT},metadata"
        found = unless_gone(lambda: self.api.ask("GET", self.api.object(path), {"fields": fields}))
        return None if found is None else json.loads(found.data)

    def _conditional(self, path: str, data: bytes, generation: str) -> str | None:
        def write(writer: str) -> str:
            return self._write(path, data, {"metadata": {"writer": writer}}, {"ifGenerationMatch": generation})

        def look() -> tuple[str, str | None] | None:
            found = self._look(path)
            return (found["generation"], found.get("metadata", {}).get("writer")) if found else None

        return conditionally(write, unmet, look)

    def _write(
        self, path: str, data: bytes, said: Mapping[str, Json] = NOTHING, condition: Mapping[str, str] = NOTHING
    ) -> str:
        """One request for an object's description and bytes; its generation."""
        digest = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        description = json.dumps({"name": self.api.place.key(path), "md5Hash": digest, **said})
        line = uuid4().hex
        json_part = f"--{line}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{description}\r\n"
        body = f"{json_part}--{line}\r\nContent-Type: application/octet-stream\r\n\r\n".encode()
        body += data + f"\r\n--{line}--".encode()
        kind = {"Content-Type": f"multipart/related; boundary={line}"}
        query = {"uploadType": "multipart", **condition}
        answer = self.api.ask("POST", self.api.bucket(UPLOADS), query, body, kind)
        return str(json.loads(answer.data)["generation"])

    def _write_in_parts(self, source: Path, size: int, path: str, heard: Moved) -> None:
        with source.open("rb") as file:
            digest = base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()
            description = {"name": self.api.place.key(path), "md5Hash": digest}
            begun = self.api.ask("POST", self.api.bucket(UPLOADS), {"uploadType": "resumable"}, description)
            at = 0
            while at < size:
                file.seek(at)
                part = file.read(SINGLE_PUT)
                span = {"Content-Range": f"bytes {at}-{at + len(part) - 1}/{size}"}
                answer = self.api.ask("PUT", begun.headers["Location"], NOTHING, part, span)
                # Not all of a part may have been kept: 308 says how far it came.
                kept = answer.headers.get("Range", "").rpartition("-")[2] or "-1"
                there = int(kept) + 1 if answer.status == 308 else size
                heard(there - at)
                at = there
