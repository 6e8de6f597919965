"""publish: the model card with scores, gate, data and lineage; then the model where people look for it.

`run` writes the card beside `scores.json`, `samples.jsonl`, `gate.json`, `recipe.yaml` and `lineage.json`. Delivering
to `to` (`stages.deliver`) and moving the production ref (`stages.production`) follow outside, hit or not, and only when
the gate passed: a failed gate is a result, not a crash.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, field_validator

from stages import compare, gate
from stages.card import card, redacted
from stages.deliver.index import repository
from stages.gate import Gate
from stages.identity import Json
from stages.sources import credentials
from stages.stage import Facts, Stage, StageConfig, Work


class PublishConfig(StageConfig):
    """Where the model goes, and what it must show first."""

    to: str = ""
    """A folder, an fsspec URL such as `s3://bucket/models/mine`, or `hf://org/name`. Empty: nowhere."""
    private: bool = True
    """Whether a repository made on the Hub is private."""
    approval: bool = False
    """Whether a person must agree before production moves: in the dashboard, or with `regrow promote`."""
    license: str = ""
    """The licence the card names, e.g. `apache-2.0`; empty takes the base model's where it is known."""
    gate: Gate = Field(default_factory=Gate)
    """What the scores must show."""

    @field_validator("to")
    @classmethod
    def _a_place(cls, to: str) -> str:
        # Told before anything is trained.
        credentials.check_url(to, "to", "the runtime's storage_options, e.g. `{password: env:NAME}`")
        if to.startswith("hf://"):
            repository(to)
        return to


def run(config: PublishConfig, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    """Write the card and decide the gate."""
    scores = compare.compare(inputs["scores"])
    decision = gate.decide(config.gate, scores)
    recipe = str(work.where.get("recipe", ""))
    lineage: dict[str, Json] = dict(work.where.get("lineage") or {})
    text = card(
        str(work.where.get("name", "model")),
        recipe,
        config.license,
        next((path.name for path in sorted(inputs["weights"].glob("LICENSE*"))), ""),
        scores,
        decision,
        (inputs["plan"] / "report.md").read_text(),
        lineage,
    )
    documents = {
        "scores.json": scores,
        "gate.json": decision,
        "lineage.json": {"run": work.where.get("run", ""), "stages": lineage},
    }
    texts = {"README.md": text, "recipe.yaml": recipe}
    texts |= {name: json.dumps(document, indent=1) + "\n" for name, document in documents.items()}
    for name, content in texts.items():
        (output / name).write_text(redacted(content))
    with (output / "samples.jsonl").open("w") as file:
        for sample in compare.samples(inputs["scores"]):
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
    return {**decision, "scores": scores}


STAGE = Stage(
    name="publish",
    artifact="card",
    version=7,
    config=PublishConfig,
    run=run,
    locations=frozenset({"to", "private", "approval"}),
    named=frozenset({"name"}),
)
