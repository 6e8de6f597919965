"""What sections of a recipe ask of one another: each of them is valid alone, and they do not go together.

across_sections(recipe)     # (path, what is wrong and how to mend it), which `flows.recipe` tells with file and line
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from stages import formats, objectives
from stages.compare import PREFERENCES

if TYPE_CHECKING:
    from flows.recipe import Recipe

__all__ = ["across_sections"]


def across_sections(recipe: "Recipe") -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What concerns two sections: (path, what is wrong and how to mend it)."""
    sources = list(recipe.fetch.data)
    for section, named in (("convert", recipe.convert.sources), ("pack", recipe.pack.sources)):
        for source in named:
            if source not in sources:
                hint = f"there is no data source `{source}`; fetch.data has {_listed(sources)}"
                yield (section, "sources", source), hint
    for source, given in recipe.pack.sources.items():
        for key in sorted(given.model_fields_set & {"weight", "limit", "heldout_fraction"}):
            if source in sources and recipe.fetch.data[source].split == "heldout":
                hint = f"`{source}` has `split: heldout`, of which every row is held out: leave this away"
                yield ("pack", "sources", source, key), hint

    lora, added = recipe.train.lora, recipe.fetch.model.new_tokens
    untrained = sorted(set(added) - set(lora.new_tokens))
    if recipe.train.method == "lora" and untrained and not lora.modules_to_save:
        hint = (
            f"`{untrained[0]}` would stay as it starts: name it in `train.lora.new_tokens`, which trains its embedding"
        )
        yield ("fetch", "model", "new_tokens"), hint
    for name, task in recipe.evaluate.tasks.items():
        if task.source and task.source not in sources:
            hint = f"there is no data source `{task.source}`; fetch.data has {_listed(sources)}"
            yield ("evaluate", "tasks", name, "source"), hint
    for counted in recipe.publish.gate.tasks:
        asked = counted.split("/")[0]  # of a group, one of its tasks
        if asked not in (*recipe.evaluate.tasks, PREFERENCES):
            have = _listed(list(recipe.evaluate.tasks))
            yield ("publish", "gate", "tasks"), f"there is no task `{asked}`; evaluate.tasks has {have}"
    for section in ("train", "evaluate"):
        for path, named in getattr(recipe, section).reward_models.items():
            if named not in recipe.fetch.reward_models:
                have = _listed(list(recipe.fetch.reward_models))
                told = f"there is no reward model `{named}`; fetch.reward_models has {have}"
                yield (section, *path), f"{told}: name it there, e.g. `reward_models: {{judge: {{path: out/reward}}}}`"
    yield from _of_objective(recipe)
    yield from _of_wrapped(recipe)
    yield from _of_heldout(recipe)
    yield from _of_gate(recipe)
    yield from _of_date(recipe)
    convert = recipe.convert
    kinds = objectives.find(recipe.train.objective).kinds
    for source in sources:
        own = convert.of(source)
        kind = formats.kind(own.format, own.options)
        if kind is not None and kind not in kinds:
            yield (
                ("convert", "sources", source, "format") if source in convert.sources else ("convert", "format"),
                f"`{source}` is read as {own.format}, whose rows are of kind {kind}; the objective "
                f"{recipe.train.objective} trains on {' or '.join(kinds)}: choose another format, or `train.objective`",
            )
    rendered = [s for s in sources if formats.templated(convert.of(s).format, convert.of(s).options)]
    for source in rendered[1:]:
        if convert.of(source).template != convert.of(rendered[0]).template:
            place = ("convert", "sources", source if source in convert.sources else rendered[0], "template")
            yield place, "a model carries one chat template, so all sources must have the same: set `convert.template`"
            return
    stepwise = [s for s in sources if formats.kind(convert.of(s).format, convert.of(s).options) == "stepwise"]
    for source in stepwise[1:]:
        if convert.of(source).options["separator"] != convert.of(stepwise[0]).options["separator"]:
            place = ("convert", "sources", source if source in convert.sources else stepwise[0], "options")
            yield place, "a model that judges steps looks for one separator: give all sources the same `separator`"
            return


