"""`regrow serve`: hands a model's folder to a server that others wrote and keep, with OpenAI's API.

`transformers serve` comes with what regrow trains with; vLLM is for a GPU and many users. This process becomes the
server: signals and its exit code are the server's own.
"""

import errno
import os
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NoReturn

from stages.arithmetic import fitting
from stages.cache import for_good
from stages.errors import UserError

Engine = Literal["auto", "transformers", "vllm"]

NEEDS = ("fastapi", "uvicorn", "openai")
"""What `transformers serve` asks for besides transformers."""


@dataclass(frozen=True)
class Served:
    """A command that serves, and where it wants to be started."""

    command: list[str]
    environment: Mapping[str, str]
    folder: Path
    """The working folder: the server finds the model there under its name."""


def prepare(
    model: Path, name: str, engine: Engine, host: str, port: int, device: Literal["auto", "cpu", "cuda"], places: Path
) -> Served:
    """What to start for a model's folder. Requests name the model `name`; `places` is a folder for links.

    Raises UserError when no server is installed, or the one that was asked for is not, and when `host` is no address or
    name of this machine or the port is taken.
    """
    chosen = _engine(engine)
    _check_free(host, port)
    # Both servers ask requests to name the model as they were given it: a link gives it its short name. Each port has
    # its own, as a server that let its model go reads it again from there.
    places = places / str(port)
    places.mkdir(parents=True, exist_ok=True)
    link = places / name
    aside = places / f".{name}-{os.getpid()}"
    aside.unlink(missing_ok=True)
    aside.symlink_to(model)
    aside.replace(link)
    where = ["--host", host, "--port", str(port)]
    if chosen == "vllm":
        command = ["vllm", "serve", str(model), "--served-model-name", name, *where]
    else:
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", name, *where]
        command += ["--device", device, *_precision(device)]
    # Nothing is looked up anywhere: the folder holds all there is.
    return Served(command, {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "DO_NOT_TRACK": "1"}, places)


def endpoint(host: str, port: int) -> str:
    """The address that clients are given. An address of IPv6 stands in brackets there."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def become(served: Served, cache: Path) -> NoReturn:
    """Turn this process into the server. What is in use in the local `cache` stays so."""
    for_good(cache).outlive_exec()
    os.chdir(served.folder)
    os.execvpe(served.command[0], served.command, {**os.environ, **served.environment})


def _engine(engine: Engine) -> Engine:
    vllm = shutil.which("vllm") is not None
    lacking = [name for name in NEEDS if find_spec(name) is None]
    if engine == "vllm" and not vllm:
        raise UserError("--engine vllm: vLLM is not installed here; pip install vllm, or take --engine transformers")
    if engine == "vllm" or (engine == "auto" and vllm):
        return "vllm"
    if lacking:
        raise UserError(f"`transformers serve` needs {', '.join(lacking)}; pip install 'regrow[serve]'")
    return "transformers"


def _precision(device: str) -> list[str]:
    """Float32 on a CPU that emulates bfloat16; else the weights' own."""
    import torch

    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    return ["--dtype", "float32"] if on_cpu and fitting("bf16", "cpu") == "fp32" else []


def _check_free(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise UserError(
                f"--host {host}: expected a name or an address of this machine, such as 127.0.0.1 or ::1 "
                f"({error.strerror})"
            ) from None
        raise UserError(
            f"port {port} on {host} cannot be listened on ({error.strerror}): end what uses it, or choose another with "
            "--port"
        ) from None
