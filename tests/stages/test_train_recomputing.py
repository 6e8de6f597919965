"""Recomputing activations changes no gradient, holds less, and the memory plan knows how much."""

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages import objectives
from stages.runtime import Runtime
from stages.stage import Work
from stages.train import STAGE, TrainConfig, memory, model, recomputing, speed
from stages.train.recomputing import MODES, recompute
from tests.stages import tiny
from tests.stages.test_train_architectures import TRAINED

NAMES = ["Llama", "Gemma2", "Qwen3Moe", "GptOss", "DeepseekV3", "Granite", "Phi3", "Cohere2", "Gemma4Text"]
DEFAULT = ("Llama", "Qwen3Moe")


def prepared(folder: Path, config: TrainConfig) -> Any:
    """A model as a training holds it."""
    torch.set_num_threads(1)
    made = model.ready(model.load(folder, config, "cpu", True), config, folder, "cpu", lambda: [])
    speed.hold(made, config)
    return made


def forward_of(made: Any, config: TrainConfig, inputs: dict[str, Path]) -> Callable[..., Tensor]:
    """The loss on so many tokens, as planning computes it."""
    from stages.train.data import open_bins
    from stages.train.samples import one_document, two_documents

    bins, objective = open_bins(inputs), objectives.find("sft")
    with speed.autocast(made, config, "cpu"):
        loss = objective.loss(made, objectives.options_of("sft", {}), one_document(bins[0]))

    def forward(tokens: int, trained: int | None = None) -> Tensor:
        with speed.autocast(made, config, "cpu"):
            return loss(objective.prepare(two_documents(bins[0], tokens, trained)))["loss"]

    return forward


def gradients(made: Any, forward: Callable[[int], Tensor], mode: recomputing.Mode) -> list[Tensor]:
    made.train()
    recompute(made, mode)
    torch.manual_seed(3)
    weights = [p for p in made.parameters() if p.requires_grad]
    return list(torch.autograd.grad(forward(96), weights, materialize_grads=True))


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.full) for n in NAMES])
def test_every_gradient_has_the_same_bits(tmp_path: Path, name: str, method: str) -> None:
    folder = tiny.save(tmp_path / "model", f"{name}Config", dtype="bfloat16", **TRAINED[name])
    inputs = tiny.plan(tmp_path, tiny.documents(8))
    dropout = 0.1 if (name, method) == ("Granite", "lora") else 0.0
    config = TrainConfig.model_validate({"method": method, "lora": {"dropout": dropout}})
    made = prepared(folder, config)
    forward = forward_of(made, config, inputs)
    expected = gradients(made, forward, "none")
    assert any(bool(each.any()) for each in expected)
    for mode in MODES[1:]:
        if mode == "selective" and not recomputing.works(made, mode, forward):
            assert name == "GptOss", "which adds the biases of its experts in place"
            continue
        assert all(map(torch.equal, gradients(made, forward, mode), expected)), mode


class Alive(TorchDispatchMode):
    """Bytes of all tensors made in a block that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def gone(self, which: int, size: int) -> None:
        self.known.discard(which)
        self.now -= size


@pytest.mark.full
@pytest.mark.parametrize(("method", "kind"), [("lora", "Llama"), ("full", "Llama"), ("full", "Gemma2")])
def test_each_mode_holds_less_and_what_the_plan_says(tmp_path: Path, method: str, kind: str) -> None:
    """The oracle is a count of all that is alive at once, at its highest in a forward and backward pass. Attention with
    capped scores keeps them, so there a token costs more the longer its document."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8, "head_dim": 32}
    folder = tiny.save(tmp_path / "model", f"{kind}Config", dtype="bfloat16", max_position_embeddings=2048, **sizes)
    inputs = tiny.plan(tmp_path, tiny.documents(8))
    config = TrainConfig.model_validate({"method": method})
    made = prepared(folder, config)
    forward = forward_of(made, config, inputs)
    costs = memory.measure(made, forward, config.optimizer, config.precision, 1, longest=512)
    assert costs.token["none"] > 1.2 * costs.token["selective"] > 1.5 * costs.token["full"]
    weights = [p for p in made.parameters() if p.requires_grad]
    tokens, found = 1024, {}
    for mode in ("none", "selective", "full"):
        made.train()
        recompute(made, mode)
        with Alive() as alive:
            torch.autograd.grad(forward(tokens), weights, materialize_grads=True)
        found[mode] = alive.most
    for one, other in (("none", "selective"), ("selective", "full")):
        counted = tokens * (costs.token[one] - costs.token[other])
        assert found[one] - found[other] == pytest.approx(counted, rel=0.3), (one, other, found)


def test_auto_recomputes_as_little_as_memory_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"model": tiny.llama(tmp_path / "model"), **tiny.plan(tmp_path, tiny.documents(8))}
    config = TrainConfig.model_validate({"max_steps": 1})

    def plan(folder: Path) -> Any:
        (folder / "output").mkdir(parents=True)
        work = Work(folder / "work", Runtime(device="cpu"))
        facts: Any = STAGE.run(config, inputs, folder / "output", work)
        return facts["memory_plan"]

    found = plan(tmp_path / "plenty")
    assert found["activation_checkpointing"] == "none"
    costs = memory.Costs(**found["costs"])
    for mode in ("selective", "full"):
        room = int(costs.total(64, mode) / memory.HEADROOM) + 1
        monkeypatch.setattr(memory, "room", lambda device, room=room: room)
        assert plan(tmp_path / mode)["activation_checkpointing"] == mode


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_mode_that_gives_other_gradients_is_noticed(tmp_path: Path, method: str) -> None:
    config = TrainConfig.model_validate({"method": method, "precision": "fp32"})
    folder = tiny.llama(tmp_path / "model")
    made = prepared(folder, config)
    forward = forward_of(made, config, {"model": folder, **tiny.plan(tmp_path, tiny.documents(8))})
    assert recomputing.works(made, "selective", forward)
    calls: list[int] = []

    def other(tokens: int) -> Tensor:
        calls.append(tokens)
        return forward(tokens) * (1.1 if len(calls) > 1 else 1.0)

    assert not recomputing.works(made, "selective", other)


