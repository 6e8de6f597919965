"""Quick looks into an S3 bucket, through obstore: `regrow plan` only looks, and importing s3fs takes it half a second.

A look gives what the server said, or raises `Unclear` for whatever else happened; then s3fs is asked the same, which
knows outages, other regions and the names of errors. So nothing rests on a look but time.
"""

import os
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.objects import Entry, Versioned
from stages.objects.network import Place

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Credential, S3Store

CLIENT: "ClientConfig" = {"allow_http": True, "connect_timeout": "2s", "read_timeout": "3s", "timeout": "60s"}
"""How little patience looks have: s3fs has more."""
MANY = 10_000
"""Objects beyond which a list is left to s3fs, which gives it page by page."""
_PROCESS = os.getpid()
"""Where obstore works: in a process that was forked later it would wait for threads that are not there."""
_ENDPOINT = re.compile(r"https?://[\w.-]+(:\d+)?/?")
_OF_S3FS = ("ignore_configured_endpoint_urls", "s3", "services", "use_dualstack_endpoint", "use_fips_endpoint")
"""Settings that botocore obeys and obstore does not, by their names in the configuration file."""
_FRESH = timedelta(minutes=10)
"""How long credentials that may change are used before botocore is asked for them again."""


class Unclear(Exception):
    """A look that tells nothing."""


class Looks(NamedTuple):
    """A bucket that was looked into before."""

    store: "S3Store"
    place: Place

    def read(self, path: str) -> Versioned | None:
        """See `Objects`. Raises Unclear."""
        try:
            found = self._asked().get(self.place.key(path))
            data, version = bytes(found.bytes()), found.meta["e_tag"]
        except Exception as error:  # whatever else obstore raises, s3fs meets it again and tells it
            if isinstance(error, FileNotFoundError) and "<Code>NoSuchKey</Code>" in str(error):
                return None
            raise Unclear from error
        if not version:  # not a bucket's answer: obstore follows redirects, wherever they lead
            raise Unclear
        return Versioned(data, version)

    def stat(self, path: str) -> Entry | None:
        """See `Objects`. Raises Unclear."""
        try:
            found = self._asked().head(self.place.key(path))
        except FileNotFoundError:
            return None
        except Exception as error:  # as above
            raise Unclear from error
        return Entry(path, found["size"], found["last_modified"].timestamp())

    def list(self, prefix: str) -> list[Entry]:
        """See `Objects`; all at once. Raises Unclear."""
        entries: list[Entry] = []
        try:
            for page in self._asked().list(self.place.key(prefix).rstrip("/"), chunk_size=1000):
                entries += (Entry(self.place.path(o["path"]), o["size"], o["last_modified"].timestamp()) for o in page)
                if len(entries) > MANY:
                    raise Unclear
        except Exception as error:  # as above
            raise Unclear from error
        if not all(entry.size for entry in entries):  # may stand for folders: obstore drops the slash that tells
            raise Unclear
        return entries

    def _asked(self) -> "S3Store":
        if os.getpid() != _PROCESS:
            raise Unclear
        return self.store


def looks_into(place: Place, options: Mapping[str, str], anonymous: bool) -> Looks | None:
    """Looks into the bucket, if one at the store's marker succeeds."""
    from obstore.store import S3Store

    try:
        access = _access(options, anonymous)
        if access is None or not _ENDPOINT.fullmatch(access.endpoint):
            return None
        client = CLIENT.copy()
        if access.authorities:
            client["root_certificate"] = Path(access.authorities).read_bytes()
        store = S3Store(
            place.bucket,
            aws_endpoint_url_s3=access.endpoint,
            region=access.region,
            credential_provider=access.credentials,
            skip_signature=anonymous,
            virtual_hosted_style_request=False,
            s3_express=False,
            client_options=client,
            retry_config={"max_retries": 0},
        )
        looks = Looks(store, place)
        looks.read("format.json")
    except Exception:  # s3fs meets it again, and what it says is told
        return None
    return looks


class _Access(NamedTuple):
    endpoint: str
    region: str
    authorities: str
    """A file of certificates that are trusted beside the system's, or nothing."""
    credentials: "Callable[[], S3Credential] | None"


def _access(options: Mapping[str, str], anonymous: bool) -> _Access | None:
    """What s3fs would go by. botocore, whose import takes a quarter of a second, is asked only for what options and
    environment do not say. None for what s3fs alone can do."""
    endpoint = options.get("endpoint_url") or _variable("ENDPOINT_URL_S3") or _variable("ENDPOINT_URL")
    stated = anonymous or "key" in options or bool(_variable("ACCESS_KEY_ID") and _variable("SECRET_ACCESS_KEY"))
    profile = options.get("profile") or _variable("PROFILE") or _variable("DEFAULT_PROFILE")
    session = None
    if profile or not stated or (_has_files() and not endpoint):
        from botocore.session import Session

        session = Session(profile=options.get("profile"))
    settings = session.get_scoped_config() if session else {}
    if any(name in settings or _variable(name.upper()) for name in _OF_S3FS):
        return None
    region = options.get("region_name") or _variable("DEFAULT_REGION") or settings.get("region") or "us-east-1"
    endpoint = endpoint or settings.get("endpoint_url") or f"https://s3.{region}.amazonaws.com"
    authorities = endpoint.startswith("https") and (_variable("CA_BUNDLE") or settings.get("ca_bundle"))
    credentials = None if anonymous else _credentials(options, session)
    if credentials is None and not anonymous:
        return None
    return _Access(endpoint, region, authorities or "", credentials)


def _credentials(options: Mapping[str, str], session: Any) -> "Callable[[], S3Credential] | None":
    """What obstore asks for credentials. None where there are none, or where s3fs would have to ask again."""
    if "key" in options or session is None:
        names = ("key", "secret", "token")
        variables = map(_variable, ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"))
        key, secret, token = map(options.get, names) if "key" in options else variables
        return lambda: _credential(key, secret, token, None)
    found = session.get_credentials()
    if found is None or found.method == "assume-role":  # which may ask for a code: once is enough
        return None

    def credentials() -> "S3Credential":
        now = found.get_frozen_credentials()
        return _credential(now.access_key, now.secret_key, now.token, datetime.now(UTC) + _FRESH)

    return credentials


def _credential(key: Any, secret: Any, token: Any, until: datetime | None) -> "S3Credential":
    return {"access_key_id": key, "secret_access_key": secret, "token": token, "expires_at": until}


def _variable(name: str) -> str:
    return os.environ.get(f"AWS_{name}", "")


def _has_files() -> bool:
    files = (_variable("CONFIG_FILE") or "~/.aws/config", _variable("SHARED_CREDENTIALS_FILE") or "~/.aws/credentials")
    return any(Path(file).expanduser().exists() for file in files)
