"""The weights that vLLM is told: those that train, whoever packs them and when; the model's own stay as they were."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from stages.errors import UserError
from stages.train import Lora, TrainConfig, adapters
from stages.train.vllm_weights import Told

ADAPTERS: list[dict[str, Any]] = [
    {},
    {"rslora": True, "init": "gaussian"},
    {"dora": True},
    {"init": "olora"},
    {"targets": ["q_proj"]},
    {"modules_to_save": ["embed_tokens"]},
]


def network(folder: Path, dtype: torch.dtype = torch.float32, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, tie_word_embeddings=tied)
    return AutoModelForCausalLM.from_config(config).to(dtype)


def trained(model: Any, folder: Path, **lora: Any) -> PeftModel:
    """With an adapter whose every weight is a random number by now."""
    adapted = adapters.adapt(model, Lora.model_validate({"rank": 4, **lora}), folder)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape)
    return adapted


def copies(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lora", ADAPTERS, ids=str)
def test_they_are_those_of_the_merged_model_by_its_names(tiny_model: Path, lora: dict[str, Any], tied: bool) -> None:
    names = {name for name, _ in network(tiny_model, tied=tied).named_parameters()}
    adapted = trained(network(tiny_model, tied=tied), tiny_model, **lora)
    told = list(Told(adapted).named_parameters())  # all asked for before one is looked at, as a server's are packed
    alone = adapted.merge_and_unload()
    expected = dict(alone.named_parameters())
    assert {name for name, _ in told} == names == set(expected)
    for name, weight in told:
        torch.testing.assert_close(weight, expected[name].detach().to(weight.dtype), msg=name)


def test_an_adapter_beside_it_that_rests_is_not_told(tiny_model: Path) -> None:
    """With a `beta`, TRL keeps what the adapter started as."""
    adapted = trained(network(tiny_model), tiny_model, modules_to_save=["embed_tokens"])
    alone = dict(Told(adapted).named_parameters())
    adapted.add_adapter("ref", adapted.peft_config["default"])
    told = list(Told(adapted).named_parameters())
    assert [name for name, _ in told] == list(alone)
    for name, weight in told:
        torch.testing.assert_close(weight, alone[name], msg=name)


def test_in_bfloat16_the_models_own_weights_are_bit_for_bit_what_they_were(tiny_model: Path) -> None:
    adapted = trained(network(tiny_model, torch.bfloat16), tiny_model)
    before = copies(adapted)
    for _ in range(5):
        list(Told(adapted).named_parameters())
    after = copies(adapted)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for _ in range(5):  # which the way of TRL's trainers does not leave so
        adapted.merge_adapter()
        adapted.unmerge_adapter()
    assert not all(torch.equal(weight, before[name]) for name, weight in copies(adapted).items())


def test_without_an_adapter_they_are_the_models(tiny_model: Path) -> None:
    model = network(tiny_model)
    told = dict(Told(model).named_parameters())
    assert {name: weight.data_ptr() for name, weight in told.items()} == {
        name: weight.data_ptr() for name, weight in model.named_parameters()
    }


class Server:
    """Keeps what it is sent, as vLLM's client does: looks at the tensors once the last of them was handed out."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def update_named_params(self, metadata: Any, weights: Any) -> None:
        handed_out = list(weights)
        assert [(n, str(w.dtype).removeprefix("torch."), list(w.shape)) for n, w in handed_out] == metadata
        self.weights = {name: weight.clone() for name, weight in handed_out}

    def reset_prefix_cache(self) -> None: ...

    def load_weights(self, weights: list[tuple[str, Tensor]]) -> None:
        """Of a colocated engine."""
        self.weights |= {name: weight.clone() for name, weight in weights}


def generation(model: Any, server: Server, mode: str) -> VLLMGeneration:
    """TRL's own, but for its beginning, which wants vLLM."""
    made = object.__new__(VLLMGeneration)
    made.model, made.mode, made.enable_sleep_mode, made._weight_metadata = model, mode, False, None
    made.accelerator = Accelerator(cpu=True)
    made._dist = DistributedBackend(made.accelerator)
    made.vllm_client = server
    worker = SimpleNamespace(model_runner=SimpleNamespace(model=server))
    executor = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
    made.llm = SimpleNamespace(llm_engine=executor, reset_prefix_cache=lambda: None)
    return made


@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_trl_sends_them_before_every_batch(tiny_model: Path, mode: str) -> None:
    adapted, server = trained(network(tiny_model), tiny_model), Server()
    sending = generation(Told(adapted), server, mode)
    for _ in range(2):
        sending.sync_weights()
        expected = copy.deepcopy(adapted).merge_and_unload()
        for name, weight in expected.named_parameters():
            torch.testing.assert_close(server.weights[name], weight.detach(), msg=name)
        with torch.no_grad():
            next(w for n, w in adapted.named_parameters() if "lora_B" in n).add_(1.0)


def test_trls_own_way_sends_a_server_the_weights_from_before_training(tiny_model: Path) -> None:
    """Why there is `Told`. Should this fail, TRL was mended, and only the rounding above still speaks for it."""
    adapted, server = trained(network(tiny_model), tiny_model), Server()
    generation(adapted, server, "server").sync_weights()
    for name, weight in network(tiny_model).named_parameters():
        torch.testing.assert_close(server.weights[name], weight.detach(), msg=name)


@pytest.mark.parametrize("lora", [{"experts": True}, {"new_tokens": ["<a>"]}])
def test_what_it_cannot_be_told_is_refused_with_the_recipe(lora: dict[str, Any]) -> None:
    options = {"rewards": {"right": {"reward": "exact_match"}}, "vllm": {}}
    with pytest.raises((UserError, ValueError), match=r"vLLM cannot be told such weights"):
        TrainConfig.model_validate({"objective": "grpo", "objective_options": options, "lora": lora})
