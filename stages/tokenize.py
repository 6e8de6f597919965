"""tokenize: rendered conversations become token ids, with the spans carried over to tokens.

Ids are what Hugging Face's tokenizer gives for the same text, with two exceptions. Control tokens are only those that
the chat template wrote: `<|im_end|>` in a user's message is encoded as ordinary text. And where a token would reach
over the end of a prompt (`<think>` and a line break) into what the template writes of the answer (another one, and
`</think>`), the text is encoded in pieces that end there, as the prompt is at inference.

One shard in; out come `tokens.arrow` (`stages.tables.tokens_schema`), `spans.arrow` (`SPANS`) and `counts.json`. The
work is in `stages.tokenizing`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.identity import Tree
from stages.stage import Facts, Part, Stage, StageConfig, Work


class TokenizeConfig(StageConfig):
    """Nothing to choose: the tokenizer comes with the model."""


def parts(config: TokenizeConfig, inputs: Mapping[str, Tree]) -> Sequence[Part]:
    """One part a shard of `conversations`."""
    templates = inputs["tokenizer"].select("chat_template*").files
    tokenizer = Tree(tuple(file for file in inputs["tokenizer"].files if file not in templates))
    return [
        Part(name=shard, config={}, inputs={"conversations": conversations, "tokenizer": tokenizer})
        for shard, conversations in inputs["conversations"].folders().items()
    ]


def run(config: TokenizeConfig, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    """Tokenize one shard: `tokens.arrow`, `spans.arrow` and `counts.json`."""
    from stages.tokenizing import tokenize

    return tokenize(config, inputs, output, work)


STAGE = Stage(
    name="tokenize",
    artifact="tokens",
    version=8,
    config=TokenizeConfig,
    run=run,
    parts=parts,
    part=TokenizeConfig,
    without=("pandas",),
    libraries=("tokenizers", "transformers"),
)
