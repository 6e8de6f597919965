"""Google Cloud Storage's JSON API, over the connection and with the credentials that gcsfs keeps.

gcsfs's own calls are not used: they try again for half a minute, and tell no missing bucket from a missing object.
"""

from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from stages.errors import UserError
from stages.identity import Json
from stages.objects.network import (
    FIRST_ANSWER,
    PATIENCE,
    Place,
    may_not_delete,
    may_not_write,
    no_bucket,
    patiently,
    refused,
)

T = TypeVar("T")

CREDENTIALS = "GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login` or the machine's role,"

NOTHING: Mapping[str, str] = {}


class Answer(NamedTuple):
    """What the service said."""

    status: int
    headers: Mapping[str, str]
    data: bytes


class Refusal(Exception):
    """The service did not do what it was asked."""

    def __init__(self, status: int, method: str, text: str) -> None:
        super().__init__(f"{status} to {method}: {text}")
        self.status, self.method, self.text = status, method, text


@dataclass(frozen=True)
class GoogleApi:
    """What may be asked about a place. Raises UserError for what a person must mend, FileNotFoundError, and Refusal."""

    fs: Any
    place: Place
    patience: float

    def bucket(self, api: str = "/storage/v1") -> str:
        """The URL of the bucket's objects."""
        return f"{self.fs._location}{api}/b/{quote(self.place.bucket, safe='')}/o"

    def object(self, path: str) -> str:
        """The URL of one."""
        return f"{self.bucket()}/{quote(self.place.key(path), safe='')}"

    def ask(
        self,
        method: str,
        url: str,
        query: Mapping[str, str] = NOTHING,
        data: bytes | Mapping[str, Json] | None = None,
        headers: Mapping[str, str] = NOTHING,
    ) -> Answer:
        """One request, patiently; a mapping goes as JSON."""

        async def whole() -> Answer:
            async with self.request(method, url, query, data, headers) as answer:
                return Answer(answer.status, answer.headers, await answer.read())

        return self.patiently(lambda: self.wait(whole, FIRST_ANSWER if self.patience < PATIENCE else None))

    @asynccontextmanager
    async def request(
        self,
        method: str,
        url: str,
        query: Mapping[str, str] = NOTHING,
        data: bytes | Mapping[str, Json] | None = None,
        headers: Mapping[str, str] = NOTHING,
    ) -> AsyncIterator[Any]:
        """An answer whose body was not read yet. Raises Refusal."""
        session = await self.fs._set_session()
        body: dict[str, Any] = {"data": data} if data is None or isinstance(data, bytes) else {"json": data}
        how = {"headers": self.fs._get_headers(headers), "params": self.fs._get_params(query)}
        wait = self.fs.requests_timeout
        async with session.request(method, url, allow_redirects=False, timeout=wait, **how, **body) as answer:
            if answer.status >= 400:
                raise Refusal(answer.status, method, (await answer.text())[:2000])
            yield answer

    def wait(self, operation: Callable[[], Coroutine[Any, Any, T]], timeout: float | None = None) -> T:
        """Have a coroutine run on gcsfs's loop."""
        from fsspec.asyn import sync

        result: T = sync(self.fs.loop, operation, timeout=timeout)
        return result

    def patiently(self, operation: Callable[[], T]) -> T:
        """Run an operation; see `stages.objects.network.patiently`."""
        check = "the endpoint (storage_options endpoint_url or STORAGE_EMULATOR_HOST)"
        return patiently(operation, self.patience, self.place, _is_outage, self._told, check)

    def _told(self, error: Exception) -> Exception | None:
        from google.auth.exceptions import GoogleAuthError

        status, method, text = (error.status, error.method, error.text) if isinstance(error, Refusal) else (0, "", "")
        if status == 404:
            return no_bucket(self.place) if "bucket does not exist" in text else FileNotFoundError(self.place.url)
        if status == 403 and "storage.objects." in text and method != "GET":
            asked = text.partition("storage.objects.")[2].split()[0].strip(".'\",")
            return (may_not_delete if method == "DELETE" else may_not_write)(self.place, f"storage.objects.{asked}")
        if status in (401, 403) or isinstance(error, GoogleAuthError) or getattr(error, "code", None) == 401:
            code = str(status or type(error).__name__)
            return refused(self.place, code, f"{CREDENTIALS} and the rights on the bucket")
        if status and not unmet(error):
            return UserError(
                f"{self.place.url}: the server answers {status}{self.place.at}: {' '.join(text.split())[:200]}"
            )
        return None


def unmet(error: Exception) -> bool:
    """Whether a condition was not met."""
    return isinstance(error, FileNotFoundError) or (isinstance(error, Refusal) and error.status == 412)


def _is_outage(error: Exception) -> bool:
    from aiohttp import ClientConnectionError, ClientPayloadError

    if isinstance(error, Refusal):
        return error.status >= 500 or error.status in (408, 429)
    return isinstance(error, ClientConnectionError | ClientPayloadError | ConnectionError | TimeoutError)