def _of_date(recipe: "Recipe") -> Iterator[tuple[tuple[str | int, ...], str]]:
    """A model is asked as it was trained, also on the day that its chat template asks for."""
    dates = {recipe.convert.of(source).date for source in recipe.fetch.data}
    asked = recipe.evaluate.date
    if recipe.evaluate.tasks and dates and asked not in dates:
        trained = " or ".join(sorted(str(date) for date in dates))
        told = f"conversations are rendered with `convert.date` {trained}, and asked with `evaluate.date` {asked}"
        yield ("evaluate", "date"), f"{told}: give both the same"


def _of_objective(recipe: "Recipe") -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What an objective cannot have in other sections."""
    name = recipe.train.objective
    objective = objectives.find(name)
    if objective.head and recipe.evaluate.tasks:
        told = f"{name} makes a model that judges and answers nothing: take the tasks out; held-out rows are measured"
        yield ("evaluate", "tasks"), told
    if objective.head and recipe.fetch.continuing:
        told = f"the objective {name} puts a new head on a model that writes, and production's has one: take it out"
        yield ("fetch", "continuing"), told
    gate = recipe.publish.gate
    for place, thresholds in ((("gate",), gate), (("gate", "production"), gate.production)):
        if objective.head and thresholds.max_heldout_loss_increase is not None:
            told = f"a model of the objective {name} has no held-out loss, only accuracy: use publish.gate.min_gain"
            yield ("publish", *place, "max_heldout_loss_increase"), told
    if objective.teacher and recipe.score.top_k is None:
        yield (
            ("score", "top_k"),
            f"{name} learns from a teacher's likeliest tokens: say how many, e.g. `score.top_k: 32`",
        )
    if objective.online is not None and objective.online.teacher:
        yield from _of_teacher(recipe)
    elif not objective.teacher:
        for path, is_set in (("fetch", "teacher"), recipe.fetch.teacher), (("score", "top_k"), recipe.score.top_k):
            if is_set is not None:
                yield path, f"{name} learns from no teacher: take it out, or set `train.objective: distillation`"
    yield from _of_reference(recipe)
    yield from _of_environment(recipe)
    lost = {"stepwise": "steps off their labels", "prompt": "off where the model is to answer"}
    for kind in objective.kinds:
        if kind in lost and recipe.pack.overlong == "truncate":
            yield ("pack", "overlong"), f"truncate would cut {lost[kind]}: set it to drop or error"


def _of_wrapped(recipe: "Recipe") -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What cannot train on documents that are cut and run into one another; pack looks at the rows themselves."""
    if recipe.pack.documents != "wrapped":
        return
    name = recipe.train.objective
    objective = objectives.find(name)
    if objective.teacher:
        told = f"the teacher of {name} reads each document whole and alone, and the model would not"
        yield ("pack", "documents"), f"{told}: set it to isolated, or `train.objective: sft`"
    elif "conversation" not in objective.kinds:
        told = f"wrapped is for raw text, and {name} trains on {' or '.join(objective.kinds)}"
        yield ("pack", "documents"), f"{told}: set it to isolated, or `train.objective: sft`"
    for source in recipe.fetch.data:
        own = recipe.convert.of(source)
        if own.format not in ("auto", "own") and formats.templated(own.format, own.options):
            told = f"wrapped is for raw text, and `{source}` is read as {own.format}, whose rows are chats"
            mend = (
                "set it to isolated, take the source out, or read it as completion, naming the text's column, e.g. "
                "`fields: {text: answer}` (evaluate.tasks still see whole rows)"
            )
            yield ("pack", "documents"), f"{told}: {mend}"


