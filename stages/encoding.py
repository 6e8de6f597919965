"""Encoding: text with spans to token ids with spans, exactly as Hugging Face's tokenizer would, except for forgeries.

Control tokens are only those that the chat template wrote; their text in content is encoded as text. No token reaches
over the end of a prompt into what the template writes of the answer: the model is asked with the prompt's own tokens.
A token belongs to the span that holds its first byte. For byte-level vocabularies the first bytes come from the ids
alone (cumulative byte lengths, checked by their sum row by row); every other row asks the tokenizer for its offsets.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from stages import exact_json, fast_encoding
from stages.errors import UserError
from stages.fast_encoding import Fast, Ids, Positions
from stages.marks import ORIGIN_CONTENT, ORIGIN_END, ORIGIN_TEMPLATE, TRAIN_NO

_SAMPLES = ("Hello world", " lead", "\n\n x", "a  b", "12 345", "é漢字🙂")


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with what the fast path needs to know of it."""

    settings: dict[str, Any]
    """`tokenizer.json`, with control tokens marked special and without its post-processor."""
    lengths: npt.NDArray[np.int64] | None
    """Bytes of each id's text, for byte-level vocabularies without a normalizer that changes text."""
    nfc: bool
    """Whether text is brought into NFC first: `lengths` then hold only for text that already is."""
    control: npt.NDArray[np.bool_]
    """Whether an id is a control token."""
    matching: Any
    """The tokenizer as it is: control tokens are matched wherever they stand."""
    trusted: bool = False
    """Whether control tokens may stand in content too."""
    fast: Fast | None = None
    """The fast backend, in which `matching` does not have to be asked; only where there are `lengths`."""
    prompt: str = ""
    """What the chat template asks the assistant with."""

    @cached_property
    def rest(self) -> Any:
        """`matching` for what follows a control token: without the space that some put before a text."""
        changed = _without_prefix(self.settings)
        return _tokenizer({**self.settings, **changed}) if changed else self.matching

    def plain(self, text: str, first: bool) -> Any:
        """The encoding of a text in which control tokens are text, at the start of a row or after a control token."""
        tokenizer = self.matching if first else self.rest
        tokenizer.encode_special_tokens = True
        try:
            return tokenizer.encode(text, add_special_tokens=False)
        finally:
            tokenizer.encode_special_tokens = False

    @cached_property
    def spaced(self) -> bool:
        """Whether a space is put before the first word of a text, and of no other text after a control token."""
        return bool(_without_prefix(self.settings))

    @cached_property
    def tokens(self) -> dict[str, dict[str, Any]]:
        """The control tokens by their text, as `tokenizer.json` describes them."""
        return {token["content"]: token for token in self.settings["added_tokens"] if token["special"]}

    @cached_property
    def stripping(self) -> dict[int, bytes]:
        """The texts of the control tokens that swallow white space around them, by id."""
        return {t["id"]: t["content"].encode() for t in self.tokens.values() if t["lstrip"] or t["rstrip"]}

    @cached_property
    def composes(self) -> bool:
        """Whether what follows a control token is encoded as `plain` does it, so that a row can be put together."""
        for text, token in self.tokens.items():
            if not (token["lstrip"] or token["rstrip"] or token["single_word"]):
                for sample in _SAMPLES:
                    apart = [*self.plain(sample, True).ids, token["id"], *self.plain(sample, False).ids]
                    if _ids(self.matching, sample + text + sample) != apart:
                        return False
        return True

    @cached_property
    def divides(self) -> bool:
        """Whether a text may be encoded in pieces: nothing is put before a piece."""
        return _ids(self.matching, "a\n") == [*_ids(self.matching, "a"), *_ids(self.matching, "\n")]

    @cached_property
    def pattern(self) -> "re.Pattern[str]":
        """Matches the text of a control token, the longest at its place."""
        return re.compile("|".join(re.escape(text) for text in sorted(self.tokens, key=len, reverse=True)) or r"(?!)")


