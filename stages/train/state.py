"""What a checkpoint of a training holds, in a form that any number of ranks can go on from.

    weights.safetensors   the trained weights, whole: in float32 also where training holds them split (`adamw`)
    optimizer.pt          the optimizer's state, whole; read without pickle's code
    scheduler.pt
    trainer_state.json    the position, and the figures of every step so far
    training.json         whose training it is, and the steps it left out

Random state is not among them: what a step draws is seeded by its position (`data.Steps`), on every rank.
"""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from stages.errors import UserError
from stages.train import adamw, optimizers, zero
from stages.train.over_split import as_float32

WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"
TRAINING = "training.json"

Tensors = dict[str, torch.Tensor]


def identity(config: Any, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Whose training it is: the recipe section, and digests that tell one plan and one model from another."""
    described = {"plan": inputs["plan"] / "plan.json", "model": inputs["model"] / "config.json"}
    read = {name: path.read_bytes() for name, path in described.items() if path.exists()}
    bins = hashlib.sha256()
    with (inputs["plan"] / "bins.arrow").open("rb") as file:
        while chunk := file.read(1 << 20):
            bins.update(chunk)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in read.items()}
    return {"config": config.model_dump(mode="json"), "bins": bins.hexdigest(), **digests}


def refuse_foreign(checkpoint: Path, own: Mapping[str, Any]) -> None:
    """Raise UserError when a checkpoint was written by another recipe, over another plan or model."""
    theirs = json.loads((checkpoint / TRAINING).read_text())["identity"]
    if theirs == own:
        return
    names = sorted({*theirs["config"], *own["config"]})
    pairs = [(name, theirs["config"].get(name), own["config"].get(name)) for name in names]
    changed = [f"train.{name} {old!r} → {new!r}" for name, old, new in pairs if old != new]
    changed += [f"another {name}" for name in ("plan", "bins", "model") if theirs.get(name) != own.get(name)]
    raise UserError(
        f"{checkpoint} was written by another recipe ({', '.join(changed)}): remove that folder to start afresh, or "
        "run the recipe that it belongs to"
    )


def left_out(checkpoint: Path | None) -> list[int]:
    """The positions that a training had left out when it wrote a checkpoint."""
    return json.loads((checkpoint / TRAINING).read_text())["left_out"] if checkpoint else []


def whole(tensor: torch.Tensor, keep: bool) -> torch.Tensor:
    """A tensor's copy in the CPU's memory, gathered where it is sharded; empty if not to `keep`. All ranks call it."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    elif hasattr(tensor, "ds_id"):
        tensor = zero.whole(tensor)
    return adamw.whole_on_cpu(tensor) if keep else torch.empty(0)


def weights_of(model: torch.nn.Module, keep: bool) -> Tensors:
    """Every trained weight by name. All ranks call it."""
    return {name: whole(p, keep).contiguous() for name, p in model.named_parameters() if p.requires_grad}


def state_of(holder: Any, keep: bool) -> Any:
    """An optimizer's or scheduler's state with all tensors whole. All ranks call it."""
    return _mapped(holder.state_dict(), lambda tensor: whole(tensor, keep))


def load_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """Put a checkpoint's weights into a model that is not sharded yet. Raises UserError when they do not fit."""
    put_weights(model, load_file(checkpoint / WEIGHTS))


def put_weights(model: torch.nn.Module, saved: Tensors) -> None:
    """Put all trained weights into a model. Raises UserError when they do not fit."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if saved.keys() != own.keys() or any(saved[name].shape != own[name].shape for name in own):
        odd = sorted(saved.keys() ^ own.keys()) or [name for name in own if saved[name].shape != own[name].shape]
        raise UserError(f"the checkpoint holds other weights than this training ({odd[0]}): remove its folder")
    halves = [name for name in own if saved[name].dtype == torch.bfloat16 and own[name].dtype == torch.float32]
    if halves:  # the other 16 bits are in the optimizer's state, by which nothing here could find them
        raise UserError(
            f"the checkpoint holds only 16 bits of each weight ({halves[0]}), as an earlier version of regrow wrote it "
            "from one rank in bf16: go on on such a machine and without sharding, or remove its folder"
        )
    for name, parameter in own.items():
        adamw.put(parameter, saved[name])


def load_optimizer(optimizer: Any, checkpoint: Path) -> None:
    """Put a checkpoint's state into an optimizer, cut as its parameters are."""
    saved = torch.load(checkpoint / OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
    for part, held in zip(optimizers.parts_of(optimizer), saved.get("parts", [saved]), strict=True):
        parameters = [p for group in part.param_groups for p in group["params"]]
        held["state"] = {number: _fitted(state, parameters[number]) for number, state in held["state"].items()}
        # AdamW over split weights and torch's know the same of a weight, but not the same settings.
        held["param_groups"] = [
            {**own, **saved} for own, saved in zip(_settings(part), held["param_groups"], strict=True)
        ]
    paged = optimizers.parts_of(optimizer)[0]
    if getattr(paged, "is_paged", False):
        with as_float32([p for group in paged.param_groups for p in group["params"]]):
            paged.load_state_dict(saved, move_to_device=False)
            _page(paged)
    else:
        optimizer.load_state_dict(saved)


def _page(optimizer: Any) -> None:
    """Put loaded state where it can move between GPU and CPU, one weight's after the other: bitsandbytes would put all
    of it on the GPU, which need not have the room, and leave it there."""
    loaded = dict(optimizer.state)
    optimizer.state.clear()
    optimizer.check_overrides()
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if parameter in loaded:
                optimizer.init_state(group, parameter, number, place)
                state = optimizer.state[parameter]
                for name, value in loaded[parameter].items():
                    if isinstance(value, torch.Tensor):
                        state[name].copy_(value)
                    else:
                        state[name] = value


def _settings(optimizer: Any) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def _fitted(state: dict[str, Any], like: torch.Tensor) -> dict[str, Any]:
    """A weight's state, cut as it is; a projection on its device, where an optimizer puts tensors alone."""
    fitted: dict[str, Any] = _mapped(state, lambda tensor: _cut(tensor, like))
    if "projector" in fitted:
        fitted["projector"] = _mapped(fitted["projector"], lambda tensor: tensor.to(like.device))
    return fitted


def _cut(tensor: torch.Tensor, like: Any) -> torch.Tensor:
    if not hasattr(like, "device_mesh") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    cut: torch.Tensor = distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return cut


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(each, change) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(each, change) for each in value)
    if hasattr(value, "ortho_matrix"):  # a projection of GaLore's or APOLLO's, which they renew while they train
        changed = copy.copy(value)
        changed.ortho_matrix = _mapped(value.ortho_matrix, change)
        return changed
    return value


def size(parts: Sequence[Any]) -> int:
    """Bytes of all tensors in some nested state."""
    total = 0

    def add(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    _mapped(list(parts), add)
    return total


def load_extra(holder: Any, name: str, checkpoint: Path) -> None:
    """Put what a checkpoint holds under a name of `PackedTrainer.extra` into its holder."""
    path = checkpoint / f"{name}.pt"
    if path.exists() or name != "scaler":  # which earlier versions did not write: it starts anew
        holder.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


def write(
    folder: Path,
    weights: Tensors,
    optimizer: Any,
    scheduler: Any,
    trainer: str,
    training: Any,
    extra: Mapping[str, Any],
) -> None:
    """Write a checkpoint's files. Raises OSError or RuntimeError when the disk is full."""
    folder.mkdir(parents=True)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    torch.save(optimizer, folder / OPTIMIZER)
    torch.save(scheduler, folder / SCHEDULER)
    for name, held in extra.items():
        torch.save(held, folder / f"{name}.pt")
    (folder / "trainer_state.json").write_text(trainer)
    (folder / TRAINING).write_text(json.dumps(training, sort_keys=True))
