"""Credentials by reference: a recipe or a runtime says `secret: env:MY_SECRET`, never the secret itself.

What a recipe holds is kept in run records and published with the model, and a runtime is among the parameters that a
dashboard shows, so a literal secret is refused when they are read, and a reference is looked up only where a file
system is opened.
"""

import os
import re
from collections.abc import Mapping
from urllib.parse import parse_qsl, urlsplit

from stages.errors import UserError
from stages.identity import Json

REFERENCE = "env:"
"""`env:NAME` stands for the environment variable NAME."""

_SECRET = re.compile(
    r"secret|key|token|passw|credential|authorization|cookie|connection_string|signature|sas|^sig$", re.I
)
_WEB = ("http", "https")
"""Where a name before the host is a token; elsewhere it is a user of ssh, or a container of Azure's."""
_NO_SECRET = frozenset({"", "anon", "browser", "cache", "cloud", "google_default"})
"""What gcsfs takes as a token without being one."""


def check_options(options: Mapping[str, Json], above: str = "storage_options") -> None:
    """Raises ValueError for an option whose name looks like a secret and whose value is not `env:NAME`."""
    for name, value in options.items():
        place = f"{above}.{name}"
        if isinstance(value, Mapping):
            check_options(value, place)
        elif isinstance(value, str) and not value.startswith(REFERENCE):
            if _SECRET.search(name) and value not in _NO_SECRET:
                raise ValueError(
                    f"{place} looks like a secret, and this is kept and shown: put the value into an environment "
                    f"variable and write `{name}: env:NAME`"
                )
            check_url(value, place)


def check_url(url: str, place: str, mend: str = "storage_options, e.g. `headers: {Authorization: env:NAME}`") -> None:
    """Raises ValueError for a URL with a password, a token or a signature in it; `mend` is where that belongs. The
    error does not say the URL."""
    if "://" not in url:
        return
    try:
        parts = urlsplit(url)
        password = parts.password
    except ValueError as error:
        raise ValueError(f"{place}: this is no URL: {error}") from None
    secret = next((name for name, value in parse_qsl(parts.query) if value and _SECRET.search(name)), None)
    if not secret and parts.username and parts.scheme in _WEB:
        secret = "a name or token before the host"
    if password or secret:
        raise ValueError(
            f"{place}: the URL carries a secret ({'a password' if password else secret}), and a recipe is kept in the "
            f"store: take it out and name it in {mend}"
        )


def opened(options: Mapping[str, Json], place: str) -> dict[str, Json]:
    """The options with every reference looked up. Raises UserError for a variable that is not set."""
    return {name: _value(value, f"{place}.storage_options.{name}") for name, value in options.items()}


def _value(value: Json, place: str) -> Json:
    if isinstance(value, Mapping):
        return {name: _value(inner, f"{place}.{name}") for name, inner in value.items()}
    if not isinstance(value, str) or not value.startswith(REFERENCE):
        return value
    variable = value.removeprefix(REFERENCE)
    if not os.environ.get(variable):
        raise UserError(f"{place}: the environment variable {variable} is not set")
    return os.environ[variable]


def without_secrets(text: str, options: Mapping[str, Json]) -> str:
    """A library's message, without the values that the options' references stand for."""
    for value in options.values():
        if isinstance(value, Mapping):
            text = without_secrets(text, value)
        elif isinstance(value, str) and value.startswith(REFERENCE):
            secret = os.environ.get(value.removeprefix(REFERENCE), "")
            text = text.replace(secret, "***") if len(secret) > 3 else text
    return text
