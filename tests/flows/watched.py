"""Watches where processes connect to, for tests: all those whose environment has a certain variable."""

import ipaddress
import threading
from collections.abc import Iterator
from pathlib import Path

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Connections(threading.Thread):
    """Other ends of their connections that were seen while a block ran, those that were only tried too."""

    def __init__(self, variable: str) -> None:
        super().__init__(daemon=True)
        self.done, self.seen, self.variable = threading.Event(), set[Address](), variable.encode()

    def run(self) -> None:
        while not self.done.wait(0.1):
            for entry in Path("/proc").glob("[0-9]*"):
                try:
                    if self.variable in (entry / "environ").read_bytes().split(b"\0"):
                        self.seen.update(_others(entry))
                except OSError:  # it has ended, or closed something meanwhile
                    continue

    def __enter__(self) -> "Connections":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.join()


def _others(process: Path) -> Iterator[Address]:
    sockets = set()
    for file in (process / "fd").iterdir():
        try:
            sockets.add(str(file.readlink()))
        except OSError:
            continue
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in (process / "net" / table).read_text().splitlines()[1:]:
            fields = line.split()
            address = _address(fields[2].partition(":")[0])
            if f"socket:[{fields[9]}]" in sockets and not address.is_unspecified:
                yield address


def _address(digits: str) -> Address:
    words = [bytes.fromhex(digits[i : i + 8])[::-1] for i in range(0, len(digits), 8)]
    address = ipaddress.ip_address(b"".join(words))
    return getattr(address, "ipv4_mapped", None) or address
