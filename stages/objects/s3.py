"""Objects in an S3 bucket, through s3fs: conditional PUTs of small objects, ordinary PUTs of blobs. Large ones go in
parts (`stages.objects.s3_parts`) and come in ranges (`stages.objects.ranges`). What is only looked at is asked of
obstore first (`stages.objects.s3_looks`), so that s3fs is not imported where nothing else is done.

Conditions are set on single PUTs only (conditional multipart completion is not atomic on every server) and a refused
one is recognised by its error code, because servers differ in the rest. s3fs's listing cache is off: it would show
others' objects never and deleted ones for ever.
"""

import base64
import os
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib.util import find_spec
from math import inf
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from stages.errors import UserError
from stages.objects import Entry, Versioned
from stages.objects.network import (
    FIRST_ANSWER,
    OPENING,
    PATIENCE,
    SINGLE_PUT,
    Place,
    chosen,
    conditionally,
    may_not_delete,
    may_not_write,
    no_bucket,
    patiently,
    place_of,
    refused,
    unless_gone,
)
from stages.objects.ranges import Piece, all_from, download_in_ranges
from stages.objects.s3_looks import Looks, Unclear, looks_into
from stages.objects.s3_parts import code_of, last_sent, upload_in_parts
from stages.transfers import Moved, nobody

T = TypeVar("T")

OPTIONS = ("endpoint_url", "region_name", "profile", "anon", "key", "secret", "token")
SINGLE_COPY = 5 * 2**30 - 1
"""Bytes up to which S3 copies an object in one request."""
_WRITES = ("Put", "Copy", "Create", "Upload", "Complete", "Abort")
"""How the names of operations begin that need the right to write."""
_REFUSED = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
_GARBLED = ("BadDigest", "XAmzContentSHA256Mismatch")
"""The server's codes for bytes that are not those whose digest was sent with them."""
_TRANSIENT = frozenset(
    {
        *("500", "502", "503", "504", "InternalError", "ServiceUnavailable", "SlowDown", "GatewayTimeout"),
        *("RequestTimeout", *_GARBLED),
    }
)
"""The server's codes for trouble of its own, or of the way to it, bytes that changed on it included: what is worth
another try."""


def open_s3(address: str, options: Mapping[str, str], reached: bool = False) -> "S3Objects":
    """The objects under `bucket/prefix`. Raises UserError when the bucket cannot be reached or read with these rights,
    within seconds; afterwards, or if it was `reached` before, outages are waited out for `PATIENCE` seconds."""
    place = place_of("s3", address, "AWS_ACCESS_KEY_ID, …")
    given = chosen(options, OPTIONS)
    missing = next((name for name in ("obstore", "s3fs") if find_spec(name) is None), None)
    if missing:
        raise UserError(f"store {place.url}: needs {missing}; pip install 'regrow[s3]'")
    anonymous = given.get("anon", "").lower() in ("1", "true", "yes")
    looks = looks_into(place, given, anonymous)
    endpoint = given.get("endpoint_url") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    patience, place = PATIENCE if reached else OPENING, place._replace(server=endpoint or "")
    objects = S3Objects(_client_of(given, anonymous), place, patience, looks)
    if looks is None:
        objects.client()  # what it takes to import is no outage
        objects.read("format.json")
    return replace(objects, patience=PATIENCE)


