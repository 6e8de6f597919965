"""score: the log-probability that the model before training gives every token.

What preference objectives compare with, computed once: the artifact's key is the model and the tokens, so every run and
sweep that shares them finds it, and training needs no reference model in memory. It is made only for an objective that
asks for it.

One shard of tokens in, `log_probs.arrow` (see `stages.tables.LOG_PROBS`) out; where answers are judged one by one, also
`mismatched.arrow` (see `stages.mismatched`); with `top_k` a teacher's likeliest tokens instead, `top.arrow`. Rows are
laid side by side, unpadded, as in training, after the same check that this model keeps them apart.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from stages.identity import Tree
from stages.stage import Facts, Part, Stage, StageConfig, Work


class ScoreConfig(StageConfig):
    """How tokens are scored."""

    precision: Literal["bf16", "fp32"] = Field(default="bf16")
    """Arithmetic of the forward pass: the one that training uses, so that both err alike."""
    quantize: Literal["nf4", "int8"] | None = None
    """Hold the model's weights in 4 or 8 bits. Where training is compared with it, as `train.quantize` says: that
    training starts from the quantized weights, not from those they were."""
    top_k: int | None = Field(default=None, ge=1, le=1024)
    """For distillation: how many of the teacher's likeliest tokens are kept for every token, 6 bytes each; 32 is usual.
    The teacher is `fetch.teacher`, or the model before training."""


def parts(config: ScoreConfig, inputs: Mapping[str, Tree]) -> Sequence[Part]:
    """One part a shard of `tokens`."""
    shards = sorted({file.path.rpartition("/")[0] for file in inputs["tokens"].files})
    folders = inputs["tokens"].folders()
    model = {"model": inputs["model"]}
    if config.top_k is not None and inputs["teacher"].files:  # whatever model learns from it
        model = {"model": inputs["teacher"], "tokenizer": inputs["model"].select("tokenizer.json")}
    return [Part(shard, config.model_dump(mode="json"), {"tokens": folders[shard], **model}) for shard in shards]


def run(config: ScoreConfig, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    """Score one shard. Raises UserError when the model does not load, or does not keep packed rows apart."""
    from stages.scoring import score

    return score(config, inputs, output, work)


STAGE = Stage(
    name="score",
    artifact="log_probs",
    version=3,
    config=ScoreConfig,
    run=run,
    parts=parts,
    part=ScoreConfig,
    exclusive=True,
    libraries=("bitsandbytes", "torch", "transformers"),
)
