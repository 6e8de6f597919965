"""The plan's prompts as an online trainer asks them.

They come from the plan as token ids and go to TRL as text, so every prompt is first proven to give those ids again.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import processors
from transformers import AutoConfig, AutoTokenizer

from packing.collate import PackedBins
from stages import rewards
from stages.errors import UserError
from stages.rewards import RewardChoice
from stages.stage import Work
from stages.tables import read_table
from stages.train.data import number_of_row
from stages.train.windows import Windows
from stages.turn_end import turn_end

Row = dict[str, Any]


def template_of(templates: Path | None) -> str:
    """The chat template that convert used, which lies in `templates` and need not be the model's own; a recipe has one.
    Empty where prompts went through none."""
    found = sorted(templates.rglob("chat_template.jinja")) if templates else []
    return found[0].read_text("utf-8") if found else ""


def plain_tokenizer(folder: Path, templates: Path | None) -> Any:
    """A model's tokenizer that adds no begin or end token to a text: the plan's prompts have what the template gave
    them, and TRL asks without saying that nothing should be added. Its end is that of a turn in the template that
    convert used: by it TRL tells where a completion ends, of whose text it is no part."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    template = template_of(templates)
    if template and (end := turn_end(folder, template)) is not None:
        token = tokenizer.added_tokens_decoder[end]
        token.special = True  # or decoding would keep it
        tokenizer.add_special_tokens({"eos_token": token})
    return tokenizer


def read(
    inputs: Mapping[str, Path],
    work: Work,
    tokenizer: Any,
    kinds: Sequence[str],
    choices: Mapping[str, RewardChoice],
    new_tokens: int,
    messages: bool = False,
) -> list[Row]:
    """The plan's prompts in its order: their text, or their `messages` to render once more, and what rewards may look
    at. Raises UserError at one that does not become the same tokens again, leaves no room for a completion of
    `new_tokens`, or lacks a column that a reward reads."""
    bins = PackedBins(inputs["tokens"], inputs["plan"])
    windows = Windows(bins, work.show)
    if bins.kind not in kinds:
        raise UserError(
            f"an online objective trains on rows of kind prompt, and the plan holds rows of kind {bins.kind}: read the "
            "data with convert.format: prompt_only"
        )
    needed = {
        column: name
        for name, choice in choices.items()
        for reward, parsed in [rewards.load(choice)]
        for column in reward.needs(parsed)
    }
    context = positions(inputs["model"])
    rows: list[Row] = []
    windows.begin(range(bins.steps), 0)
    for number in range(len(bins)):
        windows.reach(number // bins.global_batch)
        packed = bins[number]
        begin = 0
        for length, document in zip(packed.lengths.tolist(), packed.documents.tolist(), strict=True):
            ids = packed.ids[begin : begin + length].tolist()
            begin += length
            if length + new_tokens > context:
                raise UserError(
                    f"train: {_place(inputs['plan'], document)}: a prompt of {length} tokens and "
                    f"max_new_tokens {new_tokens} are more than the {context} positions of the model: lower "
                    "train.objective_options.max_new_tokens, or pack.sequence_length, beyond which prompts are dropped"
                )
            text, columns = tokenizer.decode(ids), bins.extra(document)
            if tokenizer(text)["input_ids"] != ids:  # as TRL calls it
                raise UserError(
                    f"train: a prompt holds the text of a control token, which generation would take for one: "
                    f"{text[:300]!r}. Take such rows out with a filter"
                )
            for column, name in needed.items():
                if columns.get(column) is None:  # no completion could be worth anything
                    has = ", ".join(name for name, value in columns.items() if value is not None) or "none"
                    raise UserError(
                        f"the reward {name} reads the column {column!r}; a prompt has {has}: {text[:200]!r}"
                    )
            said = columns.pop("prompt", None) if messages else None  # else a column of the data's own
            if messages:
                _refuse_other(text, said, tokenizer)
            rows.append({"prompt": said if messages else text, "columns": json.dumps(columns)})
    return rows


def positions(folder: Path) -> float:
    """The most tokens that a model takes."""
    described = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    return getattr(described, "max_position_embeddings", None) or math.inf


def _place(plan: Path, document: int) -> str:
    """The row that a document of the plan is, for an error message."""
    (row,) = read_table(plan / "documents.arrow").slice(document, 1).to_pylist()
    shard = json.loads((plan / "plan.json").read_text())["shards"][row["shard"]]
    return f"{shard['path']} row {number_of_row(shard, row['number'])}"


def _refuse_other(text: str, messages: Any, tokenizer: Any) -> None:
    """Raise UserError for messages that do not become the prompt again."""
    if messages is None:
        raise UserError(
            "an environment needs the prompts' messages: set `convert.options: {keep_messages: true}` beside "
            "`convert.format: prompt_only`"
        )
    again = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if again != text:
        raise UserError(
            f"train: a prompt's messages are rendered as {again[-200:]!r} now, and were as {text[-200:]!r}. In an "
            "environment a row can have no tools of its own, and a chat template no date"
        )


def order(rows: int, total: int, seed: int) -> list[int]:
    """Which prompt is asked when: the plan's order, then permutations of it. Written out for all epochs, so that a step
    number alone says what is asked: TRL's own shuffling would begin anew in a run that goes on."""
    epochs = [np.arange(rows)]
    epochs += [np.random.default_rng((seed, epoch)).permutation(rows) for epoch in range(1, -(-total // rows))]
    return [int(row) for row in np.concatenate(epochs)[:total]]