def test_a_model_that_changes_what_was_kept_is_told_by_name(tmp_path: Path) -> None:
    from stages.errors import UserError

    folder = tiny.save(tmp_path / "model", "GptOssConfig", **TRAINED["GptOss"])
    inputs = {"model": folder, **tiny.plan(tmp_path, tiny.documents(8))}
    (tmp_path / "output").mkdir()
    work = Work(tmp_path / "work", Runtime(device="cpu", activation_checkpointing="selective"))
    with pytest.raises(UserError, match=r"gpt_oss changes results in place .* activation_checkpointing to full"):
        STAGE.run(TrainConfig.model_validate({"max_steps": 1}), inputs, tmp_path / "output", work)


@pytest.mark.full
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_compiled_layers_recompute_within_their_graphs(tmp_path: Path, mode: recomputing.Mode) -> None:
    from torch._dynamo.utils import counters
    from transformers import AutoModelForCausalLM

    torch._dynamo.reset()
    counters.clear()
    folder = tiny.save(tmp_path / "model", "LlamaConfig", num_hidden_layers=4)
    made: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").train()
    ids = torch.arange(96)[None] % 50

    def measured() -> tuple[list[Tensor], int]:
        held: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in (*made.parameters(), *made.buffers())}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = made(ids, labels=ids, use_cache=False).loss
        return list(torch.autograd.grad(loss, list(made.parameters()))), sum(held.values())

    expected, whole = measured()
    recompute(made, mode, compiled=True)
    assert speed.compile_layers(made) == 4
    found, held = measured()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], "all layers in one graph"
    assert held < whole * {"selective": 0.8, "full": 0.5}[mode]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("mode", "compiled"), [*((mode, False) for mode in MODES[1:]), ("selective", True), ("full", True)]
)
def test_gradients_stay_on_a_gpu_and_memory_falls(tmp_path: Path, mode: recomputing.Mode, compiled: bool) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "head_dim": 128}
    folder = tiny.save(tmp_path / "model", "LlamaConfig", dtype="bfloat16", max_position_embeddings=8192, **sizes)
    inputs = tiny.plan(tmp_path, tiny.documents(8))
    config = TrainConfig.model_validate({})
    made = model.ready(model.load(folder, config, "cuda", True), config, folder, "cuda", lambda: [])
    speed.hold(made, config)
    from stages.train.data import open_bins, to_device
    from stages.train.samples import one_document, two_documents

    bins, objective = open_bins(inputs), objectives.find("sft")
    loss = objective.loss(made, objectives.options_of("sft", {}), to_device(one_document(bins[0]), "cuda"))
    weights = [p for p in made.parameters() if p.requires_grad]
    found, peaks = [], []
    made.train()
    batch = to_device(objective.prepare(two_documents(bins[0], 4096)), "cuda")
    for each in ("none", mode):
        for layer in recomputing.layers(made):
            layer.__dict__.pop("forward", None)
        recompute(made, each, compiled)
        if compiled:
            speed.compile_layers(made)
        torch.autograd.grad(loss(batch)["loss"], weights)  # whatever is compiled, is compiled now
        torch.cuda.reset_peak_memory_stats()
        found.append(torch.autograd.grad(loss(batch)["loss"], weights))
        peaks.append(torch.cuda.max_memory_allocated())
    if compiled:  # other kernels round otherwise, and a random model makes much of it
        exact = exact_gradients(made, batch)
        errors = [sum(float((a - b).norm() ** 2) for a, b in zip(each, exact, strict=True)) for each in found]
        assert errors[1] < 1.5 * errors[0]
    else:
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=0.05, atol=0.05 * float(one.abs().max()))
    assert peaks[1] < peaks[0]


def exact_gradients(made: Any, batch: dict[str, Any]) -> list[Tensor]:
    """In float32, with nothing recomputed or compiled."""
    plain = copy.deepcopy(made).float()
    for layer in recomputing.layers(plain):
        layer.__dict__.pop("forward", None)
    recompute(plain, "none")
    loss = objectives.find("sft").loss(plain, objectives.options_of("sft", {}), batch)
    return list(torch.autograd.grad(loss(batch)["loss"], [p for p in plain.parameters() if p.requires_grad]))


def test_what_is_kept_names_our_own_operations_as_they_are_called() -> None:
    import packing.attention
    from stages.train import lora_attention, lora_linear, lora_mlp

    ours = [packing.attention.hopper.attention, packing.attention.flash.flash_attn_4]
    ours += [lora_linear.lora_linear, lora_attention.lora_qkv, lora_mlp.lora_mlp]
    assert {each._qualname for each in ours} == {name for name in recomputing.KEPT if name.startswith("regrow::")}
