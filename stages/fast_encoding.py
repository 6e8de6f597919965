"""The fast backend: fastokens, a BPE encoder many times faster than Hugging Face's tokenizers, where they agree.

It is optional (`pip install 'regrow[fast]'`) and changes no id: for every shard both encode a sample of its texts and
some hard ones, and where they differ, or where fastokens cannot read the tokenizer, Hugging Face's does all the work.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stages import exact_json

Ids = npt.NDArray[np.uint32]
Positions = npt.NDArray[np.int64]

HARD = (
    "Hello world",
    " lead",
    "trail  \n",
    "\n\n x\r\n\ty",
    "it's THEY'LL I'm we'Re",
    "a  b   c",
    "12 345,678.90 x1y2z3 ½ ² Ⅻ ٣٤ 一二",
    "é e\u0301 漢字かな 한국어 🙂 👩‍👩‍👧 ก็ مرحبا",
    "\u00a0\u200b\u2028\ufeff\x00\x7f",
    "if (x!=y){return a[i]->b;} // ...\n    \tdone---",
    "",
)
"""Texts on which encoders have been seen to differ, compared besides a shard's own."""


@dataclass(frozen=True)
class Fast:
    """A fastokens tokenizer. Ids from `made_up` on are ours: each stands for the ids in `meanings`, in order."""

    tokenizer: Any
    made_up: int
    meanings: Sequence[Ids]
    exact: Any
    """Hugging Face's tokenizer, for the rare text that fastokens refuses: a byte that the vocabulary does not have."""

    def encode(self, texts: list[str]) -> tuple[Ids, Positions]:
        """The ids of some texts, flat, and how many each has. Control tokens are matched wherever they stand."""
        try:
            return self._encode(texts)
        except ValueError:
            each = [self._encode_one(text) for text in texts]
        return np.concatenate([*each, np.empty(0, np.uint32)]), np.array([len(ids) for ids in each], np.int64)

    def _encode_one(self, text: str) -> Ids:
        try:
            return self._encode([text])[0]
        except ValueError:
            return np.array(self.exact.encode(text, add_special_tokens=False).ids, np.uint32)

    def _encode(self, texts: list[str]) -> tuple[Ids, Positions]:
        flat, bounds = self.tokenizer.encode_batch_flat(texts)
        ids: Ids = np.frombuffer(flat, np.uint32)
        counts: Positions = np.diff(np.frombuffer(bounds, np.uint64).astype(np.int64)).astype(np.int64)
        places = np.flatnonzero(ids >= self.made_up) if self.meanings else np.empty(0, np.int64)
        if len(places) == 0:
            return ids, counts
        rows = np.searchsorted(np.cumsum(counts), places, "right")
        meanings = [self.meanings[number] for number in ids[places] - self.made_up]
        np.add.at(counts, rows, [len(meaning) - 1 for meaning in meanings])
        return _put_in(ids, places, meanings), counts


def _put_in(ids: Ids, places: Positions, pieces: Sequence[Ids]) -> Ids:
    """`ids` with a piece at each of `places`, instead of the id there."""
    parts = []
    done = 0
    for place, piece in zip(places.tolist(), pieces, strict=True):
        parts += [ids[done:place], piece]
        done = place + 1
    return np.concatenate([*parts, ids[done:]])


def load(settings: Mapping[str, Any], exact: Any) -> Fast | None:
    """A fast tokenizer for what `tokenizer.json` says; None where fastokens is not there or cannot read it.

    `exact` is Hugging Face's for the same settings.
    """
    try:
        from fastokens import Tokenizer
    except ImportError:
        return None
    made_up = exact.get_vocab_size(with_added_tokens=True) + len(settings["added_tokens"])
    settings, meanings = _digits_as_tokens(settings, exact, made_up)
    try:
        return Fast(Tokenizer.from_json_str(exact_json.dumps(settings)), made_up, meanings, exact)
    except Exception:  # whatever it does not know of a tokenizer: the other way is always there
        return None


def agrees(fast: Fast, exact: Any, texts: Sequence[str]) -> bool:
    """Whether both give the same ids for every one of the texts and the hard ones."""
    texts = [*HARD, *texts]
    wanted = [encoding.ids for encoding in exact.encode_batch_fast(texts, add_special_tokens=False)]
    ids, counts = fast.encode(texts)
    return [found.tolist() for found in np.split(ids, np.cumsum(counts)[:-1])] == wanted


def _digits_as_tokens(settings: Mapping[str, Any], exact: Any, made_up: int) -> tuple[Mapping[str, Any], Sequence[Ids]]:
    """The same tokenizer without its step `Digits`, which makes fastokens ten times slower.

    That step cuts a text before and after every digit. Added tokens do so too: so each digit becomes one, with its own
    id where it has one, else with a made-up one that stands for the ids of the digit alone.
    """
    steps = (settings.get("pre_tokenizer") or {}).get("pretokenizers", [])
    kinds = [step["type"] for step in steps]
    if kinds != ["Digits", "ByteLevel"] or not steps[0]["individual_digits"] or steps[1]["add_prefix_space"]:
        return settings, []
    if settings.get("normalizer") or any(
        _has_digit(t["content"]) and t["normalized"] for t in settings["added_tokens"]
    ):
        return settings, []
    known = {token["content"] for token in settings["added_tokens"]}
    added: list[dict[str, Any]] = []
    meanings: list[Ids] = []
    for digit in _digits():
        ids = exact.encode(digit, add_special_tokens=False).ids
        if digit in known:
            continue
        if len(ids) == 1 and digit.isascii():
            number = ids[0]
        else:
            number = made_up + len(meanings)
            meanings.append(np.array(ids, np.uint32))
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        added.append({"id": number, "content": digit, **flags})
    return {**settings, "pre_tokenizer": steps[1], "added_tokens": [*settings["added_tokens"], *added]}, meanings


def _has_digit(text: str) -> bool:
    return any(unicodedata.category(character).startswith("N") for character in text)


def _digits() -> list[str]:
    """The characters that Hugging Face's step `Digits` takes for digits, whatever its version of Unicode."""
    from tokenizers.pre_tokenizers import Digits

    text = "".join(chr(point) for point in range(0x20000) if not 0xD800 <= point < 0xE000)
    found = []
    for piece, _ in Digits(individual_digits=True).pre_tokenize_str(text):
        if len(piece) == 1 and Digits(individual_digits=True).pre_tokenize_str(f"a{piece}") != [(f"a{piece}", (0, 2))]:
            found.append(piece)
    return found