def load(
    tokenizer_json: str, control: Sequence[str], *, trusted: bool = False, fast: bool = True, prompt: str = ""
) -> Encoder:
    """Make an encoder, with its fast backend or not. `control` are texts that are control tokens besides those that the
    file calls special; `prompt` is what the chat template asks the assistant with."""
    settings = exact_json.loads(tokenizer_json)
    settings["post_processor"] = settings["truncation"] = settings["padding"] = None
    added = settings["added_tokens"] = settings.get("added_tokens") or []
    for token in added:
        token["special"] = token["special"] or token["content"] in control
    matching = _tokenizer(settings)
    vocabulary: dict[str, int] = matching.get_vocab(with_added_tokens=True)
    size = max(vocabulary.values()) + 1
    flags = np.zeros(size, np.bool_)
    flags[[token["id"] for token in added if token["special"]]] = True
    normalizers = [step["type"] for step in _steps(settings.get("normalizer"), "normalizers")]
    byte_level = any(step["type"] == "ByteLevel" for step in _steps(settings.get("pre_tokenizer"), "pretokenizers"))
    lengths = None
    if byte_level and normalizers in ([], ["NFC"]):
        lengths = np.zeros(size, np.int64)
        lengths[list(vocabulary.values())] = [len(text) for text in vocabulary]
        for token in added:
            lengths[token["id"]] = len(token["content"].encode())
    other = fast_encoding.load(settings, matching) if fast and lengths is not None else None
    return Encoder(settings, lengths, normalizers == ["NFC"], flags, matching, trusted, other, prompt)


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found


def _tokenizer(settings: Mapping[str, Any]) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_str(exact_json.dumps(settings))


