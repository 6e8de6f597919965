"""Runtime: where and how fast, never what. Nothing here enters a key.

The rule: what affects speed, place or logging, but not the training mathematics, belongs here. Set it by environment
variables (`REGROW_STORE=s3://bucket/prefix`), by a YAML file named with `--runtime`, or by flags.
"""

import difflib
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ByteSize, ConfigDict, Field, field_validator

from stages.described import Described
from stages.errors import UserError
from stages.home import expanded
from stages.sources.credentials import check_options, check_url
from stages.store import Store, open_store

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet"]


def default_home() -> Path:
    """The user's data directory for regrow: `$XDG_DATA_HOME/regrow`, else `~/.local/share/regrow`."""
    data = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(data) / "regrow"


def cores() -> int:
    """Processes that share the machine, one a core and 16 at most: more readers of one disk do not read faster."""
    return min(all_cores(), 16)


def all_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class Runtime(Described):
    """Where a run happens and how it uses the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)  # no clock can wait for ever

    store: str = Field(default_factory=lambda: str(default_home() / "store"))
    """The artifact store: a folder, or any fsspec URL such as `s3://bucket/prefix`."""
    storage_options: dict[str, str] = Field(default_factory=dict)
    """Extra options for the store's file system, e.g. `endpoint_url`. Credentials belong in the environment; here a
    variable may be named: `secret: env:NAME`."""
    cache: Path = Field(default_factory=lambda: default_home() / "cache")
    """Local folder for views of artifacts, digests of local files, and scratch that outlives attempts."""
    cache_limit: ByteSize | Literal["auto"] = "auto"
    """Bytes (or `200GB`) of copies in the cache of what a store elsewhere holds; the least recently used go first, and
    what a run is using never. Auto: half of the disk."""
    read_only: bool = False
    """Write nothing into the store: what it holds is used, and what would have to be made is an error."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where training, merging and evaluating compute."""
    workers: int = Field(default_factory=cores, ge=1)
    """Processes that work on a mapped stage's parts at once; by default one a core, 16 at most."""
    ranks: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes that train together, one a device; auto: as many as there are CUDA devices, or one."""
    shard: Literal["none", "fsdp", "zero2", "zero3"] = "none"
    """How ranks hold the model: each all of it, or each a part of weights, gradients and optimizer (fsdp: PyTorch's
    `fully_shard`; zero3: DeepSpeed's ZeRO), or of gradients and optimizer alone (zero2)."""
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Packed sequences per forward pass (the global batch is recipe); auto: as many as help and fit into memory."""
    activation_checkpointing: Literal["auto", "none", "selective", "full", "offloaded"] = "auto"
    """Recompute activations in the backward pass, for less memory: those that cost little arithmetic (selective), all
    but each layer's input (full: about a fifth slower), or all, with the inputs in the machine's memory (offloaded);
    auto: as little of it as memory allows."""
    attention: Literal["auto", "torch", "flash"] = "auto"
    """The attention kernel on a GPU: torch's own, flash-attn's (the newest that runs there; an error where none is
    installed), or auto, the fastest that is there: flash-attn 3 or 4, regrow's own on Hopper, flash-attn 2, torch's."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Compile the decoder layers before training: auto does on a GPU, when training is long enough to win back the
    minute that it takes."""
    deterministic: bool = False
    """Only operations that repeat to the last bit; on a GPU slower, and an error where there is none."""
    save_seconds: float = Field(default=600.0, gt=0)
    """Seconds between training checkpoints."""
    grace_seconds: float = Field(default=30.0, gt=0)
    """Seconds between SIGTERM, a spot machine's warning, and the end: a checkpoint that took longer to write is not
    begun in them."""
    silence_seconds: float | None = Field(default=1800.0, gt=0)
    """A stage that shows no sign of life for so many seconds hangs: it prints its stacks and is ended. Null: never."""
    trackers: tuple[Tracker, ...] | None = None
    """Where a training's figures go besides `metrics.jsonl`; by default TensorBoard, if it is installed. As a variable,
    names with commas between."""
    vllm_url: str = "http://localhost:8000"
    """Where the server is that writes completions for `vllm: {mode: server}`."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """The device's dense bfloat16 TFLOP/s, for the model FLOP utilisation, where regrow does not know the card."""
    eval_batch: int = Field(default=32, ge=1)
    """Items per forward pass while evaluating."""
    lease_seconds: float = Field(default=60.0, gt=0)
    """Life of a stage's lease without renewal, in seconds."""
    allow_code: bool = False
    """Whether a recipe may bring Python of its own, such as a dataset format: it runs with your rights."""

    @field_validator("cache", mode="before")
    @classmethod
    def _in_the_home(cls, value: Any) -> Any:
        if value == "":  # of which a path would be the working folder
            raise ValueError("names no folder; name one, or leave it out")
        return expanded(value, "cache") if isinstance(value, str | Path) else value

    @field_validator("storage_options")
    @classmethod
    def _by_reference(cls, value: dict[str, str]) -> dict[str, str]:
        # Whoever sees a dashboard sees the parameters of its runs, and these are among them.
        check_options(value)
        return value

    @field_validator("vllm_url")
    @classmethod
    def _without_secrets(cls, value: str) -> str:
        check_url(value, "vllm_url", "nothing: the server is asked without one")
        return value

    @property
    def cache_bytes(self) -> int:
        """The cache's limit in bytes."""
        if self.cache_limit != "auto":
            return int(self.cache_limit)
        there = next(place for place in (self.cache.absolute(), *self.cache.absolute().parents) if place.exists())
        return shutil.disk_usage(there).total // 2

    def options_for(self, place: str) -> dict[str, str]:
        """The storage options as far as they are meant for another place: one that the store's service serves, or any
        where the store is a folder, which needs none. Elsewhere a key or an address of the store has no business."""
        service = next((s for s in ("s3://", "az://", "gs://") if self.store.startswith(s)), "")
        return self.storage_options if place.startswith(service) else {}

    @field_validator("trackers", mode="before")
    @classmethod
    def _names_with_commas(cls, value: Any) -> Any:
        return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value


def from_environment(settings: Mapping[str, Any] | None = None) -> Runtime:
    """The runtime from `settings` (flags and file, already merged) over `REGROW_*` variables over defaults.

    Raises pydantic's ValidationError when a value does not fit its field, and UserError for a variable that is almost
    one of ours, which would otherwise change nothing and say nothing.
    """
    known = {f"REGROW_{name.upper()}": name for name in Runtime.model_fields}
    for variable in os.environ:
        ours = variable.startswith("REGROW_") and variable not in known
        if ours and (meant := difflib.get_close_matches(variable, known, n=1, cutoff=0.9)):
            raise UserError(f"the variable {variable} is read by nothing: did you mean {meant[0]}?")
    found = {name: os.environ[variable] for variable, name in known.items() if variable in os.environ}
    if "storage_options" in found:
        raise UserError(
            "REGROW_STORAGE_OPTIONS is read by nothing: `storage_options` is a mapping; write it into a file for "
            "--runtime, or set the service's own variables, such as AWS_ENDPOINT_URL"
        )
    return Runtime.model_validate({**found, **(settings or {})})


def store_of(runtime: Runtime, *, reached: bool = False) -> Store:
    """The store that the runtime names. `reached` and errors as in `stages.store.open_store`."""
    options, limit = runtime.storage_options, runtime.cache_bytes
    return open_store(
        runtime.store, runtime.cache, options, cache_limit=limit, read_only=runtime.read_only, reached=reached
    )
