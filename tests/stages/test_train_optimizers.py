"""Every optimizer by name: it learns, a checkpoint brings it back to the bit, and each group has its learning rate."""

import gc
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from stages.errors import UserError
from stages.train import TrainConfig, adapters, checks, freezing, memory, optimizers, state
from stages.train import model as model_of
from tests.stages import tiny

RATES = {"sgd": 0.5, "schedule_free_sgd": 1.0, "adagrad": 0.02}
"""Where 5e-3 does not suit: their steps are not scaled by the gradient's size, or fall with time."""
LOW_RANK = {"rank": 8, "update_proj_gap": 7}
"""So that a projection is renewed two steps after the checkpoint, and what it holds is the one from before."""
ON_GPU = [name for name, kind in optimizers.OPTIMIZERS.items() if kind.gpu]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Wide enough that bitsandbytes holds a matrix's state in 8 bits (4,096 weights or more).
    return tiny.llama(tmp_path_factory.mktemp("model"), hidden_size=64, intermediate_size=128, initializer_range=0.1)


def section(name: str, **changes: Any) -> TrainConfig:
    schedule = "constant" if name.startswith("schedule_free") else "cosine"
    return TrainConfig.model_validate(
        {
            "method": "full",
            "optimizer": name,
            "schedule": schedule,
            "learning_rate": RATES.get(name, 5e-3),
            "optimizer_options": LOW_RANK if optimizers.find(name).low_rank else {},
            **changes,
        }
    )


class Run:
    """A few steps of training on one batch."""

    def __init__(self, folder: Path, config: TrainConfig, device: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).to(device)
        self.optimizer = optimizers.make(self.model, config)
        self.ids = torch.tensor([tiny.documents(1)[0][:4] * 4], device=device)

    def steps(self, count: int) -> list[float]:
        found = []
        with optimizers.training(self.optimizer):
            for _ in range(count):
                self.optimizer.zero_grad()
                loss = self.model(self.ids, labels=self.ids).loss
                loss.backward()
                self.optimizer.step()
                found.append(loss.item())
        return found


def check(folder: Path, tmp_path: Path, name: str, device: str) -> None:
    config = section(name, weight_decay=0.1)
    first = Run(folder, config, device)
    losses = first.steps(12)
    assert losses[-1] < 0.75 * losses[0], losses
    copied = state.state_of(first.optimizer, keep=True)
    weights = {key: value.clone() for key, value in first.model.state_dict().items()}
    expected = first.steps(4)
    torch.save(copied, tmp_path / state.OPTIMIZER)  # as in a training, which goes on while its checkpoint is written
    second = Run(folder, config, device)
    second.model.load_state_dict(weights)
    state.load_optimizer(second.optimizer, tmp_path)
    assert second.steps(4) == expected


