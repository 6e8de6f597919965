"""On-policy distillation: the paper's divergence and its gradient, a student that comes nearer to its teacher where it
writes itself, a run that goes on as it would have, and mistakes named."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from flows.recipe import loads
from flows.run import Run
from stages.errors import UserError
from stages.runtime import Runtime
from stages.stage import Work
from stages.tables import read_table
from stages.train import STAGE, TrainConfig
from tests.stages.packed import Packed
from tests.stages.test_train_online import figures, prompts, train
from tests.stages.tiny import other_weights

ASKED = ("say one\n", "say twenty\n", "say three hundred\n", "say four\n")
HELDOUT = ("tell me five\n", "say nothing\n", "six\n")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A model like the student, whose weights are others."""
    return other_weights(tiny_model, tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def inputs(tmp_path: Path, tiny_model: Path, teacher: Path) -> dict[str, Path]:
    prompts(tmp_path / "tokens", tiny_model, list(ASKED))
    plan = Packed(tmp_path / "tokens", tmp_path / "plan").output
    return {"model": tiny_model, "teacher": teacher, "tokens": tmp_path / "tokens", "plan": plan}


def recipe(steps: int, **options: Any) -> dict[str, Any]:
    return {
        "objective": "on_policy_distillation",
        "objective_options": {"prompts_per_step": 4, "max_new_tokens": 12, **options},
        "learning_rate": 1e-2,
        "precision": "fp32",
        "max_steps": steps,
        "method": "full",
        "schedule": "constant",
        "max_gradient_norm": 1e9,
    }


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, torch.Tensor, torch.Tensor]]]:
    """What is generated while a test runs: by whom (a weight's sum), what was asked with its mask, and what came."""
    seen: list[Any] = []
    generate = LlamaForCausalLM.generate

    def listening(self: Any, **given: Any) -> Any:
        came = generate(self, **given)
        seen.append((self.get_input_embeddings().weight.sum().item(), given["attention_mask"], came))
        return came

    monkeypatch.setattr(LlamaForCausalLM, "generate", listening)
    yield seen


def divergence(p: torch.Tensor, q: torch.Tensor, beta: float) -> torch.Tensor:
    """[tokens] The paper's, of the teacher's p and the student's q [tokens, vocabulary]."""

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a / b).log()).sum(-1)

    if beta in (0.0, 1.0):
        return kl(q, p) if beta else kl(p, q)
    middle = beta * p + (1 - beta) * q
    return beta * kl(p, middle) + (1 - beta) * kl(q, middle)


def plainly(student: Any, teacher: Any, sequences: list[tuple[int, list[int]]], temperature: float) -> Iterator[Any]:
    """The two distributions in the place of every token of the completions, sequence by sequence, unpadded."""
    for asked, ids in sequences:
        given = torch.tensor([ids])
        with torch.no_grad():
            theirs = (teacher(given).logits[0].double() / temperature).softmax(-1)
        ours = (student(given).logits[0].double() / temperature).softmax(-1)
        yield theirs[asked - 1 : -1], ours[asked - 1 : -1]


def unpadded(mask: torch.Tensor, came: torch.Tensor, end: int) -> list[tuple[int, list[int]]]:
    """Prompts with their completions up to the end of text, and how many tokens are the prompt's."""
    found = []
    for row, ids in zip(mask, came.tolist(), strict=True):
        asked, begin = int(row.sum()), len(row) - int(row.sum())
        completion = ids[len(row) :]
        completion = completion[: completion.index(end) + 1] if end in completion else completion
        found.append((asked, [*ids[begin : len(row)], *completion]))
    return found


