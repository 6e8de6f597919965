"""Objects in a container of Azure Blob Storage (`az://container/prefix`): adlfs finds account and credentials, Azure's
own client does the rest.

Single PUTs carry their condition (If-None-Match, If-Match) and an MD5 that the service checks, and so do the blocks of
what is larger. Blocks of a broken upload are dropped by the service after a week; nobody else sees them.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from time import sleep
from typing import Any, TypeVar

from stages.errors import UserError
from stages.objects import Entry, Versioned
from stages.objects.network import (
    FIRST_ANSWER,
    OPENING,
    PATIENCE,
    Place,
    chosen,
    conditionally,
    may_not_delete,
    may_not_write,
    no_bucket,
    patiently,
    place_of,
    refused,
    taken_back,
    unless_gone,
)
from stages.objects.ranges import Piece, download_in_ranges
from stages.transfers import Moved, nobody

T = TypeVar("T")

OPTIONS = (
    *("account_name", "account_key", "sas_token", "connection_string", "anon"),
    *("tenant_id", "client_id", "client_secret", "account_host"),
)
CREDENTIALS = (
    "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, "
    "AZURE_STORAGE_CONNECTION_STRING, or a role of the machine"
)
ONCE = {"retry_total": 0, "connection_timeout": 4, "read_timeout": 60}
"""The client's own retries wait 15 s and more; ours do better."""
AT_ONCE = 4
"""Blocks of one file that are on their way together."""


def open_azure(address: str, options: Mapping[str, str], reached: bool = False) -> "AzureObjects":
    """The objects under `container/prefix`. Raises UserError when the container cannot be reached or read with these
    rights, within seconds; afterwards, or if it was `reached` before, outages are waited out for `PATIENCE` seconds."""
    place = place_of("az", address, "AZURE_STORAGE_ACCOUNT_KEY, …")
    given: dict[str, Any] = chosen(options, OPTIONS)
    try:
        import adlfs
    except ImportError as error:
        raise UserError(f"store {place.url}: needs adlfs; pip install 'regrow[azure]'") from error
    if "anon" in given:
        given["anon"] = given["anon"].lower() in ("1", "true", "yes")
    try:
        fs = adlfs.AzureBlobFileSystem(**given, use_listings_cache=False, skip_instance_cache=True)
    except ValueError as error:  # no account, or a connection string that is none; it may hold the secret
        raise UserError(f"{place.url}: no account and credentials were found; set {CREDENTIALS}") from error
    server = fs.service_client.url.partition("?")[0].rstrip("/")
    objects = AzureObjects(fs, place._replace(server=server), PATIENCE if reached else OPENING)
    objects.read("format.json")
    return replace(objects, patience=PATIENCE)


