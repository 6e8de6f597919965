"""Where a training's figures go besides `metrics.jsonl`: by transformers' callbacks, through each tracker's library.

TensorBoard's files stand in the cache's `tensorboard/<key>`; the others take their project and credentials from their
own environment variables (`WANDB_PROJECT`, `MLFLOW_TRACKING_URI`, …).
"""

import os
from importlib.util import find_spec
from pathlib import Path

from stages.errors import UserError
from stages.runtime import Runtime, Tracker

LIBRARIES: dict[Tracker, tuple[str, str]] = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
    "trackio": ("trackio", "trackio"),
    "comet": ("comet_ml", "comet_ml"),
}
"""The module of each, and transformers' name for it."""


def chosen(runtime: Runtime, key: str) -> tuple[str, ...]:
    """The trackers of a run by transformers' names; TensorBoard if it is installed and none is asked for.

    Raises UserError naming the extra when one that is asked for is not installed.
    """
    wanted: tuple[Tracker, ...] = runtime.trackers if runtime.trackers is not None else ("tensorboard",)
    names = []
    for tracker in wanted:
        module, name = LIBRARIES[tracker]
        if find_spec(module) is not None:
            names.append(name)
        elif runtime.trackers is not None:
            raise UserError(
                f"the runtime asks for the tracker {tracker}, and it is not installed: pip install 'regrow[{tracker}]'"
            )
    if "tensorboard" in names:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder(runtime, key)))
    return tuple(names)


def folder(runtime: Runtime, key: str) -> Path:
    """Where TensorBoard's files of a run stand."""
    return runtime.cache / "tensorboard" / key[:12]