@pytest.mark.parametrize(("beta", "temperature"), [(1.0, 1.0), (0.0, 1.0), (0.3, 0.7)])
def test_loss_and_gradient_are_the_papers(
    tmp_path: Path, inputs: dict[str, Path], written: list[Any], beta: float, temperature: float
) -> None:
    config = recipe(1, beta=beta, temperature=temperature)
    output, _ = train(tmp_path, inputs, config, micro_batch=2)  # two halves of a step, of unlike lengths
    student, teacher = (AutoModelForCausalLM.from_pretrained(inputs[name]) for name in ("model", "teacher"))
    ((_, mask, came),) = written
    end = AutoTokenizer.from_pretrained(inputs["model"]).eos_token_id
    pairs = list(plainly(student, teacher, unpadded(mask, came, end), temperature))
    loss = torch.cat([divergence(p, q, beta) for p, q in pairs]).mean()
    loss.backward()
    norm = torch.cat([weight.grad.flatten() for weight in student.parameters()]).norm()
    (step,) = figures(output)
    assert step["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert step["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)


def reverse(student: Any, teacher: Any, tokenizer: Any) -> float:
    """Mean reverse divergence over the tokens that the student writes to held-out prompts."""
    torch.manual_seed(0)
    sequences = []
    for text in HELDOUT:
        given = tokenizer(text, return_tensors="pt")
        options = {"do_sample": True, "top_k": 0, "num_return_sequences": 8, "max_new_tokens": 12}
        came = student.generate(**given, **options, pad_token_id=tokenizer.eos_token_id)
        mask = given["attention_mask"].expand(8, -1)
        sequences += unpadded(mask, came, tokenizer.eos_token_id)
    with torch.no_grad():
        return torch.cat([divergence(p, q, 1.0) for p, q in plainly(student, teacher, sequences, 1.0)]).mean().item()


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_student_comes_nearer_to_the_teacher_where_it_writes_itself(
    tmp_path: Path, inputs: dict[str, Path], written: list[Any], share: float
) -> None:
    output, facts = train(tmp_path, inputs, recipe(12, student_share=share), micro_batch=4)
    teacher, student, trained = (
        AutoModelForCausalLM.from_pretrained(path) for path in (inputs["teacher"], inputs["model"], output / "weights")
    )
    of_teacher = teacher.get_input_embeddings().weight.sum().item()
    by_teacher = sum(who == of_teacher for who, _, _ in written)
    assert len(written) == 12 and (1 < by_teacher < 11 if share < 1 else by_teacher == 0)
    rollouts = read_table(output / "rollouts.arrow").to_pylist()
    assert [row["step"] for row in rollouts] == [1 + number // 4 for number in range(12 * 4)]
    assert facts["completions"] == len(rollouts) and {row["prompt"] for row in rollouts} == set(ASKED)
    assert all(row["completion"] and not row["rewards"] for row in rollouts)
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
    before, after = reverse(student, teacher, tokenizer), reverse(trained, teacher, tokenizer)
    assert after < 0.8 * before


def test_what_a_teachers_folder_says_of_generating_shapes_no_completion(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    folder = Path(shutil.copytree(inputs["teacher"], tmp_path / "teacher"))
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "min_p": 0.999, "suppress_tokens": [67]}))
    plain, _ = train(tmp_path / "1", inputs, recipe(1, student_share=0.0))
    found, _ = train(tmp_path / "2", {**inputs, "teacher": folder}, recipe(1, student_share=0.0))
    assert read_table(found / "rollouts.arrow").to_pylist() == read_table(plain / "rollouts.arrow").to_pylist()


def test_a_run_that_was_suspended_goes_on_as_it_would_have(tmp_path: Path, inputs: dict[str, Path]) -> None:
    config = recipe(6, student_share=0.5)
    whole, _ = train(tmp_path / "whole", inputs, config)

    def tell(done: float, total: float | None = None, unit: str = "", **metrics: Any) -> None:
        if done == 3 and "loss" in metrics:
            os.kill(os.getpid(), signal.SIGTERM)

    folder = tmp_path / "parts"
    (folder / "output").mkdir(parents=True)
    work = Work(folder / "work", Runtime(device="cpu", workers=1), tell=tell)
    with pytest.raises(SystemExit) as stopped:
        STAGE.run(TrainConfig.model_validate(config), inputs, folder / "output", work)
    assert stopped.value.code == 75
    (folder / "output").rmdir()
    parts, facts = train(folder, inputs, config)
    assert facts["resumed_at_step"] >= 3
    assert figures(parts) == figures(whole)
    assert read_table(parts / "rollouts.arrow").to_pylist() == read_table(whole / "rollouts.arrow").to_pylist()


