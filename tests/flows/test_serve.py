"""`regrow serve`: OpenAI's own client talks with the model, and hears what `regrow chat` would say."""

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from flows.chat import Sampling, load
from flows.serve import prepare
from stages.errors import UserError
from tests.flows.raised import free_port
from tests.flows.served import listening, serving

TURNS = [{"role": "user", "content": "say abcd"}]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[tuple[openai.OpenAI, str, int]]:
    home = tmp_path_factory.mktemp("serving")
    with serving(["serve", str(tiny_model), "--engine", "transformers"], home) as port:
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none"), tiny_model.name, port
    told = (home / "served.log").read_text()
    assert f"model     {tiny_model.name}" in told and f"http://127.0.0.1:{port}/v1" in told


def test_openais_client_hears_what_chat_says(endpoint: tuple[openai.OpenAI, str, int], tiny_model: Path) -> None:
    client, name, _ = endpoint
    ours = "".join(load(tiny_model, None, "cpu", Sampling(max_new_tokens=8)).answer("tuned", "say abcd"))
    asked = {"model": name, "messages": TURNS, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    assert whole.choices[0].message.content == ours
    stream = client.chat.completions.create(**asked, stream=True)  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == ours


def test_a_request_cannot_have_another_model(endpoint: tuple[openai.OpenAI, str, int]) -> None:
    client, _, _ = endpoint
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="someone/else", messages=TURNS)  # type: ignore[arg-type]


def test_it_listens_on_the_loopback_alone(endpoint: tuple[openai.OpenAI, str, int]) -> None:
    _, _, port = endpoint
    assert listening(port) == ["127.0.0.1"]


def test_a_taken_port_is_told_before_anything_loads(tiny_model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 cannot be listened on .*--port"):
            prepare(tiny_model, "tiny", "transformers", "127.0.0.1", port, "cpu", tmp_path)


def test_a_host_that_is_none_is_told(tiny_model: Path, tmp_path: Path) -> None:
    for host in ("[::1]", "no-such-host.invalid", "192.0.2.1"):
        with pytest.raises(UserError, match=r"--host .*: expected a name or an address of this machine"):
            prepare(tiny_model, "tiny", "transformers", host, free_port(), "cpu", tmp_path)


@pytest.mark.full
def test_it_serves_at_an_address_of_ipv6(tiny_model: Path, tmp_path: Path) -> None:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("this machine has no IPv6")
    words = ["serve", str(tiny_model), "--engine", "transformers", "--host", "::1"]
    with serving(words, tmp_path, "http://[::1]") as port:
        told = (tmp_path / "served.log").read_text()
        [url] = re.findall(r"^endpoint +(\S+)$", told, re.M)
        assert url == f"http://[::1]:{port}/v1" and "password" not in told
        client = openai.OpenAI(base_url=url, api_key="none")
        answer = client.chat.completions.create(model=tiny_model.name, messages=TURNS, max_tokens=4)  # type: ignore[arg-type]
        assert answer.choices[0].message.content
        assert listening(port) == ["0" * 24 + "01000000"]


def test_vllm_gets_the_folder_and_the_name(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="vLLM is not installed here"):
        prepare(tiny_model, "tiny", "vllm", "127.0.0.1", free_port(), "cpu", tmp_path)
    (tmp_path / "vllm").write_text("#!/bin/sh\n")
    (tmp_path / "vllm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    served = prepare(tiny_model, "tiny", "auto", "127.0.0.1", 8123, "cpu", tmp_path / "places")
    expected = [
        "vllm",
        "serve",
        str(tiny_model),
        "--served-model-name",
        "tiny",
        "--host",
        "127.0.0.1",
        "--port",
        "8123",
    ]
    assert served.command == expected
