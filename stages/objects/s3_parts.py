"""Large uploads to S3, part by part, going on where an earlier one broke off.

The server keeps the parts of an upload that nobody ended, and tells each one's ETag, which is the MD5 of its bytes.
Parts that are the same here are not sent again. Where ETags are something else (SSE-KMS), or the key may not list
uploads, all is sent.

An upload to which somebody sent something within `QUIET` seconds is theirs: who sends the same file meanwhile begins
one of their own. Should two share one after all (over a slow line a part takes longer than that), the first to end it
gives the object, and the other finds it there. What nobody goes on with is swept by gc.
"""

import base64
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from functools import partial
from hashlib import md5
from pathlib import Path
from typing import Any, NamedTuple

from stages.objects.network import SINGLE_PUT, taken_back, unless_gone
from stages.transfers import Moved

QUIET = 60.0
"""Seconds without a new part after which an upload counts as broken off."""
AT_ONCE = 4
"""Parts of one file that are on their way together."""
MOST_PARTS = 10_000
"""Parts that S3 takes for one object."""
TRIES = 3

Call = Callable[..., Any]
"""`call(operation, **arguments)` asks the server about the bucket, patiently."""


class Part(NamedTuple):
    """A stretch of a file, in bytes. Numbers begin with 1."""

    number: int
    start: int
    size: int

    def read(self, file: int) -> bytes:
        """Its bytes."""
        return os.pread(file, self.size, self.start)


class _Upload(NamedTuple):
    """An upload that was not ended: its id, and by number the ETags of the parts that are there."""

    id: str
    there: dict[int, str]


def parts_of(size: int) -> list[Part]:
    """How a file of `size` bytes is cut, which depends on nothing else: `SINGLE_PUT` bytes a part, or whole MiB more
    where that would be too many parts."""
    step = max(SINGLE_PUT, -(-size // MOST_PARTS // 2**20) * 2**20)
    return [Part(number, start, min(step, size - start)) for number, start in enumerate(range(0, size, step), 1)]


def upload_in_parts(call: Call, key: str, source: Path, moved: Moved) -> None:
    """Write a local file's bytes to a key. Raises what `call` raises; what was sent by then is not sent again by who
    tries anew."""
    with source.open("rb") as opened:
        file, size = opened.fileno(), source.stat().st_size
        parts, stood, failure = parts_of(size), _standing(call, key), None
        upload = _broken_off(call, key, file, parts)
        for _ in range(TRIES):
            upload = upload or _Upload(call("create_multipart_upload", Key=key)["UploadId"], {})
            try:
                return taken_back(partial(_send, call, key, file, parts, upload), moved)
            except OSError as error:
                if code_of(error) not in ("NoSuchUpload", "InvalidPart"):
                    raise
                failure = error
            # Somebody ended it: with the same file, or swept it. Or we did, and the answer was lost.
            stands = _standing(call, key)
            if stands is not None and stands != stood and stands[0] == size:
                return moved(size)
            upload = None
        assert failure is not None
        raise failure


def _send(call: Call, key: str, file: int, parts: list[Part], upload: _Upload, moved: Moved) -> None:
    """Send the parts that are not there, each with its MD5, which the server checks; then end the upload."""

    def send(part: Part) -> str:
        if part.number in upload.there:
            tag = upload.there[part.number]
        else:
            body = part.read(file)
            digest = base64.b64encode(md5(body, usedforsecurity=False).digest()).decode()
            how = {"UploadId": upload.id, "PartNumber": part.number, "ContentMD5": digest}
            tag = str(call("upload_part", Key=key, Body=body, **how)["ETag"])
        moved(part.size)
        return tag

    with ThreadPoolExecutor(AT_ONCE) as pool:
        tags = list(pool.map(send, parts))
    listed = [{"PartNumber": part.number, "ETag": tag} for part, tag in zip(parts, tags, strict=True)]
    call("complete_multipart_upload", Key=key, UploadId=upload.id, MultipartUpload={"Parts": listed})


def _broken_off(call: Call, key: str, file: int, parts: list[Part]) -> _Upload | None:
    """Of the uploads to a key that broke off, the one of which most is there; None if there is nothing to go on with,
    or the server does not say."""
    try:
        listed = call("list_multipart_uploads", Prefix=key).get("Uploads", [])
        uploads = [_look(call, key, one["UploadId"], file, parts) for one in listed if one["Key"] == key]
    except Exception as error:  # an OSError, or a UserError that says which right is missing
        if not code_of(error):
            raise
        return None
    best = max(uploads, key=lambda upload: len(upload.there), default=None)
    return best if best is not None and best.there else None


def last_sent(call: Call, key: str, id: str) -> float:
    """When the newest part of an upload came (seconds since the epoch); 0 where there is none."""
    return _newest(_listed(call, key, id)[0])


def _listed(call: Call, key: str, id: str) -> tuple[list[dict[str, Any]], Any]:
    """The parts of an upload, as the server tells them, and its last answer."""
    found: list[dict[str, Any]] = []
    marker, truncated = 0, True
    while truncated:
        page = call("list_parts", Key=key, UploadId=id, PartNumberMarker=marker)
        found += page.get("Parts", [])
        before, marker = marker, int(page.get("NextPartNumberMarker") or 0)
        truncated = page.get("IsTruncated", False) and marker > before
    return found, page


def _newest(found: list[dict[str, Any]]) -> float:
    return max((float(one["LastModified"].timestamp()) for one in found), default=0.0)


def _look(call: Call, key: str, id: str, file: int, parts: list[Part]) -> _Upload:
    """What an upload has of a file; nothing, if somebody is at it."""
    found, page = _listed(call, key, id)
    if _time(page) - _newest(found) < QUIET:
        return _Upload(id, {})
    cut = {part.number: part for part in parts}

    def same(one: dict[str, Any]) -> bool:
        part = cut.get(one["PartNumber"])
        if part is None or part.size != one["Size"]:
            return False
        return md5(part.read(file), usedforsecurity=False).hexdigest() == str(one["ETag"]).strip('"')

    with ThreadPoolExecutor(AT_ONCE) as pool:
        whole = list(pool.map(same, found))
    return _Upload(id, {one["PartNumber"]: one["ETag"] for one, good in zip(found, whole, strict=True) if good})


def _standing(call: Call, key: str) -> tuple[int, str, Any] | None:
    """Size, ETag and time of the object at a key, or None."""
    head = unless_gone(lambda: call("head_object", Key=key))
    return None if head is None else (head["ContentLength"], head["ETag"], head["LastModified"])


def _time(answer: Any) -> float:
    """What time it was for the server, which dated the parts."""
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    return parsedate_to_datetime(date).timestamp() if date else time.time()


def code_of(error: BaseException | None) -> str:
    """The server's own error code behind an error, whoever wrapped it; empty if the server said none."""
    while error is not None:
        if isinstance(response := getattr(error, "response", None), dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""