def _of_reference(recipe: "Recipe") -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What training is compared with is the model that it starts from: quantized, if that is, and as precise."""
    name, ours, scored = recipe.train.objective, recipe.train.quantize, recipe.score.quantize
    objective = objectives.find(name)
    if objective.reference and scored != ours:
        mend = f"set `score.quantize: {ours}`" if ours else "take `score.quantize` out, or set `train.quantize`, too"
        yield ("score", "quantize"), f"{name} compares with the model it starts from, as train.quantize has it: {mend}"
    elif not (objective.reference or objective.teacher) and scored is not None:
        yield ("score", "quantize"), f"{name} compares with no other model: take it out"
    wide = recipe.train.precision == "fp32"
    if objective.reference and wide != (recipe.score.precision == "fp32"):
        told = f"{name} compares with the model it starts from, as train.precision has it"
        yield ("score", "precision"), f"{told}: set `score.precision: {'fp32' if wide else 'bf16'}`"


def _of_heldout(recipe: "Recipe") -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What looks at held-out rows, where no row would be one."""
    pack = recipe.pack
    if recipe.fetch.heldout or any(map(pack.heldout_share, recipe.fetch.data)):
        return
    told = (
        "is of rows held out, and the recipe holds no rows out: set `pack.heldout_fraction`, or give a source "
        "`split: heldout`"
    )
    if recipe.train.evaluate_every is not None:
        yield ("train", "evaluate_every"), f"the loss that `train.evaluate_every` looks at {told}"
    gate = recipe.publish.gate
    for place, thresholds in ((("gate",), gate), (("gate", "production"), gate.production)):
        if thresholds.max_heldout_loss_increase is not None:
            yield ("publish", *place, "max_heldout_loss_increase"), f"the loss that this bounds {told}"


def _of_gate(recipe: "Recipe") -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What the gate asks for and nothing would measure: it would not pass, or, against production, not look."""
    pack, evaluate, gate = recipe.pack, recipe.evaluate, recipe.publish.gate
    heldout = bool(recipe.fetch.heldout) or any(map(pack.heldout_share, recipe.fetch.data))
    loss = heldout and evaluate.heldout_loss
    judged = loss and any(kind != "conversation" for kind in objectives.find(recipe.train.objective).kinds)
    for place, asks in ((("gate",), gate), (("gate", "production"), gate.production)):
        if asks.min_gain is not None and not evaluate.tasks and not judged:
            yield ("publish", *place, "min_gain"), "it is of tasks, and `evaluate.tasks` has none: add one"
        if asks.require == "better" and not evaluate.tasks and not loss:
            told = "better in what? `evaluate.tasks` has no task, and no held-out loss is measured: add a task"
            yield ("publish", *place, "require"), told
        if asks.max_heldout_loss_increase is not None and heldout and not evaluate.heldout_loss:
            told = "the loss that this bounds is not measured: take `evaluate.heldout_loss: false` out"
            yield ("publish", *place, "max_heldout_loss_increase"), told


def _of_environment(recipe: "Recipe") -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What training in an environment asks of convert."""
    if recipe.train.objective_options.get("environment") is None:
        return
    for source in recipe.fetch.data:
        part = recipe.convert.of(source)
        if part.format != "own" and not part.options.get("keep_messages"):
            place = ("convert", "sources", source) if source in recipe.convert.sources else ("convert",)
            told = "an environment renders prompts again, with its tools, so it needs their messages"
            yield place, f"{told}: set `format: prompt_only` and `options: {{keep_messages: true}}`"
            return


def _of_teacher(recipe: "Recipe") -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What goes with a teacher that answers while the student trains."""
    name, teacher = recipe.train.objective, recipe.fetch.teacher
    if teacher is None:
        yield ("fetch",), f"{name} needs a teacher: a better model with the same tokenizer, as `fetch.teacher`"
    elif teacher == recipe.fetch.model:
        yield ("fetch", "teacher"), f"it is the model that learns, and {name} needs another one: a better model"
    if recipe.score.top_k is not None:
        yield ("score", "top_k"), f"{name} asks its teacher about new completions, and nothing is kept: take it out"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{n}`" for n in names) or "none"
