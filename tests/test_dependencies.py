"""What is installed is what was tested: `constraints.txt` pins everything that regrow and its tools bring in, once.

Looking the pins up among known vulnerabilities (`make audit`) needs a network; this does not.
"""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    found = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!+_-]+)", line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if not match]
    named = [(canonicalize_name(match[1]), match[2]) for match in found if match]
    assert len(named) == len(dict(named)), "a package is pinned twice"
    return dict(named)


def needed() -> set[str]:
    """What `pip install -e '.[dev]'` brings in on this machine, by following what each package says."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    waiting = [*project["dependencies"], *extras["dev"]]
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    while waiting:
        wanted = Requirement(waiting.pop())
        name = canonicalize_name(wanted.name)
        for extra in ("", *sorted(wanted.extras)):
            if (name, extra) in seen or not (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
                continue
            seen.add((name, extra))
            if name == "regrow":
                waiting += extras.get(extra, [])
                continue
            try:
                listed = requires(name) or []
            except PackageNotFoundError:
                continue
            found.add(name)
            for text in listed:
                inner = Requirement(text)
                if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                    inner.marker = None
                    waiting.append(str(inner))
    return found


def test_everything_that_is_installed_is_pinned_at_the_version_that_was_tested() -> None:
    pinned = pins()
    assert sorted(needed() - pinned.keys() - {"setuptools"}) == [], "of Python's own tools each has its own"
    differ = {name: (pinned[name], version(name)) for name in needed() & pinned.keys() if version(name) != pinned[name]}
    differ = {name: both for name, both in differ.items() if both[0] != both[1].split("+")[0]}  # torch's `+cpu`
    assert differ == {}
