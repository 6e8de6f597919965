"""The environment `openenv`: what a server of OpenEnv's offers becomes tools, and its answers are told.

With REGROW_OPENENV_PYTHON, a Python that has `openenv-core`, against a real server too.
"""

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.environments import EnvironmentChoice, load, openenv
from stages.errors import UserError
from tests.stages import openenv_stand_in

REAL = os.environ.get("REGROW_OPENENV_PYTHON", "")


@pytest.fixture(params=["stand-in fields", "stand-in mcp", "real fields", "real mcp"])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """What a server offers, and its address."""
    which, kind = request.param.split()
    if which == "stand-in":
        with openenv_stand_in.serving(kind) as url:
            yield kind, url
        return
    if not REAL:
        pytest.skip("REGROW_OPENENV_PYTHON names no Python with openenv-core")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([REAL, str(Path(__file__).with_name("openenv_server.py")), kind, str(port)])
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, "the server did not start"
                time.sleep(0.1)
        yield kind, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("observation", "told"),
    [
        ({"result": 0, "done": False, "reward": 1.0}, "0"),
        ({"result": {"data": 0}, "tool_name": "count"}, "0"),
        ({"result": {"data": False}, "error": None}, "false"),
        ({"hit": False, "left": 2}, '{"hit": false, "left": 2}'),
        ({"text": "warm"}, "warm"),
        ({"metadata": {"a": 1}, "done": True, "text": None}, ""),
    ],
)
def test_an_answer_of_nothing_is_told_as_such(observation: dict[str, Any], told: str) -> None:
    assert openenv._told(observation) == told


def opened(url: str, **options: Any) -> Any:
    return load(EnvironmentChoice(name="openenv", options={"url": url, "columns": ["seed"], **options}))


def test_its_actions_are_tools_that_can_be_described(served: tuple[str, str]) -> None:
    from transformers.utils import get_json_schema

    kind, url = served
    tool = opened(url).step if kind == "fields" else opened(url).guess
    told = get_json_schema(tool)["function"]
    assert told["name"] == ("step" if kind == "fields" else "guess")
    assert told["description"] == "Guess the number."
    assert told["parameters"]["required"] == ["number"]
    assert list(told["parameters"]["properties"]) == ["number"]
    assert told["parameters"]["properties"]["number"]["type"] == "integer"


def offering(name: str = "guess", **fields: Any) -> dict[str, Any]:
    """A tool over MCP with more arguments."""
    shape = {**openenv_stand_in.SHAPE, "properties": {"number": openenv_stand_in.FIELD, **fields}}
    return {**openenv_stand_in.TOOL, "name": name, "input_schema": shape}


def test_all_that_a_tool_takes_is_told_and_sent() -> None:
    """Also where an answer has fields of that name, which tell the model nothing."""
    from transformers.utils import get_json_schema

    names = ("type", "metadata", "reward", "done", "tool_name")
    optional = {"type": ["null", "integer"]}, {"anyOf": [{"type": "null"}, {"type": "boolean"}]}
    tool = offering(**{name: {"type": "string"} for name in names}, level=optional[0], loud=optional[1], other={})
    with openenv_stand_in.serving("mcp", tool) as url:
        place = opened(url)()
        told = get_json_schema(place.guess)["function"]["parameters"]
        kinds = {name: field["type"] for name, field in told["properties"].items()}
        assert kinds == {
            "number": "integer",
            **dict.fromkeys(names, "string"),
            "level": "integer",
            "loud": "boolean",
            "other": "string",
        }
        assert told["required"] == ["number"]
        place.reset(seed=2)
        assert place.guess(number=2, **dict.fromkeys(names, "x"), level=1, loud=True) == "yes"


@pytest.mark.parametrize(
    ("tool", "told"),
    [
        (offering(**{"user-id": {"type": "string"}}), "the argument 'user-id' of the server's tool guess"),
        (offering(**{"from": {"type": "string"}}), "the argument 'from' of the server's tool guess"),
        (offering("reset"), "the server's tool reset has the name of something that every environment has"),
        (offering("get_reward"), "the server's tool get_reward has the name of something"),
    ],
)
def test_a_name_that_a_tool_cannot_have_is_named(tool: dict[str, Any], told: str) -> None:
    with openenv_stand_in.serving("mcp", tool) as url, pytest.raises(UserError, match=told):
        opened(url)


def test_an_episode_is_played_and_added_up(served: tuple[str, str]) -> None:
    kind, url = served
    place = opened(url)()
    act = place.step if kind == "fields" else place.guess
    assert place.reset(seed=3, other="not asked for") == "\n\n1 to 4"
    assert act(number=1) == "no"
    if kind == "fields":
        assert place.get_reward() == -0.25
        with pytest.raises(RuntimeError, match="no such number"):
            act(number=9)
        assert act(number=3) == "yes\nThe episode has ended."
        assert place.get_reward() == 0.75
        with pytest.raises(RuntimeError, match="has ended"):
            act(number=3)
    else:
        assert act(number=3) == "yes"
    with pytest.raises(RuntimeError):  # the server's own words
        place.reset(seed=2)
        act(nmber=2)
    assert act(number=2).startswith("yes")


def test_two_episodes_at_once_do_not_meet(served: tuple[str, str]) -> None:
    kind, url = served
    shape = opened(url)
    one, two = shape(), shape()
    one.reset(seed=1)
    two.reset(seed=2)
    said = [(place.step if kind == "fields" else place.guess)(number=1)[:3].strip() for place in (one, two)]
    assert said == ["yes", "no"]


def test_where_no_server_is_says_so() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(UserError, match=f"no OpenEnv server answers at {url}"):
            opened(url)


@pytest.mark.parametrize(
    ("url", "told"), [("localhost:8000", "expected http://HOST:PORT"), ("http://me:pw@host:1", "take them out")]
)
def test_an_address_that_cannot_be_is_refused(url: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        EnvironmentChoice(name="openenv", options={"url": url})


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'openenv'"):
        EnvironmentChoice(name="opnenv")
