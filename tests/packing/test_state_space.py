"""State-space and linear-attention models are packed where their kernels take the documents' boundaries.

The kernels need a GPU. What is proven here is the way to them: functions of the same names and signatures, which
compute each document by itself (`kernels/`), are found by transformers as the packages would be, and then packed
documents give the losses and gradients of the documents alone. A model of which one kernel takes no boundaries is
refused, and so is every one where the packages are absent.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_chunk_size": 8}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
PACKED: dict[str, dict[str, Any]] = {
    "FalconH1": {**MAMBA, "mamba_d_ssm": 64},
    "Bamba": {**MAMBA, "attn_layer_indices": [1]},
    "GraniteMoeHybrid": {**MAMBA, **EXPERTS, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "Qwen3Next": {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
}
REFUSED: dict[str, dict[str, Any]] = {
    # The first Mamba's scan takes no boundaries.
    "Jamba": {**EXPERTS, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
    # transformers does not hand them from this model to its layers.
    "Mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2, "expand": 2, "chunk_size": 8},
}

PROGRAM = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM
from packing.attention import implementation
from packing.isolation import check_isolation

torch.set_num_threads(1)
found = {}
for name, settings in json.loads(sys.argv[1]).items():
    config = getattr(transformers, name + "Config")(**settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation("cpu", config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    try:
        found[name] = check_isolation(model)
    except ValueError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


def check(models: dict[str, dict[str, Any]], kernels: bool) -> dict[str, Any]:
    """What the check before training says of each model, in a process that has the kernels or has not."""
    here = Path(__file__).parent
    paths = [str(here.parents[1]), *([str(here / "kernels")] if kernels else [])]
    settings = {name: {**SIZES, **changes} for name, changes in models.items()}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(settings)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.full
def test_packed_documents_are_documents_alone_where_kernels_take_the_boundaries() -> None:
    known = {name: changes for name, changes in PACKED.items() if hasattr(transformers, f"{name}Config")}
    found = check({**known, **REFUSED}, kernels=True)
    for name in REFUSED:
        assert isinstance(told := found.pop(name), str) and "cannot be packed: documents in one sequence see" in told
    for name, figures in found.items():
        assert not isinstance(figures, str), figures
        assert figures["leak"] == 0.0, name
        assert max(figures["max_loss_difference"], figures["max_gradient_difference"]) < 1e-4, (name, figures)


@pytest.mark.full
def test_without_the_kernels_all_are_refused_and_told_what_to_install() -> None:
    if find_spec("causal_conv1d"):
        pytest.skip("the real kernels are installed")
    found = check({name: PACKED[name] for name in ("FalconH1", "Qwen3Next", "Lfm2")}, kernels=False)
    for name, told in found.items():
        assert isinstance(told, str) and "cannot be packed" in told and "nstall `causal_conv1d`" in told, (name, told)
