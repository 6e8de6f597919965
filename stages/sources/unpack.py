"""Packed files and archives, read as streams: nothing is ever written where a member's name says.

A member with a name that leaves its folder, a link or a device makes the whole archive refused, and whatever unpacks to
much more than it takes is refused while it is being read.
"""

import gzip
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Self, cast

from stages.errors import UserError

KINDS = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
"""Files of rows."""
PACKINGS = (".gz", ".zst")
"""A file of text rows may be packed so: `rows.jsonl.zst`."""
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.zst")
ROWS = (*KINDS, *(kind + packing for kind in KINDS[:3] for packing in PACKINGS))
SUFFIXES = (*ROWS, *ARCHIVES)
"""All that can be read."""

NOT_ROWS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
"""What the datasets library saves beside the rows: no rows, though the folder around it is named."""
CACHED = re.compile(r"cache-[0-9a-f]{16}(_\d{5}_of_\d{5})?\.arrow")
"""What its `map` and `filter` leave there: other versions of the rows."""
SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)
"""How the names of files and folders begin that hold a split, as in data sets of the Hub."""
HIDDEN = (".", "__MACOSX")
"""How names begin that editors, notebooks and systems give to files of their own."""

RATIO = 250
"""How many times its own size a file may unpack to; text rarely goes beyond 30."""
ALWAYS = 64 << 20
"""Bytes that any file may unpack to."""


def suffix_of(name: str, known: tuple[str, ...] = SUFFIXES) -> str:
    """The longest known suffix of a file's name, or nothing."""
    return next((suffix for suffix in sorted(known, key=len, reverse=True) if name.lower().endswith(suffix)), "")


def hidden(name: str, pattern: str = "") -> bool:
    """Whether a path leads to a hidden file, or through a hidden folder.

    Where a glob found it, what stands in the glob before the first wildcard was asked for, and so was a part like
    `.cache*`, which has the dot itself.
    """
    asked = PurePosixPath(pattern).parts
    fixed = next((number for number, part in enumerate(asked) if any(mark in part for mark in "*?[")), 0)
    wanted = [part for part in asked[fixed:] if part.startswith(HIDDEN)]
    return any(
        part.startswith(HIDDEN) and not any(fnmatchcase(part, one) for one in wanted)
        for part in PurePosixPath(name).parts[fixed:]
    )


def has_rows(name: str, known: tuple[str, ...] = SUFFIXES) -> bool:
    """Whether a file is taken that nobody named, only the folder or archive in which this is its path."""
    own = PurePosixPath(name).name
    return bool(suffix_of(name, known)) and own not in NOT_ROWS and not CACHED.fullmatch(own) and not hidden(name)


def left_alone(names: Iterable[str]) -> int:
    """How many of the files in a folder are not taken; of hidden ones nobody thinks that they would be."""
    return sum(not has_rows(name) and not hidden(name) for name in names)


def refuse_splits(names: Iterable[str], place: str, packed: bool = False) -> None:
    """Raise UserError where the datasets library saved several splits, or files or folders are named after splits, as
    in the Hub's data sets: a test split would train. `names` are the paths of all files below a folder that was named,
    or in an archive (`packed`).
    """
    first = "unpack it, and " if packed else ""
    paths = [PurePosixPath(name) for name in names]
    splits = {path.parent for path in paths if path.name == "state.json"}
    for folder in sorted(path.parent for path in paths if path.name == "dataset_dict.json"):
        found = sorted(split for split in splits if split.parent == folder)
        if len(found) > 1:
            told = f"{folder} holds the splits {', '.join(split.name for split in found)}, as datasets saved them"
            one = next((split for split in found if split.name == "train"), found[0])
            raise UserError(f"{place}: {told}: {first}name the folder of one, e.g. {one}")
    named: dict[PurePosixPath, dict[str, PurePosixPath]] = {}
    for path in filter(lambda path: suffix_of(path.name) and path.name not in NOT_ROWS, paths):
        for one in (path, path.parent):
            if match := SPLIT.match(one.name):
                named.setdefault(one.parent, {}).setdefault(match[1].lower(), one)
    for folder, of in sorted(named.items()):
        if "train" in of and len(of) > 1:
            mend = str(of["train"]) if not suffix_of(of["train"].name) else f"{folder}/train*"
            told = f"{folder} holds {', '.join(of[split].name for split in sorted(of))}, named after splits"
            raise UserError(f"{place}: {told}: {first}name those of one, e.g. {mend}")


class _Limited:
    """A stream of unpacked bytes that refuses to give more than is believable."""

    def __init__(self, stream: BinaryIO, budget: "Budget") -> None:
        self.stream, self.budget = stream, budget

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.budget.spend(len(data))
        return data


