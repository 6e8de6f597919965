"""A run: what was asked, what its sources resolved to, and the artifacts it has so far.

The record is written to the store when the run starts, so that a retry, a resume or an approval uses what was found
then, and so that garbage collection keeps what the run uses.
"""

import json
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from flows import continuing
from flows.continuing import Start
from flows.graph import ORDER, WIRING, Take, stage_named
from flows.recipe import Loaded, Recipe
from stages import evaluate, fetch, objectives, own_code, reward_models, weight_files
from stages.child import Suspended
from stages.compare import UNBOUNDED
from stages.deliver import absolute
from stages.errors import UserError
from stages.home import expanded
from stages.identity import Action, File, Json, Tree
from stages.production import Move, Production, production
from stages.runtime import Runtime
from stages.stage import Part, StageConfig, action_of
from stages.store import Artifact, BadBlob, Store
from stages.train import named


@dataclass
class Run:
    """One run of one recipe. `artifacts` fills as stages are found or made."""

    id: str
    loaded: Loaded
    runtime: Runtime
    store: Store
    parts: list[Part]
    """What fetch's sources resolved to."""
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)
    """The stages this run made, rather than found."""
    production: Production | None = None
    """What the production ref said when the run started: it moves only if it still says so."""
    to: str = ""
    """Where its model goes, as seen from where the run began: `publish.to`, a folder by its absolute path."""
    earlier: Mapping[str, Any] = field(default_factory=dict)
    """The run's record as it was when this goes on with it; empty for a new run."""
    _began: tuple[str, Start, Tree] | None = None
    """The answer of `began`, and for which fetch."""

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.loaded.recipe.name

    @property
    def objective(self) -> objectives.Objective:
        """What its training minimises."""
        return objectives.find(self.loaded.recipe.train.objective)

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of this recipe, in order."""
        scored = self.objective.reference or self.objective.teacher
        return tuple(stage for stage in ORDER if stage != "score" or scored)

    def takes(self, stage: str) -> dict[str, Take]:
        """What a stage takes of the others, by the name of its input."""
        config = self.config(stage)
        return {n: take for n, take in WIRING[stage].items() if take.stage in self.stages and take.asked(config)}

    def upstream(self, stage: str) -> list[str]:
        """The stages that a stage reads from directly, in order."""
        read = {take.stage for take in self.takes(stage).values()}
        return [above for above in ORDER if above in read]

    def config(self, stage: str) -> StageConfig:
        """The recipe's section of a stage."""
        config: StageConfig = getattr(self.loaded.recipe, stage)
        return config

    def inputs(self, stage: str) -> dict[str, Tree]:
        """The trees a stage reads. Raises UserError naming `+stage` when one was never made."""
        for above in self.upstream(stage):
            if above not in self.artifacts:
                raise UserError(
                    f"{stage} reads what {above} makes, and {above} has not been made with these settings: "
                    f"select `+{stage}` to make it too"
                )
        config = self.config(stage)
        inputs = {n: take.of(self.artifacts[take.stage].tree, config) for n, take in self.takes(stage).items()}
        if stage == "evaluate" and (rival := self.rival()) is not None:
            inputs["production"] = rival.tree
        if self.loaded.recipe.fetch.continuing and stage in ("convert", "score", "train", "merge"):
            start, rows = self.began()
            if stage == "convert":
                inputs["rows"] = rows
            elif (weights := continuing.weights_of(self.store, start)) is not None:
                inputs["model"] = weights
        return inputs

    def began(self) -> tuple[Start, Tree]:
        """Where the training starts, and the shards that convert reads: the base model and all, unless the recipe goes
        on from production. fetch must be known. Raises UserError when the store has lost what that needs."""
        fetched = self.artifacts["fetch"]
        if self._began is None or self._began[0] != fetched.digest:
            fetch = self.loaded.recipe.fetch
            standing = self.production if fetch.continuing else None
            [model] = [part.config for part in self.parts if part.name == "model"]
            continuing.refuse_another_base(self.store, standing, model)
            data = fetched.tree.folder("data")
            found = continuing.start_and_rows(self.store, standing, data, fetch.heldout)
            self._began = fetched.digest, *found
        return self._began[1:]

    def rival(self) -> Artifact | None:
        """The weights that the tuned model is compared with beside the base model's: those in production when the run
        started. Raises UserError when the store has lost them."""
        named = self.production.rival(self.artifacts["merge"].digest) if self.production else None
        if named is None:
            return None
        found = self.store.recall("merge", named["key"], named["digest"])
        if found is None:
            raise self._lost(f"merge {named['key'][:12]}")
        return found

    def refuse_lost_rival(self) -> None:
        """Raise UserError when files of that are gone. It does not grow back: it is not this run's to make."""
        rival = self.rival()
        if rival is not None and (gone := self.store.missing(rival.tree)):
            raise self._lost(f"merge {rival.key[:12]}, {gone[0]}")

    def _lost(self, what: str) -> UserError:
        return UserError(
            f"{self.name}/production names a model that {self.store.url} no longer holds ({what}): let it name another "
            f"one with `regrow promote {self.name} RUN`, or go back with `regrow rollback {self.name}`"
        )

    def action(self, stage: str) -> Action | None:
        """The stage's action, or None while an artifact above it is unknown."""
        if any(above not in self.artifacts for above in self.upstream(stage)):
            return None
        return action_of(stage_named(stage), self.config(stage), self.inputs(stage), self.parts, self.where(stage))

    def refuse_steps(self, section: str) -> None:
        """Raise UserError where a section says how the steps of a reward model combine, and the one that was fetched
        knows none."""
        models = self.artifacts["fetch"].tree.folder("reward_models")
        for place, model in _steps_of(self.loaded.recipe, section):
            # A damaged copy is mended where it is loaded, and looked at again there.
            with suppress(BadBlob), self.store.hold() as hold:
                reward_models.refuse_steps(self.store.view(models.folder(model).select("config.json"), hold), place)

    def check_kind(self) -> None:
        """Raise UserError where the objective does not train on what convert made of the rows: before they are
        tokenized."""
        shards = self.artifacts["convert"].tree.select("*/counts.json").folders()
        with suppress(BadBlob), self.store.hold() as hold:  # as above
            for shard, tree in shards.items():
                counts = json.loads((self.store.view(tree, hold) / "counts.json").read_text())
                if "kind" in counts:  # some row is left; all are of one kind, or pack says so
                    source = f"the source `{shard.partition('/')[0]}`"
                    objectives.refuse_other_kinds(self.loaded.recipe.train.objective, counts["kind"], source)
                    break

    def check_tasks(self) -> None:
        """Raise UserError where a task of `evaluate` cannot ask what was fetched for it."""
        fetched, config = self.artifacts["fetch"].tree, self.loaded.recipe.evaluate
        with suppress(BadBlob), self.store.hold() as hold:  # as above
            evaluate.check_rows(
                config, fetched.folder("data"), fetched.folder("model"), lambda tree: self.store.view(tree, hold)
            )

    def check_names(self) -> None:
        """Raise UserError where `train` names layers or weights that the fetched model does not have."""
        config = self.loaded.recipe.train
        model = self.artifacts["fetch"].tree.folder("model")
        weights = model.select(weight_files.INDEX).files or model.select("*.safetensors").files
        if named.names_of(config):
            with suppress(BadBlob), self.store.hold() as hold:  # as above
                read = model.select("config.json", *(file.path for file in weights))
                named.refuse_unknown(config, self.store.view(read, hold))

    def check_head(self) -> None:
        """Raise UserError where the objective trains a head for which the fetched model has no classifier."""
        if outputs := objectives.find(self.loaded.recipe.train.objective).head:
            from stages import heads

            model = self.artifacts["fetch"].tree.folder("model")
            with suppress(BadBlob), self.store.hold() as hold:  # as above
                heads.refuse(self.store.view(model.select("config.json"), hold), outputs)

    def has_made(self, stage: str) -> bool:
        """Whether the stage's artifact is in the store because this run made it."""
        action = self.action(stage)
        found = self.store.find(stage, action.key) if action else None
        return found is not None and found.provenance.get("run") == self.id

    def where(self, stage: str) -> dict[str, Json]:
        """Name, locations and lineage for the stage that needs them."""
        if stage != "publish":
            return {}
        lineage = {s: {"key": a.key, "digest": a.digest} for s, a in self.artifacts.items()}
        return {
            "name": self.name,
            "run": self.id,
            "recipe": self.loaded.text,
            "lineage": lineage,
            "store": self.store.url,
        }

    def record(self, status: str, outcome: Mapping[str, Json] | None = None, reason: str = "") -> None:
        """Write the run's record; with the outcome of its publishing once that is known, or with the `reason` why it
        ended before that. Of a run that goes on, the model that it had stays its model, with that one's outcome, until
        there is another with a card."""
        had, has = self.earlier.get("stages", {}), self._stages()
        still = "publish" in had and "publish" not in has
        kept = {name: self.earlier[name] for name in ("start", "outcome", "scores") if name in self.earlier}
        self.store.write_run(
            self.id,
            {
                "run": self.id,
                "recipe": self.name,
                "path": self.loaded.path,
                "text": self.loaded.text,
                "settings": list(self.loaded.settings),
                "asked": self.loaded.recipe.model_dump(mode="json", exclude_unset=True),
                "status": status,
                "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "production": _production_json(self.production),
                "to": self.to,
                "parts": [_part_json(p) for p in self.parts],
                "stages": {**has, **had} if still else {**had, **has},
                **({"under_way": has} if still else {}),  # gc keeps what stands anywhere in here
                **kept,
                **({"start": self._began[1].document} if self._began else {}),
                **({"outcome": dict(outcome), "scores": self.headline_scores()} if outcome else {}),
                **({"reason": reason} if reason else {}),
            },
        )

    def record_end(self, error: BaseException) -> None:
        """Record that the run failed, or was suspended or interrupted (Ctrl-C), and why; unless the store is what
        failed: what ended the run is told all the same."""
        ended = "failed" if isinstance(error, Exception) else "interrupted"
        status = "suspended" if isinstance(error, Suspended) else ended
        reason = str(error).partition("\n")[0] or type(error).__name__
        with suppress(UserError, OSError):
            replace(self, store=self.store.hasty()).record(status, reason=reason)

    def headline_scores(self) -> dict[str, Json]:
        """The tuned model's score in each task, as the card has it."""
        tasks = self.artifacts["publish"].facts["scores"]["tasks"]
        kept = (UNBOUNDED,)  # which says how the number is to be shown
        return {name: {**task["tuned"], **{k: task[k] for k in kept if k in task}} for name, task in tasks.items()}

    def become_baseline(self) -> None:
        """Make this run's stages what the next plan's reasons compare with; of a stage it left out, the last run's. If
        it went all the way, its recipe is the one that the name stands for: one of single stages is a trial."""
        name = f"{self.name}/last"
        while True:
            ref = self.store.read_ref(name)
            before: Mapping[str, Any] = ref.document if ref else {}
            stages = {**before.get("stages", {}), **self._stages()}
            whole = self.id if "publish" in self.artifacts else before.get("whole")
            document = {"run": self.id, "whole": whole, "stages": stages}
            if self.store.swap_ref(name, ref.version if ref else None, document):
                return

    def _stages(self) -> dict[str, Json]:
        return {
            s: {"key": a.key, "digest": a.digest, "action": a.action, "made": s in self.made}
            for s, a in self.artifacts.items()
        }


