"""Packed and unpacked training are the same, architecture by architecture, and the check says so or refuses."""

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig

from packing.attention import attend, implementation
from packing.collate import IGNORED, Bin, collate
from packing.isolation import check_isolation
from packing.rotary import by_document

torch.set_num_threads(1)

LENGTHS = (6, 1, 19, 3, 11)
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
BOTH = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
STRETCHED = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 10,
    "factor": 3.2,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
GROWING = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LLAMA4: dict[str, Any] = {"num_local_experts": 2, "intermediate_size_mlp": 48}
STATE_SPACE = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 8}


def config(name: str, **changes: Any) -> PretrainedConfig:
    return getattr(transformers, f"{name}Config")(**{**SIZES, **changes})


def nested(full: dict[str, Any]) -> dict[str, Any]:
    return {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": full}


EXACT = {
    "llama": config("Llama"),
    "qwen3": config("Qwen3", head_dim=8),
    "mistral, sliding window": config("Mistral", sliding_window=5),
    "gemma3, sliding and full": config("Gemma3Text", **BOTH),
    "gemma2, capped scores": config("Gemma2", **BOTH, attn_logit_softcapping=0.5),
    "phi3": config("Phi3"),
    "phi3, stretched": config("Phi3", rope_parameters=STRETCHED, original_max_position_embeddings=10),
    "llama, growing": config("Llama", rope_parameters=GROWING, max_position_embeddings=10),
    "gemma3, growing in some layers": config(
        "Gemma3Text", **{**BOTH, "max_position_embeddings": 10}, rope_parameters=nested(GROWING)
    ),
    "mixtral, experts": config("Mixtral", **EXPERTS),
    "gpt-oss, sinks": config("GptOss", **BOTH, **EXPERTS),
    "gpt2, learned positions": transformers.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2
    ),
    "ctrl, embeddings scaled in place": transformers.CTRLConfig(
        vocab_size=61, n_positions=32, n_embd=32, dff=48, n_layer=2, n_head=4
    ),
}
if hasattr(transformers.masking_utils, "remap_positions_for_packed_sequence"):
    # transformers before 5.23 fails at these by itself, or the check refuses them.
    EXACT["gemma3, stretched in some layers"] = config("Gemma3Text", **BOTH, rope_parameters=nested(STRETCHED))
    EXACT["llama4, chunks"] = config("Llama4Text", attention_chunk_size=5, **LLAMA4)
    EXACT["llama4, scaled queries"] = config(
        "Llama4Text", **LLAMA4, no_rope_layers=[1, 0], floor_scale=4, attn_scale=1.0
    )
    EXACT["llama4 with images, chunks"] = transformers.Llama4Config(
        text_config={**SIZES, **LLAMA4, "attention_chunk_size": 5}, vision_config={"num_hidden_layers": 1}
    )
LEAKING = {
    "mamba2": transformers.Mamba2Config(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=16, n_groups=2
    ),
    "falcon_h1": config("FalconH1", **STATE_SPACE),
    "lfm2": config("Lfm2", layer_types=["conv", "full_attention"]),
    "bloom": transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4),
}


def model(configuration: PretrainedConfig, attention: str | None = None, apart: bool = True) -> Any:
    """Random weights, large enough that every part of the model matters."""
    torch.manual_seed(0)
    attention = attention or implementation("cpu", configuration)
    configuration = copy.deepcopy(configuration)  # a model writes its attention implementation into its config
    made = AutoModelForCausalLM.from_config(configuration, attn_implementation=attention)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    if apart:
        by_document(made)
    return made


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[0, :-1].float(), labels[0, 1:], ignore_index=IGNORED, reduction="none")


@pytest.mark.parametrize("name", EXACT)
def test_packing_changes_no_loss_and_no_gradient(name: str) -> None:
    """Against transformers' eager attention, a document at a time, in a second copy of the model."""
    random = np.random.default_rng(1)
    documents = [random.integers(1, 61, length) for length in LENGTHS]
    labels = np.concatenate([np.where(np.arange(len(ids)) > 0, ids, IGNORED) for ids in documents])
    batch = collate([Bin(np.concatenate(documents), labels, np.array(LENGTHS))], pad_to_multiple=16, documents=8)
    packed, alone = model(EXACT[name]).eval(), model(EXACT[name], "eager", apart=False).eval()
    alone.load_state_dict(packed.state_dict())
    assert (packed.config._attn_implementation == "eager") == ("llama4" in name)

    batch_labels = batch.pop("labels")
    losses = token_losses(packed(**batch, use_cache=False).logits, batch_labels)
    losses.sum().backward()
    expected = []
    for ids in documents:
        row = torch.tensor(ids)[None]
        each = token_losses(alone(input_ids=row, use_cache=False).logits, row)
        expected += each.tolist()
        if len(ids) > 1:
            each.sum().backward()

    trained = batch_labels[0, 1:] != IGNORED
    torch.testing.assert_close(losses[trained], torch.tensor(expected), rtol=1e-4, atol=1e-5)
    for (parameter_name, one), two in zip(packed.named_parameters(), alone.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), parameter_name
        if two.grad is not None:
            assert (one.grad - two.grad).norm() <= 1e-4 * two.grad.norm() + 1e-6, parameter_name