def _client_of(given: Mapping[str, str], anonymous: bool) -> Callable[[], Any]:
    """Gives the one s3fs client, which is made when it is first asked for."""
    lock = Lock()

    @cache
    def client() -> Any:
        import s3fs

        named = {name: value for name, value in given.items() if name != "region_name"}
        return s3fs.S3FileSystem(
            **named | {"anon": anonymous},
            client_kwargs={"region_name": given["region_name"]} if given.get("region_name") else {},
            config_kwargs={
                "connect_timeout": 4,
                "read_timeout": 60,
                "retries": {"mode": "standard", "max_attempts": 2},
                "max_pool_connections": 32,
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            },
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def one() -> Any:
        with lock:
            return client()

    return one


@dataclass(frozen=True)
class S3Objects:
    """See `Objects`. A version is the ETag."""

    client: Callable[[], Any]
    """Gives the s3fs client."""
    place: Place
    patience: float
    looks: Looks | None
    """What is asked first where nothing is written and little is read."""

    @property
    def fs(self) -> Any:
        """The s3fs client."""
        return self.client()

    def hasty(self) -> "S3Objects":
        return replace(self, patience=0)

    @property
    def url(self) -> str:
        return self.place.url

    def local(self, path: str) -> None:
        return None

    def read(self, path: str) -> Versioned | None:
        if self.looks:
            with suppress(Unclear):
                return self.looks.read(path)
        found = self._get(path)
        return found and found[0]

    def create(self, path: str, data: bytes) -> str | None:
        return self._conditional(path, data, IfNoneMatch="*")

    def swap(self, path: str, data: bytes, version: str) -> str | None:
        return self._conditional(path, data, IfMatch=version)

    def put(self, path: str, data: bytes) -> None:
        self._call("put_object", Key=self.place.key(path), Body=data)

    def upload(self, source: Path, path: str, sha256: str, moved: Moved = nobody) -> None:
        if source.stat().st_size <= SINGLE_PUT:
            checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
            self._call("put_object", Key=self.place.key(path), Body=source.read_bytes(), ChecksumSHA256=checksum)
            moved(source.stat().st_size)
        else:
            upload_in_parts(self._call, self.place.key(path), source, moved)

    def touch(self, entry: Entry) -> bool:
        """By a copy onto itself, which the server does without sending the bytes."""
        source = self._object(entry.path)

        def copy() -> bool:
            if entry.size <= SINGLE_COPY:
                key = self.place.key(entry.path)
                self._call("copy_object", Key=key, CopySource=source, MetadataDirective="REPLACE")
            else:
                self._patiently(lambda: self.fs.cp_file(source, source))
            return True

        return unless_gone(copy) or False

    def download(self, path: str, target: Path, moved: Moved = nobody) -> str:
        return download_in_ranges(lambda start, stop: self._range(path, start, stop), target, moved)

    def stat(self, path: str) -> Entry | None:
        if self.looks:
            with suppress(Unclear):
                return self.looks.stat(path)
        head = unless_gone(lambda: self._call("head_object", Key=self.place.key(path)))
        return None if head is None else Entry(path, head["ContentLength"], head["LastModified"].timestamp())

    def list(self, prefix: str) -> Iterator[Entry]:
        if self.looks:
            with suppress(Unclear):
                yield from self.looks.list(prefix)
                return
        more: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", Prefix=self.place.key(prefix), **more)
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):
                    yield Entry(self.place.path(item["Key"]), item["Size"], item["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, path: str, before: float = inf) -> bool:
        if before < inf:
            found = self.stat(path)
            if found is None or found.modified >= before:
                return False
        self._call("delete_object", Key=self.place.key(path))
        return True

    def move(self, path: str, target: str) -> None:
        source, goal = self._object(path), self._object(target)
        if unless_gone(lambda: self._patiently(lambda: (self.fs.cp_file(source, goal), True))):
            self.delete(path)

    def unfinished(self, before: float, remove: bool) -> int:
        page, found = self._call("list_multipart_uploads", Prefix=self.place.key("")), 0
        for one in page.get("Uploads", []):
            if one["Initiated"].timestamp() >= before:
                continue
            with suppress(FileNotFoundError):  # somebody ended it at this moment
                if last_sent(self._call, one["Key"], one["UploadId"]) < before:
                    if remove:
                        self._call("abort_multipart_upload", Key=one["Key"], UploadId=one["UploadId"])
                    found += 1
        return found

    def _object(self, path: str) -> str:
        return f"{self.place.bucket}/{self.place.key(path)}"

    def _get(self, path: str) -> tuple[Versioned, dict[str, str]] | None:
        """A small object and its metadata, or None."""

        async def whole() -> tuple[Versioned, dict[str, str]]:
            response = await self.fs._call_s3("get_object", Bucket=self.place.bucket, Key=self.place.key(path))
            async with response["Body"] as body:
                return Versioned(await body.read(), response["ETag"]), response["Metadata"]

        return unless_gone(lambda: self._run(whole))

    def _range(self, path: str, start: int, stop: int) -> Piece | None:
        from fsspec.asyn import sync

        asked = {"Bucket": self.place.bucket, "Key": self.place.key(path), "Range": f"bytes={start}-{stop - 1}"}

        async def some() -> Piece | None:
            response = await self.fs._call_s3("get_object", **asked)
            async with response["Body"] as body:
                data, told = await body.read(), response.get("ContentRange")
            return Piece(data, int(told.rpartition("/")[2])) if told else all_from(start, data)

        try:
            found: Piece | None = self._patiently(lambda: sync(self.fs.loop, some))
        except OSError as error:
            if code_of(error) not in ("InvalidRange", "416"):
                raise
            return None
        return found

    def _conditional(self, path: str, data: bytes, **condition: str) -> str | None:
        def write(writer: str) -> str:
            mark = {"writer": writer}
            made = self._call("put_object", Key=self.place.key(path), Body=data, Metadata=mark, **condition)
            return str(made["ETag"])

        def look() -> tuple[str, str | None] | None:
            found = self._get(path)
            return found and (found[0].version, found[1].get("writer"))

        return conditionally(write, _unmet, look)

    def _call(self, method: str, **arguments: Any) -> Any:
        return self._patiently(lambda: self.fs.call_s3(method, Bucket=self.place.bucket, **arguments))

    def _run(self, operation: Callable[[], Coroutine[Any, Any, T]]) -> T:
        from fsspec.asyn import sync

        timeout = FIRST_ANSWER if self.patience < PATIENCE else None
        result: T = self._patiently(lambda: sync(self.fs.loop, operation, timeout=timeout))
        return result

    def _patiently(self, operation: Callable[[], T]) -> T:
        check = "the endpoint (storage_options endpoint_url or AWS_ENDPOINT_URL)"
        try:
            return patiently(operation, self.patience, self.place, _is_outage, self._told, check)
        except UserError as error:
            if (code := code_of(error)) not in _GARBLED:
                raise
            raise UserError(
                f"{self.url}: the server got other bytes than were hashed here, each time ({code}){self.place.at}: the "
                "file changed meanwhile, or something on the way, a disk or memory garbles it; run it again, and if "
                "that does not help, on another machine or network"
            ) from error

    def _told(self, error: Exception) -> UserError | None:
        from botocore.exceptions import BotoCoreError

        code = code_of(error)
        if code == "NoSuchBucket":
            return no_bucket(self.place)
        if code == "RequestTimeTooSkewed":
            return UserError(
                f"{self.url}: the server refuses this machine because its clock is wrong ({code}){self.place.at}: it "
                f"says {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; set it right"
            )
        asked = str(getattr(error.__cause__ or error, "operation_name", ""))
        if code == "AccessDenied" and asked.startswith("Delete"):
            return may_not_delete(self.place, asked)
        if code == "AccessDenied" and asked.startswith(_WRITES):
            return may_not_write(self.place, asked)
        if isinstance(error, PermissionError) or code in ("AccessDenied", "InvalidToken", "ExpiredToken"):
            check = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE and the rights on the bucket"
            return refused(self.place, code or "AccessDenied", check)
        if isinstance(error, BotoCoreError) and "redential" in type(error).__name__ + str(error):
            return UserError(
                f"{self.url}: no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_PROFILE"
            )
        if isinstance(error, BotoCoreError) or (isinstance(error, ValueError) and "endpoint" in str(error)):
            return UserError(f"{self.url}: {error}")
        if code in ("InvalidBucketName", "PermanentRedirect", "AuthorizationHeaderMalformed"):
            at = self.place.at
            return UserError(f"{self.url}: the server answers {code}{at}; check the bucket's name and region")
        return None


def _unmet(error: Exception) -> bool:
    """Whether a condition was not met."""
    return isinstance(error, FileExistsError | FileNotFoundError) or code_of(error) in _REFUSED


def _is_outage(error: Exception) -> bool:
    from aiohttp import ClientConnectionError, ClientPayloadError
    from botocore.exceptions import ConnectionError as BotoConnectionError
    from botocore.exceptions import HTTPClientError, SSLError

    if isinstance(error, SSLError):
        return False
    cut = (ClientConnectionError, ClientPayloadError)  # while an answer's body was read: botocore does not see these
    outages = (BotoConnectionError, HTTPClientError, ConnectionError, TimeoutError, *cut)
    return isinstance(error, outages) or code_of(error) in _TRANSIENT