def test_a_teacher_padded_to_more_tokens_teaches_and_one_with_fewer_is_refused(
    tmp_path: Path, inputs: dict[str, Path], tiny_model: Path
) -> None:
    wide = other_weights(tiny_model, tmp_path / "wide", tokens=300)
    _, facts = train(tmp_path / "1", {**inputs, "teacher": wide}, recipe(1))
    assert facts["first_loss"] > 0.01
    with pytest.raises(UserError, match=r"fetch.teacher gives 2\d\d tokens a probability and fetch.model 300"):
        train(tmp_path / "2", {**inputs, "model": wide}, recipe(1))


def test_what_cannot_be_learned_from_is_refused_before_it_is_loaded(tmp_path: Path, inputs: dict[str, Path]) -> None:
    def refused(teacher: Path, told: str) -> None:
        with pytest.raises(UserError, match=told):
            train(tmp_path / teacher.name / "run", {**inputs, "teacher": teacher}, recipe(1))

    other, bare = tmp_path / "other", tmp_path / "bare"
    other.mkdir()
    bare.mkdir()
    document = json.loads((inputs["model"] / "tokenizer.json").read_text())
    words = document["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(document))
    refused(other, r"another tokenizer than fetch.model: 'a' is token")
    refused(bare, r"fetch.teacher has no tokenizer.json")
    without = {name: path for name, path in inputs.items() if name != "teacher"}
    with pytest.raises(UserError, match=r"needs a teacher: set fetch.teacher"):
        train(tmp_path / "without", without, recipe(1))
    lora = {"method": "lora", "lora": {"rank": 2, "modules_to_save": ["lm_head"]}}
    with pytest.raises(UserError, match=r"reads the weights of lm_head themselves"):
        train(tmp_path / "head", inputs, {**recipe(1), **lora})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"beta": 1.5}, "beta: Input should be less than or equal to 1"),
        ({"student_share": -0.1}, "student_share: Input should be greater than or equal to 0"),
        ({"temperature": 0}, "temperature: Input should be greater than 0"),
        ({"lmbda": 0.5}, "on_policy_distillation has no option 'lmbda'"),
        ({"rewards": {}}, "on_policy_distillation has no option 'rewards'"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        TrainConfig.model_validate(recipe(1, **options))


RECIPE = """
name: taught
fetch: {{model: {{path: m}}, data: {{rows: {{files: rows.jsonl}}}}{fetch}}}
convert: {{format: prompt_only}}
train: {{objective: on_policy_distillation}}
{more}
"""


@pytest.mark.parametrize(
    ("fetch", "more", "told"),
    [
        ("", "", r"taught.yaml:3: on_policy_distillation needs a teacher: a better model with the same tokenizer"),
        (", teacher: {path: m}", "", r"taught.yaml:3: it is the model that learns"),
        (", teacher: {path: t}", "score: {top_k: 8}", r"taught.yaml:6: .* nothing is kept: take it out"),
    ],
)
def test_a_recipe_says_which_teacher_and_only_that(fetch: str, more: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        loads(RECIPE.format(fetch=fetch, more=more), "taught.yaml")


def test_the_teachers_weights_are_in_the_key_of_train_and_of_no_other_training() -> None:
    def takes(text: str) -> set[str]:
        return set(Run("", loads(text, "taught.yaml"), Runtime(), None, []).takes("train"))  # type: ignore[arg-type]

    taught = RECIPE.format(fetch=", teacher: {path: t}", more="")
    assert takes(taught) == {"model", "tokens", "plan", "teacher", "templates"}
    cached = taught.replace("on_policy_distillation", "distillation") + "score: {top_k: 8}\n"
    assert takes(cached.replace("prompt_only", "messages")) == {"model", "tokens", "plan", "reference"}