@dataclass(frozen=True)
class AzureObjects:
    """See `Objects`. A version is the ETag."""

    fs: Any
    place: Place
    patience: float

    def hasty(self) -> "AzureObjects":
        return replace(self, patience=0)

    @property
    def url(self) -> str:
        return self.place.url

    def local(self, path: str) -> None:
        return None

    def read(self, path: str) -> Versioned | None:
        found = self._get(path)
        return found and found[0]

    def create(self, path: str, data: bytes) -> str | None:
        return self._conditional(path, data, overwrite=False)

    def swap(self, path: str, data: bytes, version: str) -> str | None:
        return self._conditional(path, data, overwrite=True, **_if_still(version))

    def put(self, path: str, data: bytes) -> None:
        self._run(lambda: self._blob(path).upload_blob(data, overwrite=True, validate_content=True, **ONCE))

    def upload(self, source: Path, path: str, sha256: str, moved: Moved = nobody) -> None:
        def attempt(heard: Moved) -> None:
            with source.open("rb") as file:
                how = {"overwrite": True, "validate_content": True, "max_concurrency": AT_ONCE}
                self._wait(lambda: self._blob(path).upload_blob(file, progress_hook=_hook(heard), **how, **ONCE))

        self._patiently(lambda: taken_back(attempt, moved))

    def touch(self, entry: Entry) -> bool:
        """By metadata, which the service writes without the bytes."""
        blob = self._blob(entry.path)
        return unless_gone(lambda: self._run(lambda: blob.set_blob_metadata({}, **ONCE))) is not None

    def download(self, path: str, target: Path, moved: Moved = nobody) -> str:
        return download_in_ranges(lambda start, stop: self._range(path, start, stop), target, moved)

    def stat(self, path: str) -> Entry | None:
        found = self._properties(path)
        return None if found is None else Entry(path, found.size, found.last_modified.timestamp())

    def list(self, prefix: str) -> Iterator[Entry]:
        container = self.fs.service_client.get_container_client(self.place.bucket)

        async def page(token: str | None) -> tuple[list[Any], str | None]:
            how = {"name_starts_with": self.place.key(prefix), "include": ["metadata"]}
            pages = container.list_blobs(**how, **ONCE).by_page(token)
            found = [blob async for blob in await anext(pages)]
            return found, pages.continuation_token

        token: str | None = None
        while True:
            blobs, token = self._run(partial(page, token))
            for blob in blobs:
                if not (blob.metadata or {}).get("hdi_isfolder"):  # folders, where the account has real ones
                    yield Entry(self.place.path(blob.name), blob.size, blob.last_modified.timestamp())
            if not token:
                return

    def delete(self, path: str, before: float = inf) -> bool:
        condition: dict[str, Any] = {}
        if before < inf:
            found = self._properties(path)
            if found is None or found.last_modified.timestamp() >= before:
                return False
            condition = _if_still(found.etag)
        try:
            self._run(lambda: self._blob(path).delete_blob(**condition, **ONCE))
        except Exception as error:
            if not _unmet(error):
                raise
            return False
        return True

    def move(self, path: str, target: str) -> None:
        def copy() -> bool:
            goal = self._blob(target)
            self._run(lambda: goal.start_copy_from_url(self._blob(path).url, **ONCE))
            while (found := self._properties(target)) and found.copy.status == "pending":
                sleep(0.2)
            return True

        if unless_gone(copy):
            self.delete(path)

    def unfinished(self, before: float, remove: bool) -> int:
        """None that could be removed: see above."""
        return 0

    def _blob(self, path: str) -> Any:
        return self.fs.service_client.get_blob_client(self.place.bucket, self.place.key(path))

    def _properties(self, path: str) -> Any:
        return unless_gone(lambda: self._run(lambda: self._blob(path).get_blob_properties(**ONCE)))

    def _get(self, path: str) -> tuple[Versioned, str | None] | None:
        """A small object and its writer's mark, or None."""

        async def whole() -> tuple[Versioned, str | None]:
            stream = await self._blob(path).download_blob(**ONCE)
            found = stream.properties
            return Versioned(await stream.readall(), found.etag), found.metadata.get("writer")

        return unless_gone(lambda: self._run(whole))

    def _range(self, path: str, start: int, stop: int) -> Piece | None:
        async def some() -> Piece | None:
            try:
                stream = await self._blob(path).download_blob(offset=start, length=stop - start, **ONCE)
                data = await stream.readall()
            except Exception as error:
                if _code(error) != "InvalidRange":
                    raise
                return None
            return Piece(data, int(stream.properties.content_range.rpartition("/")[2])) if data else None

        return self._patiently(lambda: self._wait(some))

    def _conditional(self, path: str, data: bytes, **condition: Any) -> str | None:
        def write(writer: str) -> str:
            how = {"metadata": {"writer": writer}, "validate_content": True, **condition, **ONCE}
            return str(self._run(lambda: self._blob(path).upload_blob(data, **how))["etag"])

        def look() -> tuple[str, str | None] | None:
            found = self._get(path)
            return found and (found[0].version, found[1])

        return conditionally(write, _unmet, look)

    def _run(self, operation: Callable[[], Awaitable[T]]) -> T:
        return self._patiently(lambda: self._wait(operation, FIRST_ANSWER if self.patience < PATIENCE else None))

    def _wait(self, operation: Callable[[], Awaitable[T]], timeout: float | None = None) -> T:
        from fsspec.asyn import sync

        result: T = sync(self.fs.loop, operation, timeout=timeout)
        return result

    def _patiently(self, operation: Callable[[], T]) -> T:
        check = "the account's name (storage_options account_name or AZURE_STORAGE_ACCOUNT_NAME)"
        return patiently(operation, self.patience, self.place, _is_outage, self._told, check)

    def _told(self, error: Exception) -> Exception | None:
        from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError

        code, status = _code(error), getattr(error, "status_code", None)
        if code == "ContainerNotFound":
            return no_bucket(self.place, "container")
        if status == 404:
            return FileNotFoundError(self.url)
        if status == 403 and code.startswith("AuthorizationPermission"):
            method = error.response.request.method  # type: ignore[attr-defined]
            if method in ("DELETE", "PUT"):
                return (may_not_delete if method == "DELETE" else may_not_write)(self.place, code)
        if status in (401, 403) or isinstance(error, ClientAuthenticationError) or "Signing" in type(error).__name__:
            return refused(self.place, code or type(error).__name__, f"{CREDENTIALS}, and the rights on the container")
        if _unmet(error) or not isinstance(error, AzureError):
            return None
        what = f"answers {code or status}" if isinstance(error, HttpResponseError) else type(error).__name__
        return UserError(f"{self.url}: the service {what}{self.place.at}; check the container's name and the account")


def _if_still(version: str) -> dict[str, Any]:
    from azure.core import MatchConditions

    return {"etag": version, "match_condition": MatchConditions.IfNotModified}


def _hook(heard: Moved) -> Callable[[int, int | None], Awaitable[None]]:
    """The client tells how much is there by now; `heard` wants how much came."""
    before = 0

    async def hook(now: int, _: int | None) -> None:
        nonlocal before
        more, before = now - before, now
        heard(more)

    return hook


def _code(error: Exception) -> str:
    """The service's own error code."""
    code = getattr(error, "error_code", None) or ""
    return str(getattr(code, "value", code))


def _unmet(error: Exception) -> bool:
    """Whether a condition was not met."""
    unmet = getattr(error, "status_code", None) == 412 or _code(error) in ("BlobAlreadyExists", "BlobOverwritten")
    return unmet or isinstance(error, FileNotFoundError)


def _is_outage(error: Exception) -> bool:
    from aiohttp import ClientError
    from azure.core.exceptions import IncompleteReadError, ServiceRequestError, ServiceResponseError

    status = getattr(error, "status_code", None) or 0
    if status >= 500 or status in (408, 429) or _code(error) == "Md5Mismatch":
        return True
    if isinstance(error.__cause__, IncompleteReadError):  # an answer cut three times: then the client says no more
        return True
    cut = (ServiceRequestError, ServiceResponseError, IncompleteReadError, ClientError)
    return isinstance(error, (*cut, ConnectionError, TimeoutError))