def _steps(step: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    if not step:
        return []
    return [s for part in step[inner] for s in _steps(part, inner)] if step["type"] == "Sequence" else [step]


def _without_prefix(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The pre-tokenizer without the space that some put before the first word of a text only; empty if it puts none."""

    def changed(step: Any) -> Any:
        if isinstance(step, dict):
            step = {name: changed(value) for name, value in step.items()}
            return {**step, "prepend_scheme": "never"} if step.get("prepend_scheme") == "first" else step
        return [changed(item) for item in step] if isinstance(step, list) else step

    found = changed(settings.get("pre_tokenizer"))
    return {} if found == settings.get("pre_tokenizer") else {"pre_tokenizer": found}


@dataclass(frozen=True)
class Encoded:
    """Rows as ids: `ids` and the byte at which each token starts, counted through all rows, flat; `counts` are tokens
    a row."""

    ids: Ids
    starts: Positions
    counts: Positions
    exact: int
    """Rows that did not take the fast path."""
    forged: int
    """Rows that hold the text of a control token, which is encoded as text."""


@dataclass(frozen=True)
class Spans:
    """Spans of some rows, flat: bytes at which they start in their row, ORIGIN_*, TRAIN_*, and how many a row has."""

    starts: Positions
    origins: npt.NDArray[np.uint8]
    trains: npt.NDArray[np.uint8]
    counts: Positions


def encode(encoder: Encoder, texts: list[str], sizes: Positions, spans: Spans) -> Encoded:
    """Encode rows of `sizes` bytes. Raises Unwritable when a control token's text cannot be written as plain text."""
    ids, starts, counts, slow = _matched(encoder, texts, sizes)
    base = np.cumsum(sizes) - sizes
    forged = () if encoder.trusted else _rows_with_forged(encoder, texts, ids, starts, counts, base, sizes, spans)
    across = np.setdiff1d(_rows_across_prompts(encoder, starts, base, spans), forged)
    if not len(forged) and not len(across):
        return Encoded(ids, starts, counts, int(slow.sum()), 0)
    first_token = np.cumsum(counts) - counts
    first_span = np.cumsum(spans.counts) - spans.counts
    all_ids, all_starts = np.split(ids, first_token[1:]), np.split(starts, first_token[1:])

    def layout(row: int) -> tuple[list[int], list[int], list[int]]:
        """Borders and origins of a row's spans, and where its prompts end."""
        here = slice(first_span[row], first_span[row] + spans.counts[row])
        bounds, origins = [*spans.starts[here].tolist(), int(sizes[row])], spans.origins[here].tolist()
        return bounds, origins, _prompt_ends(encoder, texts[row].encode(), bounds, origins)

    again = [(row, ends) for row in across.tolist() if (ends := layout(row)[2])]
    found = _in_pieces(encoder, [(texts[row].encode(), ends) for row, ends in again])
    for (row, _), (own_ids, own, exact) in zip(again, found, strict=True):
        all_ids[row], all_starts[row], counts[row], slow[row] = own_ids, own + base[row], len(own), exact
    for row in forged:
        try:
            all_ids[row], own = encode_around(encoder, texts[row], *layout(row))
        except UserError as error:
            raise Unwritable(int(row), str(error)) from error
        all_starts[row] = own + base[row]
        counts[row] = len(own)
        slow[row] = True
    return Encoded(np.concatenate(all_ids), np.concatenate(all_starts), counts, int(slow.sum()), len(forged))


class Unwritable(UserError):
    """A row (`row`, counted within the call) with text that this tokenizer can only read as a control token."""

    def __init__(self, row: int, detail: str) -> None:
        super().__init__(detail)
        self.row = row


def _matched(
    encoder: Encoder, texts: list[str], sizes: Positions
) -> tuple[Ids, Positions, Positions, npt.NDArray[np.bool_]]:
    """Texts as the tokenizer reads them: ids, the byte at which each token starts (counted through all texts), tokens a
    text, and which texts did not take the fast path."""
    encodings: Sequence[Any] = []
    if encoder.fast is not None:
        ids, counts = encoder.fast.encode(texts)
    else:
        batch = encoder.matching.encode_batch if encoder.lengths is None else encoder.matching.encode_batch_fast
        encodings = batch(texts, add_special_tokens=False)
        counts = np.fromiter((len(encoding) for encoding in encodings), np.int64, len(texts))
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.uint32, int(counts.sum()))
    starts, slow = _starts(encoder, texts, sizes, np.cumsum(sizes) - sizes, encodings, ids, counts)
    return ids, starts, counts, slow


def _starts(
    encoder: Encoder,
    texts: list[str],
    sizes: Positions,
    base: Positions,
    encodings: Sequence[Any],
    ids: Ids,
    counts: Positions,
) -> tuple[Positions, npt.NDArray[np.bool_]]:
    """The byte at which each token starts, counted through all rows (each begins at its `base`), and which rows had to
    ask the tokenizer for it."""
    slow = np.ones(len(texts), np.bool_)
    starts = np.zeros(len(ids), np.int64)
    ends_of_rows = np.cumsum(counts)
    if encoder.lengths is not None:
        through = np.zeros(len(ids) + 1, np.int64)
        np.cumsum(encoder.lengths[ids], out=through[1:])
        starts = through[:-1]
        found = through[np.concatenate(([0], ends_of_rows))]
        slow = np.diff(found) != sizes
        if slow.any():
            starts += np.repeat(base - found[:-1], counts)
        if encoder.nfc:
            slow |= np.fromiter((not unicodedata.is_normalized("NFC", text) for text in texts), np.bool_, len(texts))
    rows = np.flatnonzero(slow)
    if encoder.lengths is not None:  # these came without offsets
        encodings = encoder.matching.encode_batch([texts[row] for row in rows], add_special_tokens=False)
    for row, encoding in zip(rows, encodings, strict=True):
        starts[ends_of_rows[row] - counts[row] : ends_of_rows[row]] = _offsets(encoding, texts[row]) + base[row]
    return starts, slow


def _offsets(encoding: Any, text: str) -> Positions:
    """The byte at which each token starts, from the tokenizer's offsets, which count characters."""
    starts = np.maximum.accumulate(_bytes(text, [start for start, _ in encoding.offsets]))
    return np.minimum(starts, len(text.encode()) - 1)


def _bytes(text: str, characters: Sequence[int]) -> Positions:
    """Positions in characters as positions in UTF-8 bytes."""
    found = np.array(characters, np.int64)
    if text.isascii():
        return found
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    widths = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    return np.concatenate(([0], np.cumsum(widths)))[found]


def _rows_with_forged(
    encoder: Encoder,
    texts: Sequence[str],
    ids: Ids,
    starts: Positions,
    counts: Positions,
    base: Positions,
    sizes: Positions,
    spans: Spans,
) -> Positions:
    """Rows where a control token was matched in text that did not come from the template alone."""
    tokens = np.flatnonzero(encoder.control[ids])
    if not len(tokens):
        return tokens
    span_starts = spans.starts + np.repeat(base, spans.counts)
    content_before = np.concatenate(([0], np.cumsum(spans.origins == ORIGIN_CONTENT)))
    ends_of_rows = np.cumsum(counts)
    rows = np.searchsorted(ends_of_rows, tokens, "right")
    last = tokens + 1 == ends_of_rows[rows]
    high = np.where(last, base[rows] + sizes[rows], starts[np.minimum(tokens + 1, len(ids) - 1)])
    low = starts[tokens]

    def forged() -> npt.NDArray[np.bool_]:
        first_span = np.searchsorted(span_starts, low, "right") - 1
        last_span = np.searchsorted(span_starts, high - 1, "right") - 1
        return content_before[last_span + 1] > content_before[first_span]

    if encoder.stripping:  # the white space that such a token swallows may be content, its own text is what counts
        for number in np.flatnonzero(forged() & np.isin(ids[tokens], list(encoder.stripping))).tolist():
            own, data = encoder.stripping[int(ids[tokens[number]])], texts[rows[number]].encode()
            at = data.find(own, low[number] - base[rows[number]], high[number] - base[rows[number]])
            if at >= 0:
                low[number] = base[rows[number]] + at
                high[number] = low[number] + len(own)
    return np.unique(rows[forged()])


def _rows_across_prompts(encoder: Encoder, starts: Positions, base: Positions, spans: Spans) -> Positions:
    """Rows where a token reaches over the end of a prompt into what the template writes of the answer."""
    if not encoder.prompt or not encoder.divides:
        return np.empty(0, np.int64)
    row = np.repeat(np.arange(len(base)), spans.counts)
    ends = np.flatnonzero((spans.origins[:-1] == ORIGIN_TEMPLATE) & (spans.origins[1:] == ORIGIN_END)) + 1
    at = spans.starts[ends] + base[row[ends]]
    return np.unique(row[ends][np.append(starts, -1)[np.searchsorted(starts, at)] != at])


def _prompt_ends(encoder: Encoder, data: bytes, bounds: list[int], origins: list[int]) -> list[int]:
    """Where, in bytes, a whole prompt ends and the template goes on with what the assistant has to write."""
    prompt = encoder.prompt.encode()
    if not prompt or not encoder.divides:
        return []
    meeting = zip(bounds[1:], pairwise(origins), strict=False)
    return [at for at, origin in meeting if origin == (ORIGIN_TEMPLATE, ORIGIN_END) and data.endswith(prompt, 0, at)]


def _in_pieces(encoder: Encoder, rows: Sequence[tuple[bytes, list[int]]]) -> Iterator[tuple[Ids, Positions, bool]]:
    """Rows in pieces, which end at some bytes: a row's ids, the byte in it at which each token starts, and whether it
    did not take the fast path."""
    if not rows:
        return
    borders = [[0, *ends, len(data)] for data, ends in rows]
    pieces = [data[low:high] for (data, _), own in zip(rows, borders, strict=True) for low, high in pairwise(own)]
    sizes = np.array([len(piece) for piece in pieces], np.int64)
    ids, starts, counts, slow = _matched(encoder, [piece.decode() for piece in pieces], sizes)
    first = np.cumsum([0, *(len(own) - 1 for own in borders[:-1])])
    cuts = np.cumsum(np.add.reduceat(counts, first))[:-1]
    base = (np.cumsum(sizes) - sizes)[first]
    asked = np.logical_or.reduceat(slow, first)
    for own_ids, own, at, exact in zip(np.split(ids, cuts), np.split(starts, cuts), base, asked, strict=True):
        yield own_ids, own - at, bool(exact)


def encode_around(
    encoder: Encoder, text: str, bounds: list[int], origins: list[int], ends: Sequence[int] = ()
) -> tuple[Ids, Positions]:
    """Ids and first bytes of one row whose content holds the text of control tokens.

    `bounds` are the spans' borders in bytes, from 0 to the end. Only control tokens inside the template's spans
    become tokens; everything between two of them is encoded as plain text, the way the tokenizer itself goes on
    after a control token; and no token reaches over the bytes `ends`, where prompts end. Raises UserError when the
    tokenizer does not let itself be kept from it.
    """
    if not encoder.composes:
        raise UserError(
            "it holds the text of a control token, which this kind of tokenizer cannot be kept from reading"
        )
    data = text.encode()
    ids: list[int] = []
    starts: list[int] = []  # in characters
    done = 0
    cuts = [len(data[:end].decode()) for end in ends]

    def write(stop: int) -> None:
        nonlocal done
        for cut in cuts:
            if done < cut < stop:
                write(cut)
        if done < stop:
            encoding = encoder.plain(text[done:stop], done == 0)
            if encoder.control[encoding.ids].any():
                raise UserError("it holds the text of a control token, which this tokenizer cannot write as plain text")
            ids.extend(encoding.ids)
            starts.extend(done + start for start, _ in encoding.offsets)
        done = max(done, stop)

    for first, last in _template_ranges(bounds, origins):
        low, high = len(data[:first].decode()), len(data[:last].decode())
        for match in encoder.pattern.finditer(text, low, high):
            token = encoder.tokens[match[0]]
            start, stop = match.span()
            if token["lstrip"]:
                start = done + len(text[done:start].rstrip())
            if token["rstrip"]:
                stop = len(text) - len(text[stop:].lstrip())
            write(start)
            ids.append(token["id"])
            starts.append(start)
            done = stop
    write(len(text))
    return np.array(ids, np.uint32), _bytes(text, starts)


def _template_ranges(bounds: list[int], origins: list[int]) -> Iterator[tuple[int, int]]:
    """Byte ranges between contents, neighbouring spans joined."""
    start = None
    for at, origin in zip(bounds, [*origins, ORIGIN_CONTENT], strict=True):
        if origin == ORIGIN_CONTENT:
            if start is not None:
                yield start, at
            start = None
        elif start is None:
            start = at


def carry(spans: Spans, sizes: Positions, encoded: Encoded, texts: Sequence[str]) -> tuple[Positions, Positions]:
    """Spans in bytes as spans in tokens (begin and end, in their rows): a token goes where its first byte is.

    Between two texts of the data, where a part that trains may meet one that does not, it goes where its first byte is
    that is no white space: a space at the end of one is a token with the word that begins the other. What no white
    space parts is not to be learned when the data says so of the second.
    """
    base = np.cumsum(sizes) - sizes
    first_token = np.cumsum(encoded.counts) - encoded.counts
    row = np.repeat(np.arange(len(sizes)), spans.counts)
    at = spans.starts + base[row]
    begin = np.searchsorted(encoded.starts, at, "left")
    content = spans.origins == ORIGIN_CONTENT
    met = np.flatnonzero(content[1:] & content[:-1] & (row[1:] == row[:-1])) + 1
    met = met[(np.append(encoded.starts, -1)[begin[met]] != at[met]) & (begin[met] > first_token[row[met]])]
    for number in met.tolist():
        start = encoded.starts[begin[number] - 1] - base[row[number]]
        shared = texts[row[number]].encode()[start : spans.starts[number]]
        refused = spans.trains[number] == TRAIN_NO != spans.trains[number - 1]
        if shared.isspace() or refused:
            begin[number] -= 1
    begin = np.minimum.accumulate(begin[::-1])[::-1]  # where a token holds whole spans
    end = np.append(begin[1:], len(encoded.starts))
    return begin - first_token[row], end - first_token[row]
