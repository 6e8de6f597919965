"""Rows that are cut, and control tokens, where a changed line went unnoticed by all other tests."""

from pathlib import Path

from packing.collate import PackedBins
from stages.encoding import load as load_encoder
from stages.tables import LOG_PROBS, write_table
from tests.stages.packed import Packed, shard
from tests.stages.test_pack_pairs import pair
from tests.stages.test_tokenize import _written, byte_level, encoded, number_of


def test_of_a_row_that_is_cut_the_reference_is_cut_too(tmp_path: Path) -> None:
    """Or all that stands behind it in a sequence would be compared with another token's log-probability."""
    rows = [{**each, "row": number} for number, both in enumerate([pair(90, 20), pair(9, 11)]) for each in both]
    shard(tmp_path / "tokens", "judged/00000", rows, kind="preference", count=2)
    packed = Packed(tmp_path / "tokens", tmp_path / "cut", overlong="truncate")
    assert packed.facts["truncated"] == 1
    scored = [{"log_probs": [float(token) for token in each["ids"]]} for each in rows]
    write_table(tmp_path / "reference/judged/00000/log_probs.arrow", LOG_PROBS, scored)
    bins = PackedBins(tmp_path / "tokens", packed.output, reference=tmp_path / "reference")
    for number in range(len(bins)):
        reference = bins[number].reference
        assert reference is not None and reference.tolist() == bins[number].ids.tolist()


def test_of_two_control_tokens_the_longer_is_found_around_a_forgery() -> None:
    made = byte_level()
    made.add_special_tokens(["<|end|>", "<|end|>."])
    [tokens], _ = encoded(load_encoder(made.to_str(), []), [_written([("hi", 1), ("<|end|>.", 2), ("<|end|>", 1)])])
    ids = [number for number, _ in tokens]
    assert number_of(made, "<|end|>.") in ids and number_of(made, "<|end|>") not in ids