class Budget:
    """How many bytes may come out of one file, whose size may only be known as it is read."""

    def __init__(self, name: str, packed: Callable[[], int]) -> None:
        self.name, self.packed, self.spent = name, packed, 0

    def spend(self, size: int) -> None:
        """Raises UserError when it is used up."""
        self.spent += size
        if self.spent > max(ALWAYS, RATIO * (packed := self.packed())):
            raise UserError(
                f"{self.name} unpacks to more than {RATIO} times its {packed} bytes: it may be made to fill the disk. "
                "Unpack it yourself if you trust it"
            )


def unpacked(stream: BinaryIO, suffix: str, budget: Budget) -> BinaryIO:
    """The stream without the packing that the suffix names."""
    if suffix.endswith((".gz", ".tgz")):
        return cast(BinaryIO, _Limited(cast(BinaryIO, gzip.GzipFile(fileobj=stream)), budget))
    if suffix.endswith(".zst"):
        import pyarrow as pa

        unpacking = pa.CompressedInputStream(pa.PythonFile(_ForArrow(stream), "r"), "zstd")
        return cast(BinaryIO, _Limited(cast(BinaryIO, _Zstandard(unpacking)), budget))
    return stream


class _ForArrow:
    """Any stream as Arrow takes one, which asks whether it is closed and closes it: that is for who opened it."""

    closed = False

    def __init__(self, stream: BinaryIO) -> None:
        self.read = stream.read

    def close(self) -> None:
        """Leaves the stream open."""


class _Zstandard:
    """Arrow's stream, with the errors that gzip has."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def read(self, size: int) -> bytes:
        try:
            data: bytes = self.stream.read(size)
        except OSError as error:
            raise EOFError(str(error)) from error
        return data


@contextmanager
def clear_errors(name: str) -> Iterator[None]:
    """Turn what the unpacking libraries raise into one UserError."""
    import tarfile

    try:
        yield
    except (gzip.BadGzipFile, zlib.error, EOFError, zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError) as error:
        raise UserError(f"{name} is damaged, or cut short: {error}") from error
    except (NotImplementedError, RuntimeError) as error:  # zipfile: an unknown method, or a password
        raise UserError(f"{name} cannot be unpacked: {error}") from error


def members(stream: BinaryIO, suffix: str, budget: Budget) -> Iterator[tuple[str, BinaryIO | None]]:
    """The files of an archive in its own order: (name, stream), or (name, None) for one that holds no rows.

    A zip needs a stream that can seek. Raises UserError for an archive with a name that leaves its folder, a link or a
    device in it.
    """
    if suffix == ".zip":
        with zipfile.ZipFile(stream) as archive:
            for info in archive.infolist():
                kind = info.external_attr >> 28 if info.create_system == 3 else 0
                if not info.is_dir():
                    _check(info.filename, kind in (0, 0o10), budget.name)
                    with archive.open(info) as file:
                        yield _member(info.filename, cast(BinaryIO, file), budget)
        return
    import tarfile

    class Entry(tarfile.TarInfo):
        """A member; none is left only where the zeros stand that end a tar."""

        @classmethod
        def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
            try:
                return super().fromtarfile(tar)
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # its types know only what it documents
                raise
            except tarfile.HeaderError as error:  # which the library takes for the end once it had one member
                raise tarfile.ReadError(
                    f"byte {tar.offset} begins neither a file nor the zeros that end an archive ({error}). "
                    "Copy it here once more, or pack it again"
                ) from error

    outer = unpacked(stream, suffix, Budget(budget.name, budget.packed))  # a budget of its own: bytes count once
    with tarfile.open(fileobj=outer, mode="r|", tarinfo=Entry) as tar:
        for entry in tar:
            if not entry.isdir():
                _check(entry.name, entry.isreg(), budget.name)
                file_ = tar.extractfile(entry)
                assert file_ is not None
                yield _member(entry.name, cast(BinaryIO, file_), budget)


def _member(name: str, stream: BinaryIO, budget: Budget) -> tuple[str, BinaryIO | None]:
    return name, cast(BinaryIO, _Limited(stream, budget)) if has_rows(name, ROWS) else None


def _check(name: str, regular: bool, archive: str) -> None:
    if re.match(r"[\\/]|[A-Za-z]:", name) or ".." in re.split(r"[\\/]", name):
        raise UserError(f"{archive} holds the name {name!r}, which leads out of a folder: such an archive is refused")
    if not name.isprintable():
        raise UserError(f"{archive} holds the name {name!r}: such an archive is refused")
    if not regular:
        raise UserError(f"{archive} holds {name!r}, which is a link or a device: pack plain files only")