def start(
    loaded: Loaded, runtime: Runtime, store: Store, record: Mapping[str, Any] | None = None, run_id: str = ""
) -> Run:
    """Resolve the sources (or take what `record`, an earlier run's, resolved) and make a run of it, called `run_id` or
    by a name of its own. Raises UserError when the recipe brings Python that the runtime does not allow."""
    named = ["convert.format"] if loaded.recipe.convert.uses_code else loaded.recipe.train.own_code
    if named and not runtime.allow_code:
        raise own_code.not_allowed(named[0])
    if record is not None:
        parts = [_part(p) for p in record["parts"]]
        to = record.get("to") or absolute(loaded.recipe.publish.to)  # a version that did not keep it, or sent elsewhere
        found = production_of(record)
        return Run(record["run"], loaded, runtime, store, parts, production=found, to=to, earlier=record)
    run_id = run_id or f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
    standing = production(store, loaded.recipe.name)
    parts = list(fetch.resolve(loaded.recipe.fetch, runtime.cache))
    for section in ("train", "evaluate"):
        for place, model in _steps_of(loaded.recipe, section):
            if (path := loaded.recipe.fetch.reward_models[model].path) is not None:
                reward_models.refuse_steps(expanded(path, f"fetch.reward_models.{model}.path"), place)
    to = absolute(loaded.recipe.publish.to)
    return Run(run_id, loaded, runtime, store, parts, production=standing, to=to)