@pytest.mark.parametrize("name", [name for name in optimizers.OPTIMIZERS if name not in ON_GPU])
def test_it_learns_and_a_checkpoint_brings_it_back(folder: Path, tmp_path: Path, name: str) -> None:
    check(folder, tmp_path, name, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_it_learns_on_a_gpu(folder: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip(optimizers.find(name).where.partition(":")[0].partition(".")[0])
    check(folder, tmp_path, name, "cuda")


def rates(found: torch.optim.Optimizer, trained: Any) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay by parameter name."""
    names = {id(parameter): name for name, parameter in trained.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in found.param_groups for p in g["params"]}


def test_matrices_decay_and_embeddings_have_a_rate_of_their_own(folder: Path) -> None:
    trained = AutoModelForCausalLM.from_pretrained(folder)
    config = section("adamw_torch", weight_decay=0.1, embedding_learning_rate=1e-4)
    found = rates(optimizers.make(trained, config), trained)
    assert found["model.layers.0.mlp.up_proj.weight"] == (5e-3, 0.1)
    assert found["model.layers.0.input_layernorm.weight"] == (5e-3, 0.0)
    assert found["model.embed_tokens.weight"] == found["lm_head.weight"] == (1e-4, 0.1)
    assert len(found) == len(list(trained.parameters()))


def test_an_adapter_of_the_head_has_the_learning_rates_of_adapters(folder: Path) -> None:
    lora = {"targets": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"], "plus_ratio": 4.0}
    config = section("adamw_torch", method="lora", lora=lora, embedding_learning_rate=1e-4, precision="fp32")
    trained = model_of.ready(model_of.load(folder, config, "cpu"), config, folder, "cpu", list)
    found = {
        name.removeprefix("base_model.model."): rate
        for name, (rate, _) in rates(optimizers.make(trained, config), trained).items()
    }
    assert found["lm_head.lora_A.default.weight"] == 5e-3 and found["lm_head.lora_B.default.weight"] == 2e-2
    assert found["model.embed_tokens.modules_to_save.default.weight"] == 1e-4


DECAYS = [n for n in optimizers.OPTIMIZERS if n not in (*ON_GPU, "schedule_free_radam")]
"""That one does not decay in its first steps, in which it only looks."""
DECAY = {"weight_decay": 0.1, "learning_rate": 1e-2}


def step_without_gradient(run: Run) -> None:
    with optimizers.training(run.optimizer):
        for parameter in run.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run.optimizer.step()


@pytest.mark.parametrize("name", DECAYS)
def test_decay_is_apart_from_the_gradient(folder: Path, name: str) -> None:
    run = Run(folder, section(name, **DECAY), "cpu")
    weight, norm = run.model.model.layers[0].mlp.up_proj.weight, run.model.model.norm.weight
    expected = weight.detach() * (1 - 1e-2 * 0.1)
    step_without_gradient(run)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(norm, torch.ones_like(norm))


@pytest.mark.parametrize("name", [name for name, kind in optimizers.OPTIMIZERS.items() if kind.coupled])
def test_decay_stays_out_of_momentum_and_follows_the_learning_rate(folder: Path, name: str) -> None:
    options = {} if name == "adagrad" else {"momentum": 0.9}
    run = Run(folder, section(name, **DECAY, optimizer_options=options), "cpu")
    weight = run.model.model.layers[0].mlp.up_proj.weight
    expected = weight.detach() * (1 - 1e-2 * 0.1) * (1 - 5e-3 * 0.1)
    step_without_gradient(run)
    again = Run(folder, section(name, **DECAY, optimizer_options=options), "cpu")
    again.model.load_state_dict(run.model.state_dict())
    again.optimizer.load_state_dict(run.optimizer.state_dict())
    for each in (run, again):
        for group in each.optimizer.param_groups:
            group["lr"] = 5e-3
        step_without_gradient(each)
        found = each.model.model.layers[0].mlp.up_proj.weight.detach()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_weights_that_rest_do_not_decay(folder: Path) -> None:
    run = Run(folder, section("sgd", **DECAY), "cpu")
    before = run.model.lm_head.weight.detach().clone()
    run.optimizer.step()
    assert torch.equal(run.model.lm_head.weight, before)


def test_lora_plus_gives_b_a_higher_rate_than_a(folder: Path) -> None:
    config = TrainConfig.model_validate({"lora": {"plus_ratio": 16}, "learning_rate": 1e-3})
    adapted = adapters.adapt(AutoModelForCausalLM.from_pretrained(folder), config.lora, folder)
    optimizer = optimizers.make(adapted, config)
    found = rates(optimizer, adapted)
    assert {rate for name, (rate, _) in found.items() if ".lora_A." in name} == {1e-3}
    assert {rate for name, (rate, _) in found.items() if ".lora_B." in name} == {16e-3}
    assert optimizer.param_groups[0]["lr"] == 1e-3  # what is logged


def test_muon_takes_the_matrices_and_adamw_the_rest(folder: Path) -> None:
    trained = AutoModelForCausalLM.from_pretrained(folder)
    optimizer: Any = optimizers.make(trained, section("muon"))
    muon, adamw = optimizer.parts
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {id(parameter): name for name, parameter in trained.named_parameters()}
    others = {names[id(p)] for g in adamw.param_groups for p in g["params"]}
    assert {name for name in names.values() if "proj" not in name} == others


def test_biases_of_fused_experts_are_no_matrices(tmp_path: Path) -> None:
    """gpt-oss keeps them as [experts, width], and its experts' weights as [experts, width, width]."""
    model = tiny.save(tmp_path, "GptOssConfig", num_local_experts=4, num_experts_per_tok=2)
    trained = AutoModelForCausalLM.from_pretrained(model)
    names = [name for name, parameter in trained.named_parameters() if name.endswith("bias") and parameter.ndim == 2]
    assert {name.rpartition(".")[2] for name in names} == {"gate_up_proj_bias", "down_proj_bias"}
    weights = [name.removesuffix("_bias") for name in names]
    optimizer: Any = optimizers.make(trained, section("muon", weight_decay=0.1))
    muon, adamw = (rates(part, trained) for part in optimizer.parts)
    assert not {*names, *weights} & {*muon}
    assert {adamw[name][1] for name in names} == {0.0}
    assert {adamw[name][1] for name in weights} == {0.1}
    assert not freezing.spectrum(trained, 0.5) & {*names}


def test_eight_bits_hold_the_matrices_but_not_the_embeddings(folder: Path) -> None:
    run = Run(folder, section("adamw_8bit"), "cpu")
    run.steps(1)
    states = {name: run.optimizer.state[parameter] for name, parameter in run.model.named_parameters()}
    assert states["model.layers.0.mlp.up_proj.weight"]["state1"].dtype == torch.uint8
    assert states["model.embed_tokens.weight"]["state1"].dtype == torch.float32


@pytest.mark.parametrize("name", ["muon", "adamw_8bit", "ademamix_8bit", "galore_adamw", "apollo_adamw", "adamw_torch"])
def test_the_memory_plan_counts_what_an_optimizer_holds(folder: Path, name: str) -> None:
    wide = tiny.llama(folder / name, hidden_size=64, intermediate_size=128, vocab_size=4096)
    run = Run(wide, section(name), "cpu")

    def forward(tokens: int, trained: int) -> torch.Tensor:
        loss: torch.Tensor = run.model(torch.ones(1, tokens, dtype=torch.int64)).logits[0, :trained].sum()
        return loss

    counted = memory.measure(run.model, forward, name, "fp32", 1).optimizer
    run.steps(1)
    parts = optimizers.parts_of(run.optimizer)
    held = sum(
        value.nbytes
        for part in parts
        for state in part.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() > 256  # not the tables of quantized numbers
    )
    assert 0.97 < counted / held < 1.15


def test_eight_bit_optimizers_let_go_of_the_model_before(folder: Path) -> None:
    first = Run(folder, section("adamw_8bit"), "cpu")
    held = weakref.ref(first.model.get_input_embeddings().weight)
    del first
    Run(folder, section("adamw_8bit"), "cpu")
    gc.collect()
    assert held() is None


def test_positions_are_embeddings_and_what_asks_for_no_decay_has_none(tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
    network: Any = AutoModelForCausalLM.from_config(transformers.GPT2Config(vocab_size=64, **sizes))
    optimizer: Any = optimizers.make(network, section("muon", weight_decay=0.1, embedding_learning_rate=1e-5))
    muon, adamw = (rates(part, network) for part in optimizer.parts)
    assert adamw["transformer.wpe.weight"][0] == adamw["transformer.wte.weight"][0] == 1e-5
    weight = network.transformer.h[0].mlp.c_fc.weight
    assert muon["transformer.h.0.mlp.c_fc.weight"][1] == 0.1
    weight._no_weight_decay = True  # as transformers marks Mamba's A_log
    optimizer = optimizers.make(network, section("muon", weight_decay=0.1))
    assert rates(optimizer.parts[1], network)["transformer.h.0.mlp.c_fc.weight"][1] == 0.0


def test_galore_holds_its_state_in_low_rank(folder: Path) -> None:
    run = Run(folder, section("galore_adamw"), "cpu")
    run.steps(1)
    weight = run.model.model.layers[0].mlp.up_proj.weight
    assert tuple(weight.shape) == (128, 64)
    assert tuple(run.optimizer.state[weight]["exp_avg"].shape) == (128, 8)


def options(name: str, **given: Any) -> dict[str, Any]:
    return {"method": "full", "optimizer": name, "optimizer_options": given}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"optimizer": "adamw_torch_fuse"}, "did you mean 'adamw_torch_fused'"),
        ({"optimizer": "adamw_torch", "optimizer_options": {"epsilon": 1e-6}}, "did you mean `eps`"),
        (
            options("adamw_torch", eps="tiny"),
            "`optimizer_options.eps` is 'tiny': adamw_torch takes a number, such as 1.0e-08",
        ),
        (options("adamw_torch", eps=True), "is True: adamw_torch takes a number"),
        (options("adafactor", decay_rate="x"), "is 'x': adafactor takes a number, such as -0.8"),
        (options("sgd", nesterov=1), "is 1: sgd takes true or false"),
        (options("muon", ns_steps=2.5), "is 2.5: muon takes a whole number, at least 1"),
        (options("muon", ns_steps=True), "is True: muon takes a whole number, at least 1"),
        (options("galore_adamw", rank=0), "is 0: galore_adamw takes a whole number, at least 1"),
        (options("galore_adamw", proj_type="foo"), "is 'foo': galore_adamw takes one of std, reverse_std, left, right"),
        (options("galore_adamw", proj_type=1), "is 1: galore_adamw takes one of std"),
        (options("apollo_adamw", proj="foo"), "is 'foo': apollo_adamw takes one of random, svd"),
        (options("apollo_adamw", scale_type="foo"), "is 'foo': apollo_adamw takes one of channel, tensor"),
        ({"optimizer": "sgd", "betas": [0.9, 0.99]}, "sgd has none"),
        ({"optimizer": "galore_adamw"}, "an adapter is small already"),
        ({"optimizer": "schedule_free_adamw"}, "set `schedule: constant`"),
        ({"warmup": 2.5}, "a whole number of steps"),
        ({"schedule": "constant", "floor": 0.1}, "for schedules that fall"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_the_mend(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TrainConfig.model_validate(wrong)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            options("sgd", nesterov=True),
            "{nesterov: true} do not work with sgd, which says: Nesterov momentum",
        ),
        (options("muon", ns_steps=200), "{ns_steps: 200} do not work with muon, which says: Number of steps must be"),
        (options("adamw_torch", eps=-1), "which says: Invalid epsilon value: -1"),
        (options("adamw_8bit", eps=-1), "which says: Invalid epsilon value: -1"),
        (options("apollo_adamw", proj_type="full"), "do not work with apollo_adamw, which says: full rank projection"),
        (
            options("apollo_adamw", rank=4, proj_type="left"),
            '{rank: 4, proj_type: "left"} do not work with apollo_adamw, which says: The size of tensor',
        ),
    ],
)
def test_options_that_an_optimizer_refuses_are_told_before_a_model_is_loaded(wrong: dict[str, Any], said: str) -> None:
    config = TrainConfig.model_validate(wrong)
    with pytest.raises(UserError, match=re.escape(said)):
        checks.refuse_device(config, "cpu")


