"""merge on tiny models: the folder is the trained model, and a merge that is not is found out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf.vocab import SpecialVocab
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from stages import merge, templates
from stages.errors import UserError
from stages.identity import tree_of
from stages.runtime import Runtime
from stages.stage import Facts, Work
from tests.stages import tiny

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def make_model(folder: Path, config_name: str = "LlamaConfig", **changes: Any) -> Path:
    """A random model with a tokenizer of single bytes."""
    tiny.save(folder, config_name, vocab_size=256, **changes)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE).save_pretrained(folder)
    return folder


def make_adapter(folder: Path, model: Path, scale: float = 1.0, **changes: Any) -> Path:
    """A trained-looking adapter; returns the folder that train would have written."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **changes}
    adapted = get_peft_model(base, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.mul_(scale)
            elif "modules_to_save" in name or "trainable_tokens" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    adapted.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    return folder


def run(output: Path, model: Path, trained: Path, templates: Path | None = None) -> Facts:
    output.mkdir(parents=True)
    work = Work(output.parent / "work", Runtime(device="cpu"))
    inputs = {"model": model, "trained": trained, "templates": templates or trained}
    return merge.STAGE.run(merge.MergeConfig(), inputs, output, work)


def adapted_logits(model: Path, trained: Path, ids: torch.Tensor) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits: torch.Tensor = PeftModel.from_pretrained(base, str(trained / "adapter")).eval()(ids).logits
    return logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("config_name", "changes"),
    [
        ("LlamaConfig", {}),
        ("LlamaConfig", {"tie_word_embeddings": True}),
        ("Qwen3Config", {}),
        ("Gemma2Config", {"query_pre_attn_scalar": 8}),
        ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    ],
)
def test_the_merged_folder_gives_the_adapters_logits(
    tmp_path: Path, config_name: str, changes: dict[str, Any], dtype: str
) -> None:
    model = make_model(tmp_path / "model", config_name, dtype=dtype, **changes)
    trained = make_adapter(tmp_path / "trained", model)
    facts = run(tmp_path / "output", model, trained)
    assert facts["changed_tensors"] and "changed nothing" not in str(facts.get("warning"))
    assert facts["device"] == "cpu"

    # Three lines, as anybody would.
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "output", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "output")
    ids = tokenizer("A text that merge has not compared.", return_tensors="pt").input_ids

    assert merged.dtype == getattr(torch, dtype)
    assert tokenizer.chat_template == TEMPLATE
    expected = adapted_logits(model, trained, ids)
    tolerance = 1e-4 if dtype == "float32" else 0.05
    torch.testing.assert_close(
        merged.float()(ids).logits, expected, rtol=tolerance, atol=tolerance * expected.max().item()
    )
    figures = json.loads((tmp_path / "output/merge.json").read_text())["likeness"]
    assert figures["kl"] < 0.01 * figures["kl_of_training"]


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [3, 200]}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 32}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_kind_of_adapter_merges_into_16_bits(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = make_model(tmp_path / "model", dtype="bfloat16")
    trained = make_adapter(tmp_path / "trained", model, **changes)
    facts: Any = run(tmp_path / "output", model, trained)
    assert facts["update_kept"] == pytest.approx(1, abs=0.01)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "output", dtype=torch.float32)
    ids = torch.tensor([[3, 200, 17, 45]])
    expected = adapted_logits(model, trained, ids)
    torch.testing.assert_close(merged(ids).logits, expected, rtol=0.05, atol=0.05 * expected.max().item())


def test_everything_but_the_weights_is_the_models_own(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    (model / "LICENSE").write_text("the model's licence")
    trained = make_adapter(tmp_path / "trained", model)
    run(tmp_path / "first", model, trained)
    run(tmp_path / "second", model, trained)
    assert tree_of(tmp_path / "first") == tree_of(tmp_path / "second")
    for path in model.iterdir():
        same = (tmp_path / "first" / path.name).read_bytes() == path.read_bytes()
        assert same == (path.name != "model.safetensors"), path.name


def test_weights_without_an_adapter_keep_every_bit(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", dtype="bfloat16")
    run(tmp_path / "output", model, make_adapter(tmp_path / "trained", model, target_modules=["q_proj"]))
    before, after = (load_file(f / "model.safetensors") for f in (model, tmp_path / "output"))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)
    }


