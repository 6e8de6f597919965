"""Rows of Axolotl's data sets mean here what they mean there: the same texts and tokens, and the same of them train.

`axolotl_rows.json` holds rows, what a recipe says of them, and what Axolotl 0.21.0 made of them with SmolLM2's
tokenizer and its own template `chatml`: of preferences the texts that it hands to TRL (the transforms of
`prompt_strategies.dpo` and `.kto`), of all else ids and labels (`prompt_strategies.load(...).tokenize_prompt`), where
the text in double brackets is what has labels. Rows that it means otherwise are not there: docs/formats.md tells them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from stages import tokenize
from stages.runtime import Runtime
from stages.stage import Work
from stages.tables import read_table
from stages.tokenized import may_train, read_spans, trained_ranges
from tests.stages.chats import rows_of, run_convert, smollm2, source

CASES = json.loads((Path(__file__).parent / "axolotl_rows.json").read_text("utf-8"))


def marked(folder: Path, train_on: str) -> list[tuple[list[int], str]]:
    """Sequence by sequence the tokens, and their text with what trains in double brackets."""
    tokenizer = tokenizers.Tokenizer.from_file(str(smollm2() / "tokenizer.json"))
    spans = read_spans(read_table(folder / "spans.arrow"))
    _, counts, begins, ends = trained_ranges(spans, may_train(spans, train_on), spans.lengths)
    ranges = iter(zip(begins.tolist(), ends.tolist(), strict=True))
    found = []
    for row, count in zip(rows_of(folder), counts.tolist(), strict=True):
        ids, text, at = row["ids"], "", 0
        for begin, end in [next(ranges) for _ in range(count)]:
            before, trained = (
                tokenizer.decode(part, skip_special_tokens=False) for part in (ids[at:begin], ids[begin:end])
            )
            text += f"{before}⟦{trained}⟧"
            at = end
        found.append((ids, text + tokenizer.decode(ids[at:], skip_special_tokens=False)))
    return found


@pytest.mark.parametrize("case", CASES, ids=[case["type"] for case in CASES])
def test_rows_mean_what_they_mean_to_axolotl(
    case: dict[str, Any], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shard, facts = run_convert(tmp_path, source(tmp_path / "rows", case["rows"]), smollm2(), case["convert"])
    inputs = {"conversations": shard, "tokenizer": smollm2()}
    output = tmp_path / "tokens"
    output.mkdir()
    cache = tmp_path_factory.getbasetemp() / "cache-of-axolotl"  # so that the tokenizer is read once
    tokenize.run(tokenize.TokenizeConfig(), inputs, output, Work(tmp_path / "work", Runtime(cache=cache)))
    assert not facts["unwritten"]
    sequences = marked(output, case["train_on"])
    for wanted in case["axolotl"]:
        answers = wanted.get("answers") or wanted["ids"]
        got, sequences = sequences[: len(answers)], sequences[len(answers) :]
        if "answers" in wanted:
            # The line break after an answer's end is the template's, and TRL is not given it.
            texts = [text.removesuffix("\n") if text.endswith("⟧\n") else text for _, text in got]
            assert texts == [f"{wanted['prompt']}⟦{answer}⟧" for answer in answers]
        else:
            assert [ids for ids, _ in got] == wanted["ids"]
            assert [text for _, text in got] == wanted.get("marked", [text for _, text in got])
    assert not sequences
