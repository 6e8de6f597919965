"""One file behind http(s): looked at by its headers, and read from any position that the server can begin at.

A version is the ETag, else the time of the last change. A read that was cut goes on with `Range` and `If-Range`; what
the server then says must still be the version that was found.
"""

import email.utils
import hashlib
import http.client
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from stages.errors import UserError
from stages.identity import Json
from stages.sources import credentials
from stages.sources.remote import CHUNK, OpenAt, Passing, tries

TIMEOUT = 60.0
"""Seconds of silence after which a connection counts as dead."""
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Answers that may be others soon."""


def name_of(url: str) -> str:
    """The file's name in a URL."""
    return unquote(urlsplit(url).path.rpartition("/")[2])


def look(url: str, options: Mapping[str, Json], pinned: bool, place: str) -> dict[str, Json]:
    """Size (None where the server does not say) and version of the file now, as identity. `pinned`: its sha256 is
    known, so the version does not matter.

    Raises UserError when it is not there, may not be read, has no version to tell one content from another, or comes
    so that nobody can tell whether all of it came.
    """
    headers = _headers(options, place)
    for wait in tries():
        try:
            answer = _ask(url, {**headers, "Range": "bytes=0-0"}, place)
        except Passing as error:
            wait(error, f"{place}: cannot read {url}")
            continue
        with answer:
            size = _total(answer)
            if pinned:
                return {"size": size}
            if size is None and not answer.chunked:  # it ends where the connection does, however that ends
                raise UserError(
                    f"{place}: {url} comes without a length, so a part would be taken for the whole: give its `sha256`"
                )
            return {"size": size, **_version(answer, url, place)}
    raise AssertionError


def opener(url: str, options: Mapping[str, Json], found: Mapping[str, Json]) -> OpenAt:
    """`open_at` for the file that was found."""
    headers = _headers(options, url)

    def open_at(position: int) -> "_Answer":
        rest = {**headers, "Range": f"bytes={position}-"} if position else headers
        if position and (strong := _strong(found)):
            rest = {**rest, "If-Range": strong}
        # Some caches give another part than was asked for, but the whole to who asks for it.
        for ask in (rest, headers):
            answer = _ask(url, ask, url)
            _same(answer, found, url)
            begin = _begin(answer)
            if begin is not None and begin <= position:
                opened = _Answer(answer)
                opened.skip(position - begin)  # of a server that always begins at the beginning
                return opened
            answer.close()
        raise Passing(f"the server gives another part than the one from byte {position} on")

    return open_at


class _Answer:
    """An answer's body."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def read(self, size: int) -> bytes:
        # What has arrived, not as much as was asked for: nothing of it is lost when the connection breaks.
        with _passing():
            data: bytes = self.answer.read1(size)
        return data

    def skip(self, size: int) -> None:
        while size:
            data = self.read(min(size, CHUNK))
            if not data:
                raise Passing("the connection ended early")
            size -= len(data)

    def close(self) -> None:
        self.answer.close()


def _headers(options: Mapping[str, Json], place: str) -> dict[str, str]:
    if unknown := sorted(set(options) - {"headers"}):
        raise UserError(f"{place}: storage_options of a web address has `headers` only, not {unknown[0]}")
    return {name: str(value) for name, value in credentials.opened(options, place).get("headers", {}).items()}


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Another host gets none of the recipe's headers, and nobody leads from https to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if old.scheme == "https" and new.scheme != "https":
            raise urllib.error.HTTPError(req.full_url, code, f"leads to {new.scheme}, which is not safe", headers, fp)
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and (old.scheme, old.netloc) != (new.scheme, new.netloc):
            kept = ("Range", "If-range", "Accept-encoding", "User-agent")
            following.headers = {name: value for name, value in following.headers.items() if name in kept}
        return following


def _ask(url: str, headers: Mapping[str, str], place: str) -> Any:
    """The answer to a GET. Raises Passing for what may mend itself, and UserError for what does not."""
    opener = urllib.request.build_opener(_Redirects)
    asked = {"User-Agent": "regrow", "Accept-Encoding": "identity", **headers}
    request = urllib.request.Request(quote(url, safe="%/:=&?~#+!$,;'@()*[]"), headers=asked)
    try:
        with _passing():
            return opener.open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and str(error.headers.get("Content-Range")) == "bytes */0":
            raise UserError(f"{place}: {url} is empty") from error
        if error.code in PASSING:
            raise Passing(f"the server says {error.code} {error.reason}", _retry_after(error.headers)) from error
        hint = {
            401: ": name credentials in storage_options, e.g. `headers: {Authorization: env:NAME}`",
            403: ": check the address, and the credentials in storage_options",
            404: ": there is no such file",
        }.get(error.code, "")
        raise UserError(f"{place}: cannot read {url}: the server says {error.code} {error.reason}{hint}") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, socket.gaierror):
            host = urlsplit(url).hostname
            raise UserError(f"{place}: cannot read {url}: the host {host} is not known ({error.reason})") from error
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise UserError(f"{place}: cannot read {url}: {error.reason}") from error
        raise Passing(f"no connection: {error.reason}") from error


@contextmanager
def _passing() -> Iterator[None]:
    """Turn a broken connection into Passing."""
    try:
        yield
    except urllib.error.URLError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise Passing(f"the connection broke: {error or type(error).__name__}") from error


def _begin(answer: Any) -> int | None:
    """Where in the file the body begins; None where a part does not say."""
    if answer.status != 206:
        return 0
    told = re.match(r"bytes (\d+)-", str(answer.headers.get("Content-Range", "")))
    return int(told[1]) if told else None


def _total(answer: Any) -> int | None:
    """The whole file's size, from `Content-Range: bytes 0-0/12345` or `Content-Length`."""
    if answer.status == 206:
        size = str(answer.headers.get("Content-Range", "")).rpartition("/")[2]
    else:
        size = str(answer.headers.get("Content-Length", ""))
    return int(size) if size.isdigit() else None


def _version(answer: Any, url: str, place: str) -> dict[str, Json]:
    tag, modified = answer.headers.get("ETag"), answer.headers.get("Last-Modified")
    if not tag and not modified:
        raise UserError(
            f"{place}: {url} has neither ETag nor Last-Modified, so a change would not be noticed: give its `sha256`"
        )
    # Such a version only means something at its own address.
    at = hashlib.sha256(url.encode()).hexdigest()
    return {"etag": tag, "at": at} if tag else {"modified": modified, "at": at}


def _strong(found: Mapping[str, Json]) -> str | None:
    """What `If-Range` takes: a strong tag, or the time of the last change."""
    tag = found.get("etag")
    return found.get("modified") if tag is None else None if tag.startswith("W/") else str(tag)


def _same(answer: Any, found: Mapping[str, Json], url: str) -> None:
    """Raises UserError when this is not the version that was found."""
    size = _total(answer)
    headers = {"etag": "ETag", "modified": "Last-Modified"}
    if any(name in found and answer.headers.get(header) != found[name] for name, header in headers.items()) or (
        found["size"] is not None and size is not None and size != found["size"]
    ):
        raise UserError(f"{url} changed while the run was going on: run again")


def _retry_after(headers: Any) -> float:
    told = str(headers.get("Retry-After") or "")
    if told.isdigit():
        return float(told)
    date = email.utils.parsedate_tz(told) if told else None
    return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else 0.0