@pytest.mark.parametrize("name", [name for name in optimizers.OPTIMIZERS if name not in ON_GPU])
def test_the_options_an_optimizer_has_anyway_are_taken(name: str) -> None:
    kind = optimizers.find(name)
    schedule = "constant" if name.startswith("schedule_free") else "cosine"
    checks.refuse_device(TrainConfig.model_validate({**options(name, **kind.options), "schedule": schedule}), "cpu")


def test_an_optimizer_that_is_not_installed_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lion_8bit is not installed: pip install 'regrow\[quantized\]'"):
        optimizers.require("lion_8bit")
    with pytest.raises(UserError, match=r"regrow\[optimizers\]"):
        optimizers.require("schedule_free_adamw")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"precision": "fp16"}, "fp16 needs a GPU; on a CPU use bf16 or fp32"),
        ({"optimizer": "paged_adamw_8bit"}, "on a CPU use adamw_8bit"),
        ({"optimizer": "paged_adamw_32bit"}, "on a CPU use adamw_torch_fused"),
        ({"optimizer": "galore_adamw_8bit", "method": "full"}, "on a CPU use galore_adamw$"),
        ({"quantize": "int8", "lora": {"dora": True}}, "dora does not work over int8 weights on a CPU"),
    ],
)
def test_what_a_cpu_cannot_do_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        checks.refuse_device(TrainConfig.model_validate(config), "cpu")