def test_a_config_that_names_no_number_type_leaves_the_one_of_the_weights(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", dtype="bfloat16")
    tiny.without_dtype(model)
    facts = run(tmp_path / "output", model, make_adapter(tmp_path / "trained", model))
    assert facts["dtype"] == "bfloat16"
    assert {each.dtype for each in load_file(tmp_path / "output/model.safetensors").values()} == {torch.bfloat16}


def test_an_adapter_that_cannot_be_folded_in_is_refused(tmp_path: Path) -> None:
    # Merging into a tied head changes the embeddings too.
    model = make_model(tmp_path / "model", tie_word_embeddings=True)
    trained = make_adapter(tmp_path / "trained", model, target_modules=["lm_head"])
    with pytest.raises(UserError, match="do not give the adapter's logits"):
        run(tmp_path / "output", model, trained)


def likeness_of(model: Path, wanted_from: Path, found_from: Path) -> merge.Likeness:
    """Compare two adapters of one model."""
    probes = merge._probes(model)
    before = merge._logits(merge._load(model, "cpu"), probes)
    wanted, found = (torch.cat([adapted_logits(model, t, p)[0] for p in probes]) for t in (wanted_from, found_from))
    return merge.compare(before, wanted, found)


def test_a_merge_with_a_tampered_adapter_does_not_pass_as_the_adapter(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    trained, tampered = (make_adapter(tmp_path / name, model) for name in ("trained", "tampered"))
    merge.require_same(likeness_of(model, trained, tampered))
    path = tampered / "adapter/adapter_model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name] = weights[name] * 1.05  # one matrix of many, five per cent
    save_file(weights, path)
    with pytest.raises(UserError, match="do not give the adapter's logits"):
        merge.require_same(likeness_of(model, trained, tampered))
    with pytest.raises(UserError, match="saved model does not give"):
        merge.require_saved(likeness_of(model, trained, tampered))


def test_the_model_before_training_does_not_pass_as_the_trained_one(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    trained = make_adapter(tmp_path / "trained", model)
    untrained = make_adapter(tmp_path / "untrained", model, scale=0.0)
    with pytest.raises(UserError, match="takes too much of the training"):
        merge.require_kept(likeness_of(model, trained, untrained), torch.bfloat16)


def test_numbers_that_are_none_do_not_pass() -> None:
    logits = torch.zeros(2, 3)
    broken = merge.compare(logits, logits, torch.full((2, 3), float("nan")))
    with pytest.raises(UserError):
        merge.require_same(broken)
    with pytest.raises(UserError):
        merge.require_kept(broken, torch.float32)


def test_training_that_the_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", dtype="bfloat16")
    trained = make_adapter(tmp_path / "trained", model, scale=1e-9)
    with pytest.raises(UserError, match=r"only 0\.\d% are left in bfloat16"):
        run(tmp_path / "output", model, trained)


def test_a_model_that_the_gpu_trained_in_four_bits_is_merged_there_only_if_it_goes_in_whole() -> None:
    gigabyte = 10**9
    assert not merge.fits(8 * 4 * gigabyte, free=24 * gigabyte)
    assert not merge.fits(8 * 4 * gigabyte, free=33 * gigabyte), "what is computed besides needs room too"
    assert merge.fits(8 * 4 * gigabyte, free=48 * gigabyte)


def test_training_that_changed_nothing_is_said(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    trained = make_adapter(tmp_path / "trained", model, scale=0.0)
    assert "changed nothing" in str(run(tmp_path / "output", model, trained)["warning"])


@pytest.mark.parametrize("tied", [True, False])
def test_full_weights_are_passed_on(tmp_path: Path, tied: bool) -> None:
    model = make_model(tmp_path / "model", tie_word_embeddings=tied)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        loaded.get_input_embeddings().weight.mul_(2)
    loaded.save_pretrained(tmp_path / "trained/weights")
    facts = run(tmp_path / "output", model, tmp_path / "trained")
    assert facts["changed_tensors"] == 1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "output")
    ids = torch.arange(9)[None]
    assert torch.equal(merged(ids).logits, loaded(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "output").chat_template == TEMPLATE


def test_the_folder_carries_the_template_that_the_data_was_rendered_with(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    trained = make_adapter(tmp_path / "trained", model)
    templates = tmp_path / "templates"
    for shard in ("a", "b"):
        (templates / shard).mkdir(parents=True)
        (templates / shard / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    run(tmp_path / "output", model, trained, templates)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "output")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<hi>"
    (templates / "b" / "chat_template.jinja").write_text("another")
    with pytest.raises(UserError, match="different chat templates"):
        run(tmp_path / "again", model, trained, templates)


@pytest.mark.parametrize("used", ["own", "another"])
@pytest.mark.parametrize("named", [True, False])
def test_whoever_reads_the_folder_finds_the_template_that_the_data_was_rendered_with(
    tmp_path: Path, used: str, named: bool
) -> None:
    model = make_model(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    path = model / "tokenizer_config.json"
    own = [{"name": "default", "template": "own"}, {"name": "tool_use", "template": "tools"}] if named else "own"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": own}))
    (model / "chat_template.json").write_text(json.dumps({"chat_template": "own"}))
    run(tmp_path / "output", model, make_adapter(tmp_path / "trained", model), rendered_with(tmp_path / "t", used))
    assert AutoTokenizer.from_pretrained(tmp_path / "output").chat_template == used
    read = SpecialVocab(tmp_path / "output").chat_template
    assert read == (own if used == "own" else used), "llama.cpp looks into tokenizer_config.json first"
    assert (tmp_path / "output/chat_template.json").exists() == (used == "own")
    kept = json.loads((tmp_path / "output/tokenizer_config.json").read_text())
    assert {**kept, "chat_template": own} == json.loads(path.read_text())


def chatml_model(folder: Path, eos: int | list[int]) -> Path:
    """A model with ChatML's tokens (256 and 257) and a token of its own that ends a text (258)."""
    tokens = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    tiny.save(folder, "LlamaConfig", vocab_size=259, eos_token_id=eos, pad_token_id=258)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, *tokens])}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    bare.add_special_tokens(tokens)
    PreTrainedTokenizerFast(tokenizer_object=bare, eos_token=tokens[2], pad_token=tokens[2]).save_pretrained(folder)
    return folder


def rendered_with(folder: Path, template: str) -> Path:
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize(("rendered", "own", "told"), [(False, True, True), (False, False, False), (True, True, False)])
def test_a_model_that_is_asked_otherwise_than_it_was_trained_is_told_of(
    tmp_path: Path, rendered: bool, own: bool, told: bool
) -> None:
    model = chatml_model(tmp_path / "model", eos=258)
    chatml = templates.find("chatml").text
    if own:
        (model / "chat_template.jinja").write_text(chatml)
    (tmp_path / "raw").mkdir()
    used = rendered_with(tmp_path / "templates", chatml) if rendered else tmp_path / "raw"
    facts = run(tmp_path / "output", model, make_adapter(tmp_path / "trained", model), used)
    assert ("trained on raw text" in str(facts.get("warning"))) == told


@pytest.mark.parametrize("written", [True, False], ids=["generation_config.json", "without it"])
@pytest.mark.parametrize("full", [True, False], ids=["full", "lora"])
def test_the_model_stops_where_a_turn_of_its_template_ends(tmp_path: Path, full: bool, written: bool) -> None:
    model = chatml_model(tmp_path / "model", eos=258)
    if full:
        AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "trained/weights")
    else:
        make_adapter(tmp_path / "trained", model)
    a, end = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(["a", "<|im_end|>"])
    path = model / "generation_config.json"
    if written:
        path.write_text(json.dumps({**json.loads(path.read_text()), "top_k": 7}))
    else:
        path.unlink()
    run(tmp_path / "output", model, tmp_path / "trained", rendered_with(tmp_path / "t", templates.find("chatml").text))

    settings = json.loads((tmp_path / "output/generation_config.json").read_text())
    assert settings["eos_token_id"] == [258, end] and settings["pad_token_id"] == 258
    assert settings.get("top_k") == (7 if written else None)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "output")
    asked = torch.tensor([[5, 6, 7]])
    bias = [[[a], 1e4], [[a, end], 2e4]]  # it says "a", ends its turn, says "a", and so on
    made = merged.generate(asked, max_new_tokens=8, do_sample=False, sequence_bias=bias)
    assert made[0, 3:].tolist() == [a, end]


@pytest.mark.parametrize(
    ("eos", "template"),
    [
        ([258, 257], templates.find("chatml").text),
        (258, templates.find("zephyr").text),
        (258, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"),
        (258, "{% for m in messages %}{{ m.role }}: {{ m.content }}#{% endfor %}"),
    ],
    ids=["known", "the model's own", "nothing", "words"],
)
def test_a_template_that_ends_in_no_other_token_changes_no_stop(
    tmp_path: Path, eos: int | list[int], template: str
) -> None:
    model = chatml_model(tmp_path / "model", eos)
    trained = make_adapter(tmp_path / "trained", model)
    run(tmp_path / "output", model, trained, rendered_with(tmp_path / "templates", template))
    name = "generation_config.json"
    assert (tmp_path / "output" / name).read_bytes() == (model / name).read_bytes()


def test_an_adapter_that_parts_embeddings_from_the_head_that_shares_their_weights_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "GPT2Config", n_embd=32, n_layer=2, n_head=4, n_positions=256)
    trained = make_adapter(tmp_path / "trained", model, modules_to_save=["wte"])
    with pytest.raises(UserError, match=r"merge: lm_head\.weight belongs to one of the merged model"):
        run(tmp_path / "merged", model, trained)
