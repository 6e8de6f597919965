"""Tokens that a recipe adds: one id each, rows that start as the mean, everything else as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.recipe import check
from flows.strict_yaml import parse
from stages.errors import UserError
from stages.fetch import STAGE, FetchConfig, FetchPart, resolve
from stages.runtime import Runtime
from stages.stage import Work
from stages.tokenizer_files import words_of
from tests.stages import tiny
from tests.stages.test_merge import make_model


def fetch(model: Path, output: Path, *tokens: str) -> Any:
    config = FetchConfig.model_validate(
        {"model": {"path": str(model), "new_tokens": list(tokens)}, "data": {"a": {"reasoning_gym": "x", "size": 1}}}
    )
    part = resolve(config.model_copy(update={"data": {}}), output.with_name("cache"))[0]
    output.mkdir()
    return STAGE.run(FetchPart.model_validate(part.config), {}, output, Work(output, Runtime(), where=part.where))


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_have_one_id_and_the_mean_of_all_rows(tmp_path: Path, tied: bool) -> None:
    model = make_model(tmp_path / "model", tie_word_embeddings=tied, dtype="bfloat16")
    facts = fetch(model, tmp_path / "out", "<tool>", "</tool>")
    assert facts["new_tokens"] == {"<tool>": 256, "</tool>": 257}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    old = AutoTokenizer.from_pretrained(model)
    assert tokenizer("<tool>")["input_ids"] == [256] and tokenizer("a <b")["input_ids"] == old("a <b")["input_ids"]
    before, after = (AutoModelForCausalLM.from_pretrained(f, dtype="auto") for f in (model, tmp_path / "out"))
    assert after.config.vocab_size == 258 and after.dtype == torch.bfloat16
    for name in ("embed_tokens", "lm_head"):
        one, two = (
            m.get_input_embeddings() if name == "embed_tokens" else m.get_output_embeddings() for m in (before, after)
        )
        assert torch.equal(two.weight[:256], one.weight)
        assert torch.equal(two.weight[257], one.weight.float().mean(0).bfloat16())
    ids = torch.tensor([old("as it was")["input_ids"]])
    torch.testing.assert_close(after(ids).logits[..., :256], before(ids).logits)


@pytest.mark.parametrize("rows", [256, 300])
def test_a_heads_bias_of_a_new_token_is_the_mean_of_the_real_ones(tmp_path: Path, rows: int) -> None:
    """Phi-2's head has a bias, and rows that no token has, whose biases training made very low."""
    model = make_model(tmp_path / "model", "PhiConfig", dtype="bfloat16")
    before = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    before.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        before.lm_head.bias.copy_(torch.randn(rows) - 3)
        before.lm_head.bias[256:] = -20
    before.save_pretrained(model)
    fetch(model, tmp_path / "out", "<tool>", "</tool>")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").lm_head.bias
    real = before.lm_head.bias[:256]
    assert torch.equal(after[:256], real) and torch.equal(after[258:], before.lm_head.bias[258:])
    assert after[256] == after[257] == real.float().mean().bfloat16()


def with_gap(folder: Path, last: int) -> Path:
    """A model whose tokenizer has ids from 0 to 255, and `<eos>` as its `last`."""
    make_model(folder)
    tiny.save(folder, "LlamaConfig", vocab_size=288)
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["vocab"]["<eos>"] = last
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    document["added_tokens"] = [{"id": last, "content": "<eos>", "special": True, **flags}]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


def test_of_a_tokenizer_whose_ids_have_gaps_the_ids_are_those_that_every_reader_gives(tmp_path: Path) -> None:
    model, out = with_gap(tmp_path / "model", 270), tmp_path / "out"
    facts = fetch(model, out, "<tool>", "</tool>")
    ids = AutoTokenizer.from_pretrained(out)("<tool></tool>", add_special_tokens=False)["input_ids"]
    assert list(facts["new_tokens"].values()) == ids == [words_of(out)[word] for word in ("<tool>", "</tool>")]
    before, after = (AutoModelForCausalLM.from_pretrained(f).get_input_embeddings().weight for f in (model, out))
    assert [row for row in range(288) if not torch.equal(before[row], after[row])] == ids


def test_new_tokens_take_no_id_of_another(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="would get 258, which another token has: add fewer"):
        fetch(with_gap(tmp_path / "model", 258), tmp_path / "out", "<a>", "<b>")


def test_a_token_that_is_there_already_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 'a' already"):
        fetch(make_model(tmp_path / "model"), tmp_path / "out", "a")


def test_an_adapter_that_leaves_new_tokens_untrained_is_refused() -> None:
    text = """
name: tools
fetch:
  model: {path: model, new_tokens: [<tool>]}
  data: {a: {files: x}}
convert: {format: messages}
"""
    document = parse(text, "r.yaml")
    with pytest.raises(UserError, match=r"r.yaml:4: `<tool>` would stay as it starts: name it in `train.lora.new_tok"):
        check(document.value, document, "r.yaml")
    trained = parse(text + "train: {lora: {new_tokens: [<tool>]}}\n", "r.yaml")
    check(trained.value, trained, "r.yaml")