def _moves(folder: Path, config: TrainConfig, before: int) -> list[float]:
    """How far twenty steps of the same gradients move a model whose optimizer has forgotten so many others."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = optimizers.make(model, config)
    found = []
    with optimizers.training(optimizer):
        for step in range(-before, 20):
            if step == 0:
                optimizers.forget(optimizer, model.parameters())
            drawn = torch.Generator().manual_seed(step + 1000)
            kept = [p.detach().clone() for p in model.parameters()]
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=drawn)
            optimizer.step()
            pairs = zip(model.parameters(), kept, strict=True)
            found.append(float(sum(((p.detach() - old) ** 2).sum() for p, old in pairs)) ** 0.5)
    return found[before:]


@pytest.mark.parametrize("name", sorted(set(optimizers.OPTIMIZERS) - set(ON_GPU)))
def test_what_is_forgotten_starts_as_if_it_had_never_been_trained(folder: Path, name: str) -> None:
    """Or, of those that cannot forget, a recipe that asks for it is refused."""
    if name.startswith("schedule_free") or name == "stable_adamw":
        for asked in ({"full": {"lisa": {}}}, {"method": "lora", "lora": {"restart_every": 5}}):
            with pytest.raises(ValidationError, match="choose another one"):
                section(name, **asked)
        return
    config = section(name, weight_decay=0.0)
    assert _moves(folder, config, 60) == pytest.approx(_moves(folder, config, 0), rel=1e-2)


@pytest.mark.parametrize(
    ("objective", "method", "fast"),
    [
        ("sft", "full", ["model.embed_tokens", "lm_head"]),
        ("reward", "full", ["model.embed_tokens", "score"]),
        ("reward", "lora", ["score"]),
    ],
)
def test_heads_have_the_learning_rate_of_embeddings_and_are_no_matrices(
    folder: Path, objective: str, method: str, fast: list[str]
) -> None:
    """Also the head that a reward model has in the other's place."""
    given = {"objective": objective, "method": method, "embedding_learning_rate": 0.5, "precision": "fp32"}
    config = section("muon", **given)
    trained = model_of.ready(model_of.load(folder, config, "cpu"), config, folder, "cpu", list)
    names = {id(p): name for name, p in trained.named_parameters()}
    matrices, others = optimizers.parts_of(optimizers.make(trained, config))
    rates = {names[id(p)]: group["lr"] for group in others.param_groups for p in group["params"]}
    found = [name for name, rate in rates.items() if rate == 0.5]
    assert all(any(f"{part}." in name for part in fast) for name in found) and len(found) == len(fast)
    assert not {*found} & {names[id(p)] for group in matrices.param_groups for p in group["params"]}
