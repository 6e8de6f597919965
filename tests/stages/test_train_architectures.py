"""Every architecture, tiny and random: adapted, proven not to leak between packed documents (or refused by name),
trained for two steps, merged with its logits compared, and read back. Most of the list runs with `make test-full`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages import merge
from stages.errors import UserError
from stages.runtime import Runtime
from stages.stage import Work
from stages.train import STAGE, TrainConfig
from tests.stages import tiny
from tests.stages.test_merge import make_model

EXPERTS = {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
MOE = {**EXPERTS, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {
    **MOE,
    **LATENT,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
STATE_SPACE = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 8}

TRAINED: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Mixtral": EXPERTS,
    "Qwen2": {},
    "Qwen2Moe": {**MOE, "shared_expert_intermediate_size": 16},
    "Qwen3": {},
    "Qwen3Moe": MOE,
    "Gemma": {},
    "Gemma2": {**SLIDING, "query_pre_attn_scalar": 8},
    "Gemma3Text": {**SLIDING, "query_pre_attn_scalar": 8},
    "Gemma4Text": {**SLIDING, "global_head_dim": 8, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    "Phi": {},
    "Phi3": {},  # and Phi-4
    "Phimoe": EXPERTS,
    "DeepseekV2": {**DEEPSEEK, "first_k_dense_replace": 1},
    "DeepseekV3": {**DEEPSEEK, "first_k_dense_replace": 1},
    "GptOss": {**SLIDING, **EXPERTS},
    "Granite": {},
    "GraniteMoe": EXPERTS,
    "Olmo2": {},
    "Olmo3": SLIDING,
    "Olmoe": EXPERTS,
    "SmolLM3": {},
    "Cohere": {},
    "Cohere2": SLIDING,
    "Glm4": {},
    "Glm4Moe": {**MOE, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "Starcoder2": {},
    "Ernie4_5": {},
    "Exaone4": SLIDING,
    "SeedOss": {},
    "Apertus": {},
}
REFUSED: dict[str, dict[str, Any]] = {
    "Mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2, "expand": 2, "chunk_size": 8},
    "FalconH1": STATE_SPACE,
    "Jamba": {
        **EXPERTS,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "StableLm": {},
    "Nemotron": {},
}
"""State-space and convolutional models, whose layers carry state over document boundaries, and some whose attention is
not told of the boundaries."""
DEFAULT = {"Mixtral", "Qwen3", "Gemma3Text", "DeepseekV3", "GptOss", "Cohere2", "Granite", "FalconH1"}


def some(names: dict[str, Any]) -> list[Any]:
    return [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.full) for name in names]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    return tiny.plan(tmp_path_factory.mktemp("plan"), tiny.documents(16), global_batch=2)


def train(folder: Path, inputs: dict[str, Path], **lora: Any) -> Path:
    output = folder / "trained"
    output.mkdir()
    config = {"lora": {"rank": 2, **lora}, "precision": "fp32", "learning_rate": 0.05, "warmup": 0, "max_steps": 2}
    STAGE.run(TrainConfig.model_validate(config), inputs, output, Work(folder / "work", Runtime(device="cpu")))
    return output


@pytest.mark.parametrize("name", some(TRAINED))
def test_it_is_adapted_trained_merged_and_read_back(tmp_path: Path, plan: dict[str, Path], name: str) -> None:
    folder = make_model(tmp_path / "model", f"{name}Config", **TRAINED[name])
    mixture = any("expert" in key for key in TRAINED[name])
    trained = train(tmp_path, {"model": folder, **plan}, experts=mixture)
    output = tmp_path / "merged"
    output.mkdir()
    inputs = {"model": folder, "trained": trained, "templates": trained}
    facts: Any = merge.STAGE.run(merge.MergeConfig(), inputs, output, Work(tmp_path / "w", Runtime(device="cpu")))
    assert facts["likeness"]["kl_of_training"] > 1e-5
    assert facts["likeness"]["kl"] < 1e-3 * facts["likeness"]["kl_of_training"]
    adapted = json.loads((trained / "adapter/adapter_config.json").read_text())
    assert bool(adapted["target_parameters"]) == mixture
    network = AutoModelForCausalLM.from_pretrained(output)
    ids = AutoTokenizer.from_pretrained(output)("read back", return_tensors="pt").input_ids
    assert network(ids).logits.isfinite().all()


@pytest.mark.parametrize("name", some(REFUSED))
def test_a_model_that_leaks_is_refused_by_name(tmp_path: Path, plan: dict[str, Path], name: str) -> None:
    folder = make_model(tmp_path / "model", f"{name}Config", **REFUSED[name])
    with pytest.raises(UserError, match="cannot be packed"):
        train(
            tmp_path, {"model": folder, **plan}, targets=["q_proj" if name in ("StableLm", "Nemotron") else "in_proj"]
        )
