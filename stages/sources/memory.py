"""What was found out about sources and would take long to find out again: JSON files in the runtime's cache."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def recall(memory: Path) -> dict[str, Any]:
    """What stands there; nothing where nothing does, or what does cannot be read: it is found out again."""
    try:
        found = json.loads(memory.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def remember(memory: Path, found: Mapping[str, Any]) -> None:
    """Put it there. A full disk, or a cache that cannot be written, costs the memory only."""
    aside = memory.with_name(f"{memory.name}.{os.getpid()}")
    with suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(found), "utf-8")
        aside.replace(memory)
