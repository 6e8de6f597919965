"""pack: every decision that needs all rows, made as an index; no token is copied.

Which rows train and how often, which are held out, what is dropped and why, which tokens train, and which packed
sequence each row goes into (`packing.plan`). Changing any of it retokenizes nothing. Writes `documents.arrow` and
`bins.arrow`, the same and their tokens for held-out rows, `plan.json`, and the data report (`stages.data_report`).

A row trains only tokens of its turns' contents and end markers, never the chat template's headers, and never its first
token, which has nothing before it to be predicted from. Documents are kept whole and apart, or wrapped: cut where a
packed sequence is full (`packing.wrap`), whose first token does not train either. A row of the data counts once in the
report: it is packed, or held out, or dropped for the first reason that applies, in the order of `REASONS`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from stages.stage import Facts, Stage, StageConfig, Work

Speaker = Literal["system", "user", "assistant", "tool"]


class PackSource(StageConfig):
    """How much of one source is taken."""

    weight: float = Field(default=1.0, ge=0.0, le=1000.0)
    """How often each row trains in one pass: 2.5 is twice, and a third time for half of the rows; 0.1 is a tenth of the
    rows. A row's own hash and the seed decide."""
    limit: int | None = Field(default=None, ge=1)
    """The most rows that train, before `weight`: a fair sample, drawn by the rows' hashes and the seed."""
    heldout_fraction: float | None = Field(default=None, ge=0.0, lt=1.0)
    """As `pack.heldout_fraction`."""


class PackConfig(StageConfig):
    """What trains, what is held out, and how rows are packed into sequences and steps."""

    sequence_length: int = Field(default=2048, ge=64, le=1 << 20)
    """Tokens in a packed sequence, and the most that a row may have."""
    global_batch: int = Field(default=16, ge=1)
    """Packed sequences per optimizer step, over all devices."""
    overlong: Literal["drop", "truncate", "error"] = "drop"
    """What to do with a row longer than `sequence_length`: leave it out and count it, cut its end off, or stop. Of
    wrapped documents none is too long, and there is nothing to choose."""
    documents: Literal["isolated", "wrapped"] = "isolated"
    """isolated: whole, and attention ends where a document does. wrapped: one after another in an order drawn by the
    seed, cut where a packed sequence is full and continued in the next one, with attention over the whole sequence:
    for continued pretraining on raw text."""
    train_on: Literal["assistant", "all", "last"] | tuple[Speaker, ...] = "assistant"
    """Whose turns train: the assistant's, everyone's, the assistant's last, or those of a list of roles. Raw text
    always trains, and flags in the data go before this."""
    heldout_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of rows held out from training, besides the sources with `split: heldout`. A row's own hash decides, so it
    stays on its side when data is added."""
    deduplicate: bool = True
    """Keep only the first of identical rows. Rows that are also held out never train, whatever this says."""
    near_duplicates: float | None = Field(default=None, ge=0.5, le=1.0)
    """Leave out a row that is at least so similar to an earlier or a held-out one: the Jaccard similarity of their runs
    of five tokens, 0.8 is usual. null keeps such rows."""
    decontaminate: float = Field(default=0.5, ge=0.0, le=1.0)
    """Leave out a row that holds at least this share of a held-out row's question, in runs of eight tokens (and at
    least 13 of them, or all); 0 does not look for any."""
    sources: dict[str, PackSource] = Field(default_factory=dict)
    """How much of single sources is taken, by their name in `fetch.data`."""
    window: int | None = Field(default=None, ge=1)
    """Tokens, at least a step's worth, that training reads before it goes on to other shards: a window is packed and
    shuffled by itself, and only two of them are on the disk. null for one window of everything."""
    max_documents: int | None = Field(default=None, ge=1)
    """The most documents in a packed sequence; null for no limit."""
    seed: int = Field(default=0, ge=0)
    """Decides what is sampled, which of equally long rows go together, and the order of steps."""

    @model_validator(mode="after")
    def _wrapped_documents_fit(self) -> "PackConfig":
        if self.documents == "wrapped":
            for name, is_set in (("overlong", self.overlong != "drop"), ("max_documents", self.max_documents)):
                if is_set:
                    raise ValueError(
                        f"{name} is {getattr(self, name)}, which is for whole documents: wrapped ones are cut where a "
                        "sequence is full, as many as it takes. Take it out, or set `documents: isolated`"
                    )
        return self

    @model_validator(mode="after")
    def _a_window_is_a_step_or_more(self) -> "PackConfig":
        least = self.sequence_length * self.global_batch
        if self.window is not None and self.window < least:
            raise ValueError(
                f"window is {self.window} tokens: a step alone reads up to {least} (sequence_length x global_batch). "
                "Raise it, or leave it out where all data fits on the disk"
            )
        return self

    def of(self, source: str) -> PackSource:
        """The settings of one source."""
        return self.sources.get(source, PackSource())

    def heldout_share(self, source: str) -> float:
        """The share of a source's rows that is held out. One that is switched off holds nothing out: it would take the
        same rows from others."""
        own = self.of(source)
        share = self.heldout_fraction if own.heldout_fraction is None else own.heldout_fraction
        return share if own.weight else 0.0


def run(config: PackConfig, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    """Plan all rows. Raises UserError when there is nothing to train on, or at an overlong row if it is an error."""
    from stages.planning import plan

    return plan(config, inputs, output, work)


STAGE = Stage(
    name="pack",
    artifact="plan",
    version=17,
    config=PackConfig,
    run=run,
    streamed=frozenset({"tokens"}),
    without=("pandas",),
    libraries=("rensa",),
)
