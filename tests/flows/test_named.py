"""What `train` asks of a model, layers by name or a classifier, is looked for once the model is there, before the data
is prepared."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flows.execute import execute
from flows.recipe import Loaded, Recipe
from flows.run import Run, start
from stages.errors import UserError
from stages.runtime import Runtime
from stages.store import open_store
from stages.train import Full, TrainConfig, named
from tests.stages import tiny


def fetched(tmp_path: Path, model: Path, train: dict[str, Any]) -> Run:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    recipe = {
        "name": "names",
        "fetch": {"model": {"path": str(model)}, "data": {"rows": {"files": str(tmp_path / "rows.jsonl")}}},
        "train": train,
    }
    runtime = Runtime(store=str(tmp_path / "store"), cache=tmp_path / "cache")
    loaded = Loaded(recipe=Recipe.model_validate(recipe), text="", path="")
    this = start(loaded, runtime, open_store(runtime.store, runtime.cache))
    execute(this, "fetch")
    return this


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"lora": {"targets": ["q_proj", "v_porj"]}}, "train.lora.targets: no layer is called 'v_porj'; there are"),
        ({"lora": {"targets": ["norm"]}}, "train.lora.targets: no layer is called 'norm'"),
        ({"lora": {"modules_to_save": ["*norm"]}}, "no module is called"),
        ({"lora": {"modules_to_save": ["lm_haed"]}}, "train.lora.modules_to_save: no module is called 'lm_haed'"),
        ({"method": "full", "full": {"only": ["re:.*layers\\.7\\..*"]}}, "train.full.only: no weight is called"),
        ({"method": "full", "full": {"freeze": ["embed_tokens", "nrom"]}}, "full.freeze.*did you mean 'norm'"),
    ],
)
def test_a_name_that_matches_nothing_is_told_after_fetch(
    tmp_path: Path, tiny_model: Path, train: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        fetched(tmp_path, tiny_model, train).check_names()


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"lora": {"targets": ["q_proj", "layers.1.mlp.down_proj", "*.k_proj"], "modules_to_save": ["norm"]}},
        {"method": "full", "full": {"only": ["layers.1"], "freeze": ["re:.*norm.*"]}},
    ],
)
def test_names_that_are_there_are_taken_without_building_the_model(
    tmp_path: Path, tiny_model: Path, train: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    this = fetched(tmp_path, tiny_model, train)
    monkeypatch.setattr("stages.train.named._refuse", lambda *_: pytest.fail("the files name it"))
    this.check_names()


def test_names_that_only_transformers_gives_are_taken(tmp_path: Path) -> None:
    """Experts are fused when they are loaded: the files name each by itself."""
    model = tiny.save(tmp_path / "model", "MixtralConfig", num_local_experts=4)
    config = TrainConfig.model_validate({"method": "full", "full": {"freeze": ["gate_up_proj"]}})
    named.refuse_unknown(config, model)
    with pytest.raises(UserError, match="did you mean 'gate_up_proj'"):
        named.refuse_unknown(config.model_copy(update={"full": Full(freeze=("gate_upproj",))}), model)


def test_a_model_that_transformers_does_not_know_is_an_error(tmp_path: Path) -> None:
    model = tiny.save(tmp_path / "model", "LlamaConfig")
    described = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**described, "model_type": "nobodys"}))
    (model / "model.safetensors").rename(model / "weights.safetensors")
    config = TrainConfig.model_validate({"lora": {"targets": ["q_porj"]}})
    with pytest.raises(UserError, match=r"the model cannot be loaded for training: .*nobodys"):
        named.refuse_unknown(config, model)


@pytest.mark.parametrize(
    ("config_name", "objective"),
    [
        ("CohereConfig", "reward"),  # transformers has no such class
        ("Olmo2Config", "process_reward"),
        ("GPTNeoXConfig", "process_reward"),  # it has one, whose head has a layer more
    ],
)
def test_a_model_that_cannot_become_a_classifier_is_told_after_fetch(
    tmp_path: Path, tiny_model: Path, config_name: str, objective: str
) -> None:
    model = tiny.save(tmp_path / "model", config_name)
    shutil.copyfile(tiny_model / "tokenizer.json", model / "tokenizer.json")
    this = fetched(tmp_path, model, {"objective": objective})
    with pytest.raises(UserError, match=r"^train.objective: .* such as Llama, Mistral, Phi or Qwen$") as told:
        this.check_head()
    assert len(str(told.value)) < 300


@pytest.mark.parametrize("objective", ["sft", "reward", "process_reward"])
def test_a_model_that_can_is_taken(tmp_path: Path, tiny_model: Path, objective: str) -> None:
    fetched(tmp_path, tiny_model, {"objective": objective}).check_head()
