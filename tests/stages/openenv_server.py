"""A real OpenEnv server for `test_openenv.py`, run by a Python that has `openenv-core`: a hidden number to guess, with
actions that have fields (`fields`) or tools over MCP (`mcp`).

    python openenv_server.py fields PORT
"""

import sys

import uvicorn
from fastmcp import FastMCP
from openenv.core.env_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
from openenv.core.env_server.types import Action, Observation, State
from pydantic import Field


class Guess(Action):
    """Guess the number."""

    number: int = Field(description="A number from 1 to 4.")


class Told(Observation):
    text: str = ""


class Guessing(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, **more):
        self.number = seed or 1
        return Told(text="1 to 4", reward=0.0)

    def step(self, action, timeout_s=None, **more):
        if action.number > 4:
            raise ValueError("there is no such number")
        right = action.number == self.number
        return Told(text="yes" if right else "no", reward=1.0 if right else -0.25, done=right)

    @property
    def state(self):
        return State()


class Tools(MCPEnvironment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        tools = FastMCP("guessing")

        @tools.tool
        def guess(number: int) -> str:
            """Guess the number."""
            return "yes" if number == self.number else "no"

        super().__init__(tools)
        self.number = 1

    def reset(self, seed=None, episode_id=None, **more):
        self.number = seed or 1
        return Told(text="1 to 4")

    def _step_impl(self, action, timeout_s=None, **more):
        raise ValueError("tools only")

    @property
    def state(self):
        return State()


if __name__ == "__main__":
    kind, port = sys.argv[1:]
    fields = (Guessing, Guess, Told)
    mcp = (Tools, CallToolAction, CallToolObservation)
    app = create_fastapi_app(*(fields if kind == "fields" else mcp), max_concurrent_envs=16)
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning")