@pytest.mark.parametrize("name", EXACT)
def test_the_check_passes_and_leaves_the_model_as_it_was(name: str) -> None:
    made = model(EXACT[name]).train()
    before = {n: p.clone() for n, p in made.named_parameters()}
    attention = made.config._attn_implementation
    figures = check_isolation(made)
    assert figures["leak"] == 0.0
    assert figures["max_gradient_difference"] < 1e-4 < figures["tolerance"]
    assert made.training
    assert made.config._attn_implementation == attention
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in made.named_parameters())


def test_the_check_takes_an_adapter_and_another_precision() -> None:
    import peft

    adapted = peft.get_peft_model(model(EXACT["llama"]), peft.LoraConfig(target_modules="all-linear", r=4))
    with torch.autocast("cpu", torch.bfloat16):
        figures = check_isolation(adapted)
    assert figures["tolerance"] == pytest.approx(torch.finfo(torch.bfloat16).eps ** 0.5)


@pytest.mark.parametrize("name", LEAKING)
def test_a_model_whose_documents_see_one_another_is_refused(name: str) -> None:
    reason = "documents in one sequence see one another|`causal_conv1d_fn` can't keep packed sequences apart"
    with pytest.raises(ValueError, match=f"{name} cannot be packed: ({reason})"):
        check_isolation(model(LEAKING[name]))


@pytest.mark.parametrize("name", [name for name in EXACT if re.search("stretched|growing", name)])
def test_a_model_that_goes_by_all_documents_of_a_batch_is_refused(name: str) -> None:
    """As transformers' is, before `by_document`."""
    with pytest.raises(ValueError, match="cannot be packed: a token's loss differs"):
        check_isolation(model(EXACT[name], apart=False))


def test_a_model_that_puts_tokens_before_a_text_is_refused() -> None:
    sizes = {"num_attention_heads": 4, "dim_head": 8, "dim_ff": 48, "num_hidden_layers": 2}
    with pytest.raises(ValueError, match="cpmant cannot be packed: it puts tokens of its own before"):
        check_isolation(model(transformers.CpmAntConfig(vocab_size=61, hidden_size=32, **sizes)))


def _leaky(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    kwargs["cu_seq_lens_q"] = torch.tensor([0, query.shape[2]])
    return attend(module, query, key, value, mask, **kwargs)


def _without_window(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    kwargs["sliding_window"] = None
    return attend(module, query, key, value, mask, **kwargs)


def _slightly_off(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    output, _ = attend(module, query, key, value, mask, **kwargs)
    return output * (1 + (kwargs["cu_seq_lens_q"].shape[0] > 2) * 1e-2), None


@pytest.mark.parametrize(
    ("attention", "told"),
    [
        (_leaky, "documents in one sequence see one another"),
        (_without_window, "a token's loss differs"),
        (_slightly_off, "a token's loss differs"),
    ],
)
def test_attention_that_is_wrong_is_found(attention: Callable[..., Any], told: str) -> None:
    AttentionInterface.register("wrong", attention)
    with pytest.raises(ValueError, match=f"mistral cannot be packed: {told}"):
        check_isolation(model(EXACT["mistral, sliding window"], "wrong"))


@pytest.mark.parametrize("chunk", [48, 8192])
def test_attention_that_forgets_chunks_is_found_however_long_they_are(chunk: int) -> None:
    configuration = config("Llama4Text", attention_chunk_size=chunk, **LLAMA4)
    made = model(configuration, "regrow")
    with pytest.raises(ValueError, match="llama4_text cannot be packed: a token's loss differs"):
        check_isolation(made)
    assert made.config.attention_chunk_size == chunk


def test_queries_scaled_by_place_in_the_row_are_found_though_they_change_after_8192_tokens() -> None:
    made = model(config("Llama4Text", no_rope_layers=[1, 0], **LLAMA4), apart=False)
    with pytest.raises(ValueError, match="llama4_text cannot be packed: a token's loss differs"):
        check_isolation(made)
    assert [layer.self_attn.floor_scale for layer in made.model.layers] == [8192, 8192]


def test_the_check_holds_in_16_bits_for_a_model_whose_gradients_are_wild() -> None:
    """Embeddings as small as a trained model's rare tokens make rounding, not packing, decide the gradients."""
    wild = model(EXACT["llama"]).to(torch.bfloat16)
    with torch.no_grad():
        wild.get_input_embeddings().weight *= 1e-3
        for name, weight in wild.named_parameters():
            if "_proj" in name:
                weight *= 20
    figures = check_isolation(wild)
    assert figures["leak"] == 0.0
    assert figures["max_gradient_difference"] < figures["tolerance"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in EXACT if "llama4" not in name])
def test_the_check_passes_on_a_gpu(name: str) -> None:
    figures = check_isolation(model(EXACT[name]).to("cuda", torch.bfloat16))
    assert figures["leak"] == 0.0