def records_of(store: Store, name: str) -> Iterator[dict[str, Any]]:
    """The records of a recipe's runs, the one written last first."""
    return (record for _, record in store.runs() if record.get("recipe") == name)


def _steps_of(recipe: Recipe, section: str) -> Iterator[tuple[str, str]]:
    """Where a section says how the steps of a reward model combine, and that model's name."""
    for place, model in getattr(recipe, section).steps.items():
        yield ".".join((section, *place)), model


def _production_json(standing: Production | None) -> Json:
    """The model that stood, without the moves before it: those are in the ref."""
    return {"version": standing.version, "move": asdict(standing.now)} if standing else None


def production_of(record: Mapping[str, Any]) -> Production | None:
    """What the production ref said when the run of that record started."""
    value = record["production"]
    return Production(value["version"], [Move(**value["move"])]) if value else None


def _part_json(part: Part) -> dict[str, Json]:
    return {
        "name": part.name,
        "config": dict(part.config),
        "where": dict(part.where),
        "inputs": {n: [asdict(f) for f in t.files] for n, t in part.inputs.items()},
    }


def _part(value: Mapping[str, Any]) -> Part:
    inputs = {n: Tree(tuple(File(**f) for f in files)) for n, files in value["inputs"].items()}
    return Part(value["name"], value["config"], inputs, value["where"])
