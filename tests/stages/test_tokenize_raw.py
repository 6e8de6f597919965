"""tokenize: raw text and ids from elsewhere, with the begin and the end that the tokenizer itself would give them."""

import json
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from stages.marks import ORIGIN_CONTENT
from stages.marks import TRAIN_NO as NO
from stages.marks import TRAIN_YES as YES
from stages.tokenizer_files import read_tokenizer
from tests.stages.chats import rows_of, run_convert, run_tokenize, smollm2, source
from tests.stages.test_tokenize import Real, byte_level, number_of, real, sentencepiece

__all__ = ["real"]


def test_completion_text_is_tokenized_as_transformers_does_with_its_own_ends(tmp_path: Path, real: Real) -> None:
    rows = source(tmp_path / "rows", [{"text": "Once upon a time."}, {"text": ""}])
    converted, _ = run_convert(tmp_path, rows, smollm2(), {"format": "completion"})
    output, _ = run_tokenize(tmp_path, converted, smollm2())
    assert [row["ids"] for row in rows_of(output)] == [[*real.ids("Once upon a time."), 2], [2]]


@pytest.mark.parametrize("kind", ["by its class", "by the model's type"])
def test_the_end_of_a_text_is_known_where_only_the_tokenizers_class_names_it(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "gpt2"
    folder.mkdir()
    made = byte_level()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(folder / "tokenizer.json"))
    by_class = {"tokenizer_class": "GPT2Tokenizer"} if kind == "by its class" else {}
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1024, **by_class}))
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for row, config in (({"text": "Hi."}, {"format": "completion"}), (talk, {"template": "plain"})):
        own = tmp_path / config.get("template", "text")
        converted, _ = run_convert(own, source(own / "rows", [row]), folder, config)
        (found,) = rows_of(run_tokenize(own, converted, folder)[0])
        assert json.loads((converted / "counts.json").read_text())["turns_without_end"] == 0
        assert end in found["ids"][-3:]
    # What the files say goes first, also that there is none; and what transformers says is remembered.
    named = {"bos_token": None, **by_class}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    assert set(read_tokenizer(folder, tmp_path / "memory").variables) == {"eos_token", "unk_token"}
    (held,) = (tmp_path / "memory").iterdir()
    held.write_text('{"eos_token": "<|endoftext|>"}')
    assert set(read_tokenizer(folder, tmp_path / "memory").variables) == {"eos_token"}


def test_named_tokens_that_the_vocabulary_lacks_are_none(tmp_path: Path) -> None:
    made = byte_level()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert read_tokenizer(tmp_path).variables == {}


BEGUN = ["hi", " hi", "  hi", "\nhi", "▁hi", "", "é", "hi <s>", "x</s>"]


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_raw_text_begins_as_the_tokenizer_itself_begins_it(tmp_path: Path, scheme: str) -> None:
    made = sentencepiece(scheme)
    made.add_special_tokens(["<s>", "</s>"])
    begin, end = number_of(made, "<s>"), number_of(made, "</s>")
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    folder = tmp_path / "model"
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>"}'
    )
    rows = source(tmp_path / "rows", [{"prompt": text, "completion": "x"} for text in BEGUN])
    config = {"format": "prompt_completion", "options": {"wording": "text"}, "template": "plain"}
    converted, _ = run_convert(tmp_path, rows, folder, config)
    found = rows_of(run_tokenize(tmp_path, converted, folder)[0])
    made.encode_special_tokens = True  # what the data says of them is text
    for text, row in zip(BEGUN, found, strict=True):
        assert row["ids"] == [begin, *made.encode(text + "x", add_special_tokens=False).ids, end]
        trained = [s for s in row["spans"] if s["train"] != NO and s["role"] == "text"]
        assert trained[0]["end"] == len(row["ids"]) - 1 + (trained[0]["origin"] != ORIGIN_CONTENT)


@pytest.mark.parametrize("trained", ["01", "0011", "0010", "1010", "0110011010", "1111", "0101010101010101"])
def test_ids_from_elsewhere_train_where_their_labels_say(tmp_path: Path, trained: str) -> None:
    ids = list(range(10, 10 + len(trained)))
    labels = [token if flag == "1" else -100 for token, flag in zip(ids, trained, strict=True)]
    rows = source(tmp_path / "rows", [{"input_ids": ids, "labels": labels}])
    converted, _ = run_convert(tmp_path, rows, smollm2())
    [row] = rows_of(run_tokenize(tmp_path, converted, smollm2())[0])
    assert row["ids"] == ids
    assert "".join(str(int(s["train"] == YES)) * (s["end"] - s["start"]) for s in row["spans"]) == trained
