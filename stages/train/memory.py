"""The memory plan: how many packed sequences a forward pass takes and which activations are recomputed, chosen before
training from what a step will hold.

    plan = choose(costs, room, wanted…)        # raises UserError with the nearest plan that fits

What a step holds is the weights, their gradients, the optimizer's state, what the forward pass keeps for the backward
pass, and what kernels work in. All but the last are counted, not guessed: the loaded model's own tensors, and the
tensors that autograd keeps (`torch.autograd.graph.saved_tensors_hooks`) in a forward pass over a few tokens, from which
the cost of a token follows. So adapters, quantized weights and fused kernels count as what they are, and so does each
way to recompute activations (`stages.train.recomputing`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from stages import loss_head
from stages.errors import UserError
from stages.train import adamw, optimizers, recomputing, sharding
from stages.train.recomputing import MODES, Mode

HEADROOM = 0.92
"""Share of the free memory that a plan may fill: fragments, and what other libraries take."""
ENOUGH_TOKENS = 32_768
"""Tokens a forward pass from which on more of them bring a GPU nothing."""
COPIES = 3
"""Times what a head of several steps keeps of a row that its passes hold at their highest: copies, and gradients.
Counted by reading, not measured on a GPU."""
RECOMPUTED = 1.5
"""A recomputed layer also holds its gradients: times what it keeps forward."""

TRIED = 64, 192, 320
"""Tokens of the forward passes, evenly apart, that tell what a token costs."""
FEW = 16
"""Of these train, or logits of few rows, which may all be kept, would count for every token."""
CURVED = 0.01
"""By so much of itself the cost of a token grows from pass to pass where attention keeps what each token sees."""

Choice = Literal["auto"]


@dataclass(frozen=True)
class Costs:
    """Bytes that training holds on one rank."""

    weights: int
    gradients: int
    optimizer: int
    token: Mapping[Mode, float]
    """What is held of one token, all layers together, for each way to recompute activations that the model takes: what
    the forward pass keeps, and one layer whole while its gradients are computed."""
    work: int
    """Logits of a chunk, weights cast to the precision, and the like, whatever the number of tokens."""
    wider: int = 0
    """More for gradients that are added up in float32, as those of many passes are."""

    @property
    def static(self) -> int:
        """What does not depend on the batch."""
        return self.weights + self.gradients + self.optimizer + self.work

    @property
    def least(self) -> Mode:
        """The mode that holds least without going to another memory."""
        return "full" if "full" in self.token else "none"

    def total(self, tokens: int, recompute: Mode) -> int:
        """At most, with so many tokens a forward pass."""
        return self.static + math.ceil(tokens * self.token[recompute])


ACTIVATIONS: Mapping[Mode, str] = {
    "none": "kept",
    "selective": "kept where they are costly, else recomputed",
    "full": "recomputed",
    "offloaded": "recomputed from inputs in the machine's memory",
}


@dataclass(frozen=True)
class Plan:
    """What was chosen, and what it is expected to take."""

    micro_batch: int
    activation_checkpointing: Mode
    expected_bytes: int
    room_bytes: int
    costs: Costs
    wide_sums: bool = False
    """Whether gradients are to be added up in float32, because they are of many passes."""
    rough_sums: bool = False
    """Whether they should be, and there is no room."""

    def __str__(self) -> str:
        kept = ACTIVATIONS[self.activation_checkpointing]
        batch = self.expected_bytes - self.costs.static - (self.costs.wider if self.wide_sums else 0)
        rough = "; gradients of so many passes lose accuracy in 16 bits, and float32 has no room"
        return (
            f"memory plan: micro-batch {self.micro_batch}, activations {kept}: about {_gb(self.expected_bytes)} of "
            f"{_gb(self.room_bytes)} GB ({_parts(self.costs)}, activations {_gb(batch)})"
            f"{rough if self.rough_sums else ''}"
        )

    def record(self) -> dict[str, Any]:
        """For the facts."""
        return asdict(self)


def choose(
    costs: Costs,
    room: int,
    sequence_length: int,
    sequences: int,
    micro_batch: int | Choice,
    recompute: Mode | Choice,
    device: str,
    nearest: Callable[[], str] = lambda: "",
) -> Plan:
    """The plan to train `sequences` packed sequences a step and rank with, within `room` bytes.

    As little recomputing as possible comes first (full costs a fifth of the speed), then as many sequences at once as
    help: on a CPU one. Where either is given, it stays. Gradients of many passes are added up in float32 if there is
    any way to. Raises UserError when nothing fits, with `nearest` said.
    """
    most = sequences if device == "cuda" else 1
    most = max(1, min(most, ENOUGH_TOKENS // sequence_length))
    batches = [micro_batch] if micro_batch != "auto" else _evenly(sequences, most)
    modes = [mode for mode in MODES if mode in costs.token and mode != "offloaded"]
    for exact in (True, False):
        for mode in [recompute] if recompute != "auto" else modes:
            for batch in batches:
                many = -(-sequences // batch) > adamw.MOST_NARROW
                expected = costs.total(batch * sequence_length, mode) + (costs.wider if many and exact else 0)
                if expected <= room * HEADROOM:
                    return Plan(batch, mode, expected, room, costs, many and exact, many and not exact)
    smallest = costs.least if recompute == "auto" else recompute
    least = costs.total(batches[-1] * sequence_length, smallest)
    raise UserError(
        f"train needs about {_gb(least)} GB at least ({_parts(costs)}) with micro-batch {batches[-1]} and sequences of "
        f"{sequence_length:,} tokens, activations {ACTIVATIONS[smallest]}, and the device has "
        f"{_gb(int(room * HEADROOM))} GB to give{nearest()}"
    )


def nearest(
    costs: Costs, room: int, sequence_length: int, method: str, base_bytes: int, ranks: int, shard: str, device: str
) -> str:
    """What would fit, in words: recomputed activations, a shorter sequence, an adapter, more ranks."""
    room = int(room * HEADROOM)
    found = []
    token = costs.token[costs.least]
    if costs.total(sequence_length, costs.least) <= room:
        found.append("micro_batch and activation_checkpointing left at auto")
    elif device == "cuda" and "offloaded" in costs.token and costs.total(sequence_length, "offloaded") <= room:
        found.append("the runtime's activation_checkpointing: offloaded")
    elif costs.static < room:
        fits = int((room - costs.static) / token) // 256 * 256
        if fits >= 256:
            found.append(f"pack.sequence_length {fits}")
    adapter = base_bytes + costs.work + int(token * sequence_length)
    if method == "full" and adapter * 1.05 <= room:
        found.append(f"train.method lora (about {_gb(adapter)} GB)")
    if device == "cuda" and shard == "none":
        shared = costs.weights + costs.gradients + costs.optimizer
        left = room - costs.work - int(token * sequence_length)
        if left > 0:
            found.append(f"{max(2, ranks, -(-shared // left))} ranks with the runtime's shard: fsdp")
    return f"; the nearest that fits: {', or '.join(found)}" if found else "; a smaller model is the nearest that fits"


def smaller(micro_batch: int, recompute: Mode, least: Mode) -> tuple[int, Mode] | None:
    """The next smaller plan after one that ran out of memory, if there is one; `least` is the mode that holds least."""
    if micro_batch > 1:
        return micro_batch // 2, recompute
    return None if recompute in (least, "offloaded") else (1, least)


def measure(
    model: Any,
    forward: Callable[[int, int], torch.Tensor],
    optimizer: str,
    precision: str,
    ranks: int,
    shard: str = "none",
    longest: int = 0,
    averaged: bool = False,
) -> Costs:
    """What training `model` costs each of `ranks` that hold it as `shard` says (`stages.runtime`).

    `forward(tokens, trained)` runs the loss on two documents with so many tokens in all, of which about so many train,
    and returns it. `longest` is how many tokens the longest document has, for attention that keeps a number for each
    two of them; `averaged` is whether an average of the weights is kept.
    """
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    weights = sum(_bytes(p) for p in parameters) + sum(_bytes(b) for b in model.buffers())
    fixed, token = _of_tokens(model, forward, "none", longest)
    text = model.config.get_text_config()
    computed = 4 if precision == "fp32" else 2
    layer = token / text.num_hidden_layers
    row = (_kept(model, forward, TRIED[0], TRIED[0], "none") - _kept(model, forward, TRIED[0], FEW, "none")) / (
        TRIED[0] - FEW
    )
    trained_token = min(max(row, 0.0), 2 * text.hidden_size * computed)  # the gradient of what goes into the head
    tokens: dict[Mode, float] = {"none": token + 2 * layer + trained_token}
    for mode in MODES[1:] if recomputing.layers(model) else ():
        _, kept = _of_tokens(model, forward, mode, longest)
        inputs = 4 * text.hidden_size * computed
        tokens[mode] = min(kept + RECOMPUTED * layer + inputs + trained_token, tokens["none"])
    if parameters[0].device.type == "cpu" and "full" in tokens:  # inputs put aside lie in the same memory
        tokens["offloaded"] = tokens["full"]
    if shard == "fsdp" and sharding.gathered_dtype(model, precision):
        # The passes above kept weights as autocast cast them, which gathered ones need not be.
        cast = sum(2 * p.numel() for p in parameters if p.dtype == torch.float32 and p.ndim > 1)
        fixed = max(fixed - cast, 0) + sharding.gathered_bytes(model)
    logits = loss_head.CHUNK * int(max(text.vocab_size * (computed + 4), COPIES * row))
    numbers = sum(p.numel() for p in trained)
    embedded = {id(p) for p in optimizers.embedding_parameters(model)}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    state = sum(_state_bytes(p, optimizer, id(p) in embedded, id(p) in tables) for p in trained)
    state += 4 * numbers if averaged else 0
    gradients = sum(_bytes(p) for p in trained)
    wider = 4 * numbers - gradients if shard == "none" else 0
    if shard == "fsdp":  # added up over ranks in what the weights' parts are kept in
        gradients = 4 * numbers
    parts = ranks if shard != "none" else 1
    updated = gradients // parts if shard.startswith("zero") else 0  # DeepSpeed updates a copy of a rank's own part
    return Costs(
        (weights if shard == "zero2" else weights // parts) + updated,
        gradients // parts,
        int(state) // parts,
        tokens,
        logits + fixed,
        wider,
    )


def _of_tokens(model: Any, forward: Callable[[int, int], torch.Tensor], mode: Mode, longest: int) -> tuple[int, float]:
    """Bytes that a forward pass keeps whatever the tokens, such as scales of 4-bit weights, and for each token of a
    document of `longest`."""
    few, more, many = (_kept(model, forward, tokens, FEW, mode) for tokens in TRIED)
    apart = TRIED[1] - TRIED[0]
    slope, next_slope = (more - few) / apart, (many - more) / apart
    # What is kept of T tokens in two documents is f + s T + p T^2 / 2, with p for each two tokens of one document.
    pair = (next_slope - slope) / apart if next_slope > (1 + CURVED) * slope else 0.0
    single = slope - pair * (TRIED[0] + TRIED[1]) / 2
    fixed = few - single * TRIED[0] - pair * TRIED[0] ** 2 / 2
    return max(int(fixed), 0), max(single, 0.0) + pair * longest


def _kept(model: Any, forward: Callable[[int, int], torch.Tensor], tokens: int, trained: int, mode: Mode) -> int:
    """Bytes that are kept of a forward pass for the backward pass, weights aside; a storage counts once."""
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> None:
        # Nothing of the tensor is given to autograd: its graph would hold what holds the graph, and so all weights,
        # until the process ends.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage

    training = model.training
    model.train()
    try:
        with (
            recomputing.counting(model, mode) as aside,
            torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed),
        ):
            loss = forward(tokens, trained)
            kept = sum(storage.nbytes() for storage in seen.values()) + aside()
    finally:
        model.train(training)
    del loss
    return kept


def _state_bytes(parameter: torch.nn.Parameter, optimizer: str, embedded: bool, table: bool) -> float:
    """Of an optimizer's state for one parameter on the device: two float32 averages unless its name says less, and what
    a narrow weight leaves to be kept beside it. Some keep more for what is `embedded`, which are embeddings and head,
    or for embeddings, a `table`, alone."""
    narrow = 2 if parameter.dtype in (torch.bfloat16, torch.float16) else 0
    numbers = parameter.numel()
    if optimizer.startswith("paged") and numbers >= PAGED_FROM:
        return numbers * narrow
    if optimizer in ("muon", "galore_adamw", "apollo_adamw") and (embedded or parameter.ndim != 2):  # AdamW's
        return numbers * (8 + narrow)
    if table and optimizers.find(optimizer).fixed.get("optim_bits") == 8:  # as without `_8bit`
        optimizer = optimizer.removesuffix("_8bit")
    for part, each in STATE_BYTES.items():
        if part in optimizer:
            return numbers * (each + narrow)
    return numbers * (8 + narrow)


PAGED_FROM = 100_000
"""Numbers of a weight from which on bitsandbytes keeps a paged optimizer's state where it can move to the CPU."""
STATE_BYTES: Mapping[str, float] = {
    "ademamix_8bit": 3.2,
    "ademamix": 12,
    "8bit": 2.1,
    "4bit": 1.1,
    "16bit": 4,
    "adafactor": 0.1,
    "galore": 2,
    "apollo": 2,
    "lion": 4,
    "muon": 4,
    "sgd": 4,
}
"""Bytes of state a weight, by a part of the optimizer's name; the first that fits counts."""


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def room(device: str) -> int:
    """Bytes that this process may fill on its device, what it holds there already included."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved()
    return free_memory()


def free_memory(proc: Path = Path("/proc"), group: Path = Path("/sys/fs/cgroup")) -> int:
    """Of the machine, and within this process's control group, which a container sets; with what this process holds.

    Pages that only repeat files, such as a model that was just copied, are given up when others need them, so they are
    free, mapped or not. Of this process that leaves its own pages to be added.
    """
    found = [1 << 62]
    if (path := proc / "meminfo").exists():
        found.append(_number(path, "MemAvailable"))
    limit = group / "memory.max"
    if limit.exists() and (told := limit.read_text().strip()) != "max":
        files = sum(_number(group / "memory.stat", name) for name in ("inactive_file", "active_file"))
        found.append(int(told) - int((group / "memory.current").read_text()) + files)
    held = _number(status, "RssAnon") if (status := proc / "self/status").exists() else 0
    return min(found) + held


def _number(path: Path, name: str) -> int:
    """What the kernel says under a name, as `RssAnon:  1024 kB` or as `active_file 1048576`, in bytes; 0 if nothing."""
    for line in path.read_text().splitlines():
        words = line.replace(":", " ").split()
        if words[:1] == [name]:
            return int(words[1]) * (1024 if words[2:] == ["kB"] else 1)
    return 0


def _evenly(sequences: int, most: int) -> list[int]:
    """Micro-batches that split a rank's sequences into equal passes, largest first: 6, 4, 3, 2, 1 for 12 and 8."""
    return sorted({-(-sequences // passes) for passes in range(-(-sequences // most), sequences + 1)}, reverse=True)


def _parts(costs: Costs) -> str:
    parts = {"weights": costs.weights, "gradients": costs.gradients, "optimizer": costs.optimizer, "loss": costs.work}
    return ", ".join(f"{name} {_gb(size)}" for name, size in parts.items())


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}"
