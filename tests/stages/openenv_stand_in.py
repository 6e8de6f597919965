"""What `openenv_server.py` serves, without OpenEnv, whose package does not install beside regrow's pins."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from threading import Thread
from typing import Any

from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, serve

FIELD = {"type": "integer", "description": "A number from 1 to 4."}
SHAPE = {"type": "object", "properties": {"number": FIELD}, "required": ["number"]}
ACTION = {**SHAPE, "properties": {"number": FIELD, "metadata": {"type": "object"}}}
TOOL = {"name": "guess", "description": "Guess the number.", "input_schema": SHAPE}


class Session:
    """One connection's game."""

    number = 0

    def __init__(self, kind: str, tool: dict[str, Any]) -> None:
        self.kind, self.tool = kind, tool

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        data = message["data"]
        if message["type"] == "reset":
            self.number = data.get("seed") or 1
            return {"observation": {"text": "1 to 4"}, "reward": None, "done": False}
        if self.kind == "mcp":
            if data["type"] == "list_tools":
                return {"observation": {"tools": [self.tool]}, "reward": None, "done": False}
            right = data["arguments"]["number"] == self.number
            said = {"tool_name": "guess", "result": {"data": "yes" if right else "no"}, "error": None}
            return {"observation": said, "reward": None, "done": False}
        if data["number"] > 4:
            raise ValueError("there is no such number")
        right = data["number"] == self.number
        told = {"text": "yes" if right else "no", "metadata": {}}
        return {"observation": told, "reward": 1.0 if right else -0.25, "done": right}


@contextmanager
def serving(kind: str, tool: dict[str, Any] = TOOL) -> Iterator[str]:
    """Its address while it serves, over MCP with that `tool`."""

    def schema(_: ServerConnection, request: Request) -> Response | None:
        if request.path != "/schema":
            return None
        body = json.dumps({"action": {"description": "Guess the number.", **ACTION}}).encode()
        headers = Headers({"Content-Length": str(len(body)), "Content-Type": "application/json"})
        return Response(HTTPStatus.OK, "OK", headers, body)

    def talk(socket: ServerConnection) -> None:
        session = Session(kind, tool)
        try:
            for text in socket:
                message = json.loads(text)
                if message["type"] == "close":
                    return
                try:
                    socket.send(json.dumps({"type": "observation", "data": session.answer(message)}))
                except (ValueError, KeyError) as error:
                    socket.send(json.dumps({"type": "error", "data": {"message": str(error), "code": "X"}}))
        except ConnectionClosed:
            return

    with serve(talk, "127.0.0.1", 0, process_request=schema) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}"
