"""Adapters one by one: where they go, how they start, what is written, and that it fits the model as it came."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from packing.collate import Bin, collate
from stages.errors import UserError
from stages.train import TrainConfig, adapters, eva, folding, model, state
from stages.train.patterns import matches
from tests.stages import tiny
from tests.stages.test_merge import make_model, run

IDS = torch.arange(5, 29)[None]
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 16}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
MLP = ("gate_proj", "up_proj", "down_proj")
DENSE = {f"0.mlp.{name}" for name in MLP}
SHARED = {f"1.mlp.shared_experts.{name}" for name in MLP}
ROUTED = {"1.mlp.experts", "1.mlp.experts.base_layer"}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense layer, and one of routed experts and a shared one."""
    return make_model(tmp_path_factory.mktemp("mixture"), "DeepseekV3Config", **tiny.DEEPSEEK)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("gpt2"), "GPT2Config", **GPT2)


def section(**lora: Any) -> TrainConfig:
    others = {name: lora.pop(name) for name in ("quantize", "precision") if name in lora}
    return TrainConfig.model_validate({"lora": {"rank": 4, **lora}, "precision": "fp32", **others})


def adapted(folder: Path, config: TrainConfig) -> Any:
    torch.manual_seed(0)
    return model.ready(model.load(folder, config, "cpu"), config, folder, "cpu", batches).eval()


def batches() -> list[dict[str, Any]]:
    rows = [torch.tensor(row) for row in tiny.documents(8)]
    made = [collate([Bin(row.numpy(), row.numpy(), torch.tensor([len(row)]).numpy())]) for row in rows]
    return [{name: value for name, value in each.items() if name != "labels"} for each in made]


def logits(trained: Any) -> torch.Tensor:
    boundaries = torch.tensor([0, IDS.shape[1]], dtype=torch.int32)
    known = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 32, "max_length_k": 32}
    with torch.no_grad():
        found: torch.Tensor = trained(input_ids=IDS, **known).logits
    return found


