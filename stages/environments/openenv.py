"""An environment of OpenEnv's: a server that answers over WebSocket, in a process or container of its own.

    environment: {name: openenv, options: {url: "http://localhost:8000", columns: [seed]}}

Its tools are asked for when training begins: those an MCP environment lists, or else one, `step`, with the fields of
the server's action. The reward of an episode is the sum of what its steps were worth. Each environment object is a
session of its own, so the server must allow as many at once as a step has completions. The protocol is that of OpenEnv
0.3; its Python package, which brings a web framework and pins of its own, is not needed.
"""

import inspect
import json
import urllib.request
from collections.abc import Iterator, Mapping
from keyword import iskeyword
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from stages.environments import Environment
from stages.errors import UserError
from stages.stage import StageConfig

TYPES: Mapping[str, type] = {
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list,
    "object": dict,
}
"""JSON Schema's types; all others are text."""
HIDDEN = ("metadata", "done", "reward", "type", "tool_name")
"""Fields of an observation that tell the model nothing."""


class Options(StageConfig):
    """Where the server is."""

    url: str
    """Its address. A name and password do not belong in it: it stands in the recipe."""
    columns: list[str] = Field(default_factory=list)
    """Columns of a prompt's row that `reset` is given, such as a seed."""
    seconds: float = Field(default=30.0, gt=0)
    """How long it may take to answer."""

    @field_validator("url")
    @classmethod
    def _plain(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"expected http://HOST:PORT, got {url!r}")
        if parts.username or parts.password:
            raise ValueError("has a name or password in it, which would enter keys and logs: take them out")
        return url.rstrip("/")


class Session:
    """An episode after another over one connection. Raises RuntimeError for what the server refuses."""

    def __init__(self, options: Options) -> None:
        from websockets.sync.client import connect

        self.seconds = options.seconds
        self.socket = connect("ws" + options.url.removeprefix("http") + "/ws", open_timeout=options.seconds, proxy=None)

    def ask(self, kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """One message and its answer: `observation`, `reward` and `done`."""
        self.socket.send(json.dumps({"type": kind, "data": data}))
        answer = json.loads(self.socket.recv(timeout=self.seconds))
        found: dict[str, Any] = answer.get("data") or {}
        if answer.get("type") == "error":
            raise RuntimeError(found.get("message") or "the environment answered with an error")
        return found

    def close(self) -> None:
        self.socket.send(json.dumps({"type": "close"}))
        self.socket.close()


def make(options: Options) -> type:
    """The class of episodes on that server, with its tools as methods. Raises UserError when it cannot be reached, and
    for names that no method or argument can have."""
    try:
        session = Session(options)
        tools = _listed(session) or [_step(options)]
        session.close()
    except (OSError, TimeoutError, ValueError, KeyError) as error:
        told = f"{type(error).__name__}: {error}"
        raise UserError(f"environment: no OpenEnv server answers at {options.url}: {told}. Is it running?") from error
    for tool in tools:
        if tool["name"] in ("options", *dir(_Episodes)):
            raise UserError(
                f"environment: the server's tool {tool['name']} has the name of something that every environment has: "
                "rename it there"
            )
    methods = {tool["name"]: _method(tool) for tool in tools}
    return type("OpenEnv", (_Episodes,), {"options": options, **methods})


class _Episodes:
    """What all servers have in common; a server's own tools are added to it."""

    options: Options

    def __init__(self) -> None:
        self._session = Session(self.options)
        self._reward, self._done = 0.0, False

    def reset(self, **row: Any) -> str | None:
        given = {name: row[name] for name in self.options.columns}
        answer = self._session.ask("reset", given)
        self._reward, self._done = 0.0, False
        told = _told(answer.get("observation") or {})
        return told and f"\n\n{told}"

    def get_reward(self) -> float:
        return self._reward

    def _act(self, action: Mapping[str, Any]) -> str:
        if self._done:
            raise RuntimeError("the episode has ended")
        answer = self._session.ask("step", action)
        self._reward += float(answer.get("reward") or 0.0)
        self._done = bool(answer.get("done"))
        observation = answer.get("observation") or {}
        if error := observation.get("error"):
            raise RuntimeError(error.get("message", error) if isinstance(error, dict) else error)
        return _told(observation) + ("\nThe episode has ended." if self._done else "")


def _listed(session: Session) -> list[dict[str, Any]]:
    """The tools of an MCP environment; none for one of another kind, which does not know the question."""
    try:
        tools = session.ask("step", {"type": "list_tools"})["observation"]["tools"]
    except (RuntimeError, KeyError):
        return []
    return [
        {**tool, "schema": tool.get("input_schema") or tool.get("inputSchema") or {}, "mcp": True} for tool in tools
    ]


def _step(options: Options) -> dict[str, Any]:
    """The one tool of an environment whose actions have fields."""
    with urllib.request.urlopen(f"{options.url}/schema", timeout=options.seconds) as answer:
        schema = json.load(answer)["action"]
    return {"name": "step", "description": schema.get("description") or "Act on the environment.", "schema": schema}


def _type(field: Mapping[str, Any]) -> type:
    """What an argument is, by its schema; of several kinds, the first that is not null."""

    def kinds(field: Mapping[str, Any]) -> Iterator[str]:
        named = field.get("type", ())
        yield from [named] if isinstance(named, str) else named
        for other in field.get("anyOf", ()):
            yield from kinds(other)

    return TYPES.get(next((kind for kind in kinds(field) if kind != "null"), ""), str)


def _method(tool: Mapping[str, Any]) -> Any:
    """A tool as a method with the signature and docstring that its schema is told from again. Raises UserError for an
    argument that none of Python's can be."""
    schema = tool["schema"]
    fields = dict(schema.get("properties", {}))
    if not tool.get("mcp"):
        fields.pop("metadata", None)  # which every action has
    for name in fields:
        if not name.isidentifier() or iskeyword(name) or name == "self":
            raise UserError(
                f"environment: the argument {name!r} of the server's tool {tool['name']} is no name that an argument "
                "can have in Python: rename it there"
            )
    needed = schema.get("required", ())

    def act(self: _Episodes, /, **given: Any) -> str:
        if tool.get("mcp"):
            return self._act({"type": "call_tool", "tool_name": tool["name"], "arguments": given})
        return self._act(given)

    types = {name: _type(field) for name, field in fields.items()}
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    for name in fields:
        default = inspect.Parameter.empty if name in needed else fields[name].get("default")
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=types[name], default=default)
        )
    told = {name: " ".join(str(field.get("description") or f"The {name}.").split()) for name, field in fields.items()}
    arguments = "".join(f"\n    {name}: {text}" for name, text in told.items())
    act.__name__ = act.__qualname__ = tool["name"]
    act.__doc__ = (tool.get("description") or tool["name"]) + (f"\n\nArgs:{arguments}\n" if arguments else "")
    act.__annotations__ = {**types, "return": str}
    act.__signature__ = inspect.Signature(parameters, return_annotation=str)  # type: ignore[attr-defined]
    return act


def _told(observation: Mapping[str, Any]) -> str:
    """An observation as the model reads it: its one text, or its fields as JSON."""
    left = {name: value for name, value in observation.items() if name not in HIDDEN and value is not None}
    if not left:
        return ""
    (alone,) = left.values() if len(left) == 1 else (left,)
    if isinstance(alone, dict) and isinstance(alone.get("data"), str | int | float):
        alone = alone["data"]  # what a tool of MCP's gives
    if isinstance(alone, str):
        return alone
    return json.dumps(alone, ensure_ascii=False)  # 0 and false are answers, too


ENVIRONMENT = Environment(3, make, Options)
