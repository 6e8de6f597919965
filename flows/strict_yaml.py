"""Reads YAML of recipes and runtime files strictly: remembers every key's line, refuses duplicate keys, tags and bombs.

Anchors and `<<` merges work. A document that would unfold to more than `MAX_NODES` values (a "billion laughs" bomb)
or that contains itself is refused before anything is built from it.
"""

import re
from dataclasses import dataclass
from typing import Any

import yaml

from stages.errors import UserError

MAX_NODES = 50_000
MAX_BYTES = 1_000_000

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """A parsed document and the line (from 1) on which each value's key stands."""

    value: Any
    lines: dict[Path, int]

    def line(self, path: Path) -> int | None:
        """The line of the value at `path`, or of the nearest thing around it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None


def parse(text: str, name: str) -> Document:
    """Parse YAML text. `name` is the file's name for messages. Raises UserError with the line."""
    if len(text) > MAX_BYTES:
        raise UserError(f"{name}: {len(text):,} characters are too many; the limit is {MAX_BYTES:,}")
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return Document(None, {})
            _refuse_bomb(root, name)
            lines: dict[Path, int] = {}
            _note_lines(root, (), lines, name)
            return Document(loader.construct_document(root), lines)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}" if mark else name
        raise UserError(f"{place}: not valid YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise UserError(f"{name}: nested too deep") from None
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None


def _refuse_bomb(root: yaml.Node, name: str) -> None:
    """Count the values a document unfolds to, aliases included, without unfolding it."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_nodes:
            raise UserError(f"{name}:{node.start_mark.line + 1}: an anchor contains itself")
        if depth > 100:
            raise UserError(f"{name}:{node.start_mark.line + 1}: nested more than 100 levels deep")
        open_nodes.add(id(node))
        total = 1
        if isinstance(node, yaml.SequenceNode):
            total += sum(size(item, depth + 1) for item in node.value)
        elif isinstance(node, yaml.MappingNode):
            total += sum(size(k, depth + 1) + size(v, depth + 1) for k, v in node.value)
        open_nodes.discard(id(node))
        sizes[id(node)] = total
        return total

    if size(root, 0) > MAX_NODES:
        raise UserError(f"{name}: its anchors unfold to more than {MAX_NODES:,} values; write it out plainly")


def _refuse_no_value(node: yaml.ScalarNode, name: str) -> None:
    """What looks like a date and is none, such as 2026-02-30, half of a character, which no file can hold, and a number
    that is another one than people read: YAML 1.1 takes 010 for an octal 8, and 1:30 for ninety."""
    try:
        value = yaml.constructor.SafeConstructor().construct_object(node)
        node.value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{name}:{node.start_mark.line + 1}: half of a character (a lone surrogate) stands here"
        ) from None
    except ValueError as error:
        told = f"{name}:{node.start_mark.line + 1}: {node.value} is no value: {error}"
        raise UserError(f"{told}; write text between quotes") from None
    numeral = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    if numeral and (":" in node.value or re.fullmatch(r"[-+]?0[0-7_]+", node.value)):
        reads = "colons in base 60" if ":" in node.value else "a leading 0 as octal"
        means = f"{node.value} is {value} in YAML, which reads {reads}"
        raise UserError(f"{name}:{node.start_mark.line + 1}: {means}: write the number in full, or text between quotes")


def _note_lines(node: yaml.Node, path: Path, lines: dict[Path, int], name: str) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.ScalarNode):
        _refuse_no_value(node, name)
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _note_lines(item, (*path, number), lines, name)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    _note_lines(merged, path, lines, name)
                continue
            if isinstance(key, yaml.ScalarNode):
                _refuse_no_value(key, name)
            text = str(key.value)
            if text in seen:
                raise UserError(f"{name}:{key.start_mark.line + 1}: the key `{text}` stands here twice; keep one")
            seen.add(text)
            lines[(*path, text)] = key.start_mark.line + 1
            _note_lines(value, (*path, text), lines, name)