def plain(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits
    return found


def shake(trained: Any) -> None:
    """As if it had been trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def places(trained: Any) -> set[str]:
    return {
        name.removeprefix("base_model.model.model.layers.")
        for name, module in trained.named_modules()
        if hasattr(module, "lora_A")
    }


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], {"0.self_attn.q_proj", "1.self_attn.q_proj"}),
        (["*.0.self_attn.[qk]_proj"], {"0.self_attn.q_proj", "0.self_attn.k_proj"}),
        (["re:.*layers\\.1\\.mlp\\.(up|down)_proj"], {"1.mlp.up_proj", "1.mlp.down_proj"}),
        (["layers.1.mlp"], {"1.mlp.up_proj", "1.mlp.down_proj", "1.mlp.gate_proj"}),
    ],
)
def test_targets_are_names_globs_or_expressions(folder: Path, targets: list[str], expected: set[str]) -> None:
    assert places(adapted(folder, section(targets=targets))) == expected


def test_all_linear_is_every_linear_layer_but_the_head(folder: Path) -> None:
    kinds = {place.rpartition(".")[2] for place in places(adapted(folder, section()))}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_plain_pattern_means_whole_parts_of_a_name() -> None:
    assert matches("mlp", "model.layers.0.mlp.up_proj") and not matches("ml", "model.layers.0.mlp.up_proj")


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_16", "eva"])
def test_every_start_leaves_the_function_as_it_was_and_fits_the_model_as_it_came(
    folder: Path, tmp_path: Path, init: str
) -> None:
    trained = adapted(folder, section(init=init))
    before = plain(folder)
    torch.testing.assert_close(logits(trained), before, rtol=1e-4, atol=1e-4)
    shake(trained)
    expected = logits(trained)
    assert (expected - before).abs().max() > 0.1
    adapters.save(trained, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    again = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-3, atol=1e-3)


def test_an_adapter_that_is_made_anew_is_written_against_the_start_that_was_trained(
    folder: Path, tmp_path: Path
) -> None:
    """As after sharded training: on another device PiSSA draws other numbers, and so takes out other directions."""
    config = section(init="pissa_niter_16")
    trained = adapted(folder, config)
    shake(trained)
    torch.manual_seed(1)
    anew = model.ready(model.load(folder, config, "cpu"), config, folder, "cpu", batches)
    folding.put_starts(anew, folding.starts(trained))
    state.put_weights(anew, state.weights_of(trained, keep=True))
    adapters.save(anew, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    again = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, logits(trained), rtol=1e-3, atol=1e-3)


def test_pissa_takes_the_largest_directions_out_of_the_weight(folder: Path) -> None:
    trained = adapted(folder, section(init="pissa", targets=["up_proj"]))
    layer = trained.base_model.model.model.layers[0].mlp.up_proj
    whole = AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.up_proj.weight
    singular = torch.linalg.svdvals(whole)
    torch.testing.assert_close(torch.linalg.svdvals(layer.get_delta_weight("default"))[:4], singular[:4])
    torch.testing.assert_close(torch.linalg.svdvals(layer.base_layer.weight)[:8], singular[4:12])


def test_eva_of_more_ranks_than_a_sequence_has_tokens_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"takes 28 directions .* has 24: lower lora\.rank"):
        adapted(folder, section(init="eva", rank=28, targets=["q_proj"]))


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]])
def test_eva_starts_an_adapter_of_the_head_as_well(folder: Path, targets: list[str]) -> None:
    trained = adapted(folder, section(init="eva", targets=targets))
    torch.testing.assert_close(logits(trained), plain(folder), rtol=1e-4, atol=1e-4)


def test_eva_says_which_layer_has_no_directions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = section(init="eva", targets=["q_proj", "spare"]).lora
    network = AutoModelForCausalLM.from_pretrained(folder)
    network.spare = torch.nn.Linear(32, 32)
    with pytest.raises(UserError, match=r"no directions for .*spare that .* in 1 passes .* leave it out of"):
        eva.start_from_activations(adapters.adapt(network, lora, folder), batches())
    monkeypatch.setattr(eva, "MOST_PASSES", 2)
    with pytest.raises(UserError, match=r"no directions for .*q_proj and 1 more that .* in 2 passes"):
        adapted(folder, section(init="eva", targets=["q_proj"]))


def test_eva_starts_from_the_directions_in_which_inputs_vary(folder: Path) -> None:
    trained = adapted(folder, section(init="eva", targets=["q_proj"]))
    decoder = AutoModelForCausalLM.from_pretrained(folder).model
    with torch.no_grad():
        seen = [decoder.layers[0].input_layernorm(decoder.embed_tokens(b["input_ids"]))[0] for b in batches()]
    inputs = torch.cat(seen)
    layer = trained.base_model.model.model.layers[0].self_attn.q_proj
    a = layer.lora_A["default"].weight
    best = torch.linalg.svd(inputs - inputs.mean(0)).Vh[:4]
    share = ((inputs - inputs.mean(0)) @ torch.linalg.qr(a.T).Q).square().sum()
    assert share > 0.95 * ((inputs - inputs.mean(0)) @ best.T).square().sum()
    assert not layer.lora_B["default"].weight.any()


@pytest.mark.parametrize("init", ["pissa", "orthogonal", "eva"])
def test_layers_that_hold_their_weights_turned_take_other_starts_than_olora(gpt2: Path, init: str) -> None:
    assert adapted(gpt2, section(init=init))
    for targets in (["c_attn"], ["attn.c_proj"]):  # the second is square, and fails at nothing
        with pytest.raises(UserError, match=r"olora does not take layers like .*attn.* of gpt2, .*: use init: pissa"):
            adapted(gpt2, section(init="olora", targets=targets))


def test_rslora_scales_by_the_root_of_the_rank(folder: Path) -> None:
    layer = adapted(folder, section(rslora=True, alpha=8)).base_model.model.model.layers[0].mlp.up_proj
    assert layer.scaling["default"] == 8 / 2


def test_dora_learns_magnitudes_and_starts_as_the_model(folder: Path, tmp_path: Path) -> None:
    trained = adapted(folder, section(dora=True))
    torch.testing.assert_close(logits(trained), plain(folder), rtol=1e-4, atol=1e-4)
    learned = {name for name, p in trained.named_parameters() if p.requires_grad and "magnitude" in name}
    assert len(learned) == 14
    shake(trained)
    adapters.save(trained, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        again = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()(IDS).logits
    torch.testing.assert_close(again, logits(trained), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config_name", ["MixtralConfig", "Qwen3MoeConfig"])
def test_experts_are_adapted_in_their_fused_weights(tmp_path: Path, config_name: str) -> None:
    folder = tiny.save(tmp_path / "model", config_name, **MOE)
    trained = adapted(folder, section(experts=True, targets=["q_proj"]))
    assert {place for place in places(trained) if "experts" in place}
    torch.testing.assert_close(logits(trained), plain(folder), rtol=1e-4, atol=1e-4)
    assert trained.config._experts_implementation == "grouped_mm"
    shake(trained)
    logits_before = logits(trained)
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad and "experts" in name:
            assert parameter.dtype == torch.float32
            with torch.no_grad():
                parameter.zero_()
    assert (logits(trained) - logits_before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ({}, DENSE | SHARED),
        ({"dropout": 0.1}, DENSE | SHARED),
        ({"init": "pissa"}, DENSE | SHARED),
        ({"init": "orthogonal"}, DENSE | SHARED),
        ({"init": "eva", "rslora": True}, DENSE | SHARED),
        ({"experts": True}, DENSE | SHARED | ROUTED),
        ({"experts": True, "targets": ["q_proj"]}, ROUTED),
        ({"targets": ["shared_experts"]}, SHARED),
        ({"targets": ["layers.0.mlp", "q_proj"]}, DENSE),
        ({"targets": ["re:.*shared_experts\\.down_proj"]}, {"1.mlp.shared_experts.down_proj"}),
        ({"modules_to_save": ["shared_experts"]}, DENSE),
    ],
)
def test_a_mixtures_adapters_are_where_they_were_asked_for_and_are_loaded_and_merged_there(
    mixture: Path, tmp_path: Path, lora: dict[str, Any], expected: set[str]
) -> None:
    trained = adapted(mixture, section(**lora))
    assert {place for place in places(trained) if "mlp" in place} == expected
    before = plain(mixture)
    torch.testing.assert_close(logits(trained), before, rtol=1e-4, atol=1e-4)
    shake(trained)
    wanted = logits(trained)
    adapters.save(trained, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    again = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert places(again) == places(trained)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, wanted, rtol=1e-3, atol=1e-3)
    run(tmp_path / "merged", mixture, tmp_path)
    old, new = load_file(mixture / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    changed = {name for name in old if "mlp" in name and not torch.equal(old[name], new[name])}
    assert any(".experts." in name for name in changed) == ("experts" in lora)
    whole = SHARED if "modules_to_save" in lora else set()
    assert {name for name in changed if ".experts." not in name} == {
        f"model.layers.{name}.weight" for name in (expected | whole) - ROUTED
    }


def test_dora_on_a_layer_that_peft_would_load_as_experts_is_refused(mixture: Path) -> None:
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.down_proj and 5 more onto the fused experts"):
        adapted(mixture, section(dora=True))
    assert places(adapted(mixture, section(dora=True, targets=["q_proj"])))


def test_adapters_in_other_places_than_asked_for_are_refused(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_renamed", lambda *_: set())
    wanted = r"leaves out model\.layers\.0\.mlp\.down_proj and 5 more and adapts .*\.experts\.down_proj and 1 more"
    with pytest.raises(UserError, match=wanted):
        adapted(mixture, section())


def test_an_adapter_that_peft_loads_by_its_layers_names_is_written_with_them(folder: Path, tmp_path: Path) -> None:
    adapters.save(adapted(folder, section(dropout=0.1)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted([*MLP, "k_proj", "o_proj", "q_proj", "v_proj"])
    assert config["target_parameters"] is None and config["lora_dropout"] == 0.1


def test_a_model_without_experts_says_so(folder: Path) -> None:
    with pytest.raises(UserError, match="llama has no experts"):
        adapted(folder, section(experts=True))


def test_a_module_to_save_that_does_not_exist_is_refused_with_the_nearest(folder: Path) -> None:
    with pytest.raises(UserError, match="no module is called 'embed_token': did you mean 'embed_tokens'"):
        adapted(folder, section(modules_to_save=["embed_token"]))


def test_a_module_to_save_is_that_module_and_none_whose_name_ends_like_it(folder: Path, tmp_path: Path) -> None:
    trained = adapted(folder, section(modules_to_save=["norm"], targets=["q_proj"]))
    whole = {n for n, p in trained.named_parameters() if p.requires_grad and "lora" not in n}
    assert whole == {"base_model.model.model.norm.modules_to_save.default.weight"}
    shake(trained)
    adapters.save(trained, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    again = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, logits(trained), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("names", [["embed_tokens", "lm_head"], ["input_layernorm"], ["model.norm", "up_proj"]])
def test_modules_to_save_that_peft_understands_are_written_as_they_were_given(
    folder: Path, tmp_path: Path, names: list[str]
) -> None:
    adapters.save(adapted(folder, section(modules_to_save=names)), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == names


def test_a_module_to_save_that_peft_cannot_tell_from_another_is_refused(folder: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(folder)
    network.my_lm_head = torch.nn.Linear(4, 4)
    with pytest.raises(UserError, match="for 'lm_head', PEFT would train my_lm_head besides lm_head"):
        adapters.adapt(network, section(modules_to_save=["lm_head"]).lora, folder)


def test_modules_to_save_of_which_one_is_in_the_other_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj is a part of model\.layers\.0\.mlp, .*: name one"):
        adapted(folder, section(modules_to_save=["mlp", "up_proj"], targets=["q_proj"]))


def test_embeddings_that_would_train_apart_from_the_head_that_shares_their_weights_are_refused(gpt2: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(gpt2)
    network.spare = torch.nn.Linear(32, 32)
    with pytest.raises(UserError, match="in gpt2 the head shares the weights of the embeddings, and PEFT would train"):
        adapters.adapt(network, section(modules_to_save=["transformer"], targets=["spare"]).lora, gpt2)


def test_embeddings_do_not_train_whole_and_by_rows(gpt2: Path) -> None:
    with pytest.raises(UserError, match=r"new_tokens trains some rows of transformer\.wte, which .* trains whole"):
        adapted(gpt2, section(modules_to_save=["wte"], new_tokens=["a"]))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_module_to_save_that_is_held_in_few_bits_is_refused(folder: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(UserError, match=r"holds model\.layers\.0\.mlp\.down_proj and 1 more in few bits"):
        adapted(folder, section(modules_to_save=["down_proj"], quantize=kind))
    assert adapted(folder, section(modules_to_save=["embed_tokens", "norm"], quantize=kind))


def test_a_head_is_not_adapted_and_trained_by_rows(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "LlamaConfig")
    with pytest.raises(
        UserError, match=r"new_tokens trains some rows of lm_head, which train\.lora\.targets would adapt"
    ):
        adapted(folder, section(new_tokens=["5"], targets=["q_proj", "lm_head"]))
    assert adapted(folder, section(new_tokens=["5"], targets=["q_proj"]))
