"""Answers judged by a reward model that regrow trained: its own head says the same through plain transformers, whoever
answers; unbounded scores beside shares; what cannot judge is refused."""

import copy
import json
import random
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stages import evaluate, merge, reward_models, templates
from stages.compare import compare, report
from stages.errors import UserError
from stages.evaluate import Measure, Task
from stages.gate import Gate, Thresholds, decide
from stages.generation import load
from stages.runtime import Runtime
from stages.stage import Work
from stages.train import STAGE as TRAIN
from stages.train import TrainConfig
from tests.stages.chats import rows_of, run_convert, run_tokenize, source
from tests.stages.packed import Packed

OTHER_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
WORDS = ["".join(random.Random(n).choices("abcdefghij", k=5)) for n in range(60)]
CHANCE = random.Random(0)
PAIRS = [
    {
        "prompt": f"say {word}",
        "chosen": "".join(CHANCE.choices("abcdefghijklmnop", k=5)),
        "rejected": "".join(CHANCE.choices("0123456789", k=5)),
    }
    for word in WORDS
]
CPU = Runtime(device="cpu", eval_batch=4)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models so small are slower on two."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A reward model that regrow's own stages made of pairs: letters are worth more than digits."""
    folder = tmp_path_factory.mktemp("judge")
    rows = source(folder / "rows", PAIRS[:48], name="pairs")
    shard, _ = run_convert(folder, rows, tiny_model, {"format": "preference"})
    tokens, _ = run_tokenize(folder, shard, tiny_model)
    (folder / "all/pairs").mkdir(parents=True)
    shutil.copytree(tokens, folder / "all/pairs/00000")
    plan = Packed(folder / "all", folder / "plan/out", sequence_length=128, global_batch=4).output
    inputs = {"model": tiny_model, "tokens": folder / "all", "plan": plan}
    (folder / "trained").mkdir()
    config = {"objective": "reward", "learning_rate": 1e-2, "precision": "fp32", "max_steps": 20, "lora": {"rank": 8}}
    TRAIN.run(TrainConfig.model_validate(config), inputs, folder / "trained", Work(folder / "work", CPU))
    (folder / "weights").mkdir()
    given = {"model": tiny_model, "trained": folder / "trained", "templates": shard}
    merge.run(merge.MergeConfig(), given, folder / "weights", Work(folder / "merging", CPU))
    return folder / "weights"


def always(folder: Path, model: Path, letter: str) -> Path:
    """A model that answers one letter over and over, with a tokenizer and a chat template of its own: its last norm
    gives nothing, so all tokens are as likely, and the first one is that letter."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    letters = sorted({*pre_tokenizers.ByteLevel.alphabet()} - {letter})
    bare = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([letter, *letters, "<s>", "</s>"])}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = OTHER_TEMPLATE
    tokenizer.save_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        network.model.norm.weight.zero_()
    network.generation_config.eos_token_id = network.config.eos_token_id = len(letters) + 2
    network.save_pretrained(folder)
    return folder


def rows(folder: Path, values: list[dict[str, Any]]) -> Path:
    (folder / "rows/asked/00000").mkdir(parents=True)
    (folder / "rows/asked/00000/rows.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    return folder / "rows"


def evaluated(output: Path, inputs: dict[str, Path], **task: Any) -> list[dict[str, Any]]:
    output.mkdir(parents=True)
    config = Measure(task=Task(source="asked", reward_model="letters", max_new_tokens=5, **task), precision="fp32")
    evaluate.run(config, inputs, output, Work(output.parent / "work", CPU))
    return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


@cache
def by_transformers(judge: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(judge, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(judge)


def plainly(judge: Path, turns: list[dict[str, str]]) -> float:
    """What the model's own head gives, by nothing but transformers."""
    import torch

    model, tokenizer = by_transformers(judge)
    ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        return float(model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]))


def test_the_text_is_token_for_token_what_it_was_trained_on(tmp_path: Path, judge: Path, tiny_model: Path) -> None:
    shard, _ = run_convert(tmp_path, source(tmp_path / "r", PAIRS[:2]), tiny_model, {"format": "preference"})
    trained_on = [row["ids"] for row in rows_of(run_tokenize(tmp_path, shard, tiny_model)[0])]
    tokenizer = load(judge, "fp32", "cpu").tokenizer
    asked = [
        reward_models.text_of(tokenizer, [{"role": "user", "content": pair["prompt"]}], pair[side])
        for pair in PAIRS[:2]
        for side in ("chosen", "rejected")
    ]
    assert trained_on == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in asked]


def test_it_prefers_the_answers_that_it_was_trained_to_prefer(judge: Path) -> None:
    loaded = load(judge, "fp32", "cpu")
    model = reward_models.of(judge, loaded.network, loaded.tokenizer, None)
    for pair in PAIRS[48:]:
        turns = [{"role": "user", "content": pair["prompt"]}]
        chosen, rejected = (model.worth(turns, pair[side]) for side in ("chosen", "rejected"))
        assert chosen > rejected


@pytest.mark.parametrize("name", templates.names())
def test_a_completion_is_worth_what_the_same_answer_is_in_evaluate(judge: Path, name: str) -> None:
    """Also through a template that trims answers (llama3), opens them with an empty reasoning (qwen3), or opens the
    reasoning in the prompt (deepseek_r1)."""
    network, tokenizer = copy.deepcopy(by_transformers(judge))
    network.config.max_position_embeddings = 512  # control tokens that it does not have are many bytes
    tokenizer.chat_template = templates.find(name).text
    model = reward_models.of(judge, network, tokenizer, None)
    asked = {"role": "user", "content": "say a"}
    for turns in ([asked], [asked, {"role": "assistant", "content": "a"}, {"role": "user", "content": "say b"}]):
        prompt = reward_models.text_of(tokenizer, turns)
        for answer in ("bad", "bad\n", "\n\n bad", "<think>\nhm\n</think>\n\nbad", ""):
            assert model.worth_after(prompt, answer) == model.worth(turns, answer)


@pytest.mark.full
def test_models_with_other_tokens_and_templates_are_judged_by_the_text_they_wrote(
    tmp_path: Path, judge: Path, tiny_model: Path
) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "say ho"}]
    answered = [*chat, {"role": "assistant", "content": "never shown"}]
    asked = rows(tmp_path, [*({"question": f"say {w}"} for w in WORDS[:8]), {"messages": answered}])
    for name, letter in (("base", "7"), ("production", "8"), ("tuned", "b")):
        weights = always(tmp_path / letter, tiny_model, letter)
        inputs = {"weights": weights, "rows": asked, "reward_model": judge}
        samples = evaluated(tmp_path / "scores" / name / "worth", inputs)
        assert [sample["answer"] for sample in samples] == [letter * 5] * 9
        assert samples[-1]["question"] == "system: Be brief.\nuser: say ho"
        for sample in samples:
            turns = [{"role": "user", "content": sample["question"]}] if sample["item"] < 8 else chat
            expected = plainly(judge, [*turns, {"role": "assistant", "content": sample["answer"]}])
            assert sample["score"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    found = compare(tmp_path / "scores")
    task = found["tasks"]["worth"]
    assert task["unbounded"] and task["metric"] == "reward by letters" and task["better"] == "tuned"
    assert task["over_production"]["better"] == "tuned"
    for model in ("base", "production", "tuned"):
        assert task[model]["low"] < task[model]["value"] < task[model]["high"]
    line = next(line for line in report(found).splitlines() if line.startswith("| worth"))
    assert f"{task['tuned']['value']:.3f} ({task['tuned']['low']:.3f} to" in line and "%" not in line
    assert "█" not in report(found), "a bar is a share of one"


def test_it_answers_where_one_question_is_a_field_of_another_name(
    tmp_path: Path, judge: Path, tiny_model: Path
) -> None:
    asked = rows(tmp_path, [{"prompt": [{"role": "user", "content": "say a"}]}, {"prompt": "say a"}])
    inputs = {"weights": tiny_model, "rows": asked, "reward_model": judge}
    first, second = evaluated(tmp_path / "out", inputs, question="prompt")
    assert first["score"] == second["score"] and first["answer"] == second["answer"]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            {"text": "x"},
            "line 1: a question is a text or a list of messages in the field 'question', and the row has only",
        ),
        ({"question": 3}, "in the field 'question', and the row holds a int. Name the right field with `question:`"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the messages before the answer are []"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "a message is {role: text, content: text}"),
        ({"question": "x" * 300}, "line 1: the reward model reads 256 tokens at most; question and answer have 3"),
    ],
)
def test_a_row_that_cannot_be_judged_is_named(
    tmp_path: Path, judge: Path, tiny_model: Path, row: dict[str, Any], told: str
) -> None:
    inputs = {"weights": tiny_model, "rows": rows(tmp_path, [row]), "reward_model": judge}
    with pytest.raises(UserError, match=re.escape(told)):
        evaluated(tmp_path / "out", inputs)


def test_what_its_template_does_not_take_is_told_before_anything_is_answered(tmp_path: Path, judge: Path) -> None:
    strict = tmp_path / "strict"
    shutil.copytree(judge, strict)
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    template = strict / "chat_template.jinja"
    template.write_text(refuse + template.read_text())
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    inputs = {"weights": tmp_path / "gone", "rows": rows(tmp_path, [{"messages": turns}]), "reward_model": strict}
    with pytest.raises(
        UserError, match="line 1: the reward model's chat template does not take the turns system, user"
    ):
        evaluated(tmp_path / "out", inputs)


def config_of(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(changes))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "is no reward model but LlamaForCausalLM: name the folder"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "sorts texts into 2 labels"),
        ({"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "L"}}, "has no chat template"),
    ],
)
def test_what_is_no_reward_model_is_refused(tmp_path: Path, config: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=f"^here: {told}"):
        reward_models.check(config_of(tmp_path / "m", **config), "here")


def test_what_regrow_publishes_is_one(judge: Path) -> None:
    reward_models.check(judge, "here")


@pytest.mark.parametrize(
    "more", [{"lm_eval": "gsm8k", "source": ""}, {"eval": "exact_match"}, {"metric": "exact_match"}]
)
def test_a_task_is_scored_in_one_way(more: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="`reward_model` scores rows of a `source`, without"):
        Task.model_validate({"source": "a", "reward_model": "m", **more})


def test_the_gate_holds_rewards_to_their_intervals_and_shares_to_points() -> None:
    def entry(value: float, better: str, **more: Any) -> dict[str, Any]:
        return {"difference": {"value": value, "low": value - 1, "high": value + 1}, "better": better, **more}

    def scores(**tasks: Any) -> dict[str, Any]:
        return {"tasks": tasks, "heldout_loss": None, "scored_twice": 0, "agreeing": 0}

    worth, share = entry(-0.5, "unclear", unbounded=True), entry(0.2, "unclear")
    assert decide(Gate(), scores(worth=worth))["passed"]
    assert not decide(Gate(require="better"), scores(worth=worth))["passed"]
    worse = decide(Gate(), scores(worth=entry(-3.5, "base", unbounded=True)))
    assert worse["reasons"] == ["worth: clearly worse than the base model, -3.500 (95 % interval -4.500 to -2.500)"]
    assert decide(Gate(min_gain=0.1), scores(worth=worth, spelling=share))["passed"], "points are for shares"
    assert not decide(Gate(min_gain=0.3), scores(worth=worth, spelling=share))["passed"]
    alone = decide(Gate(min_gain=0.1), scores(worth=worth))
    assert (
        not alone["passed"]
        and "is in shares of 1, and every task that counts is scored by numbers" in alone["reasons"][0]
    )
    assert decide(Gate(production=Thresholds(min_gain=0.1)), scores(worth=worth))["passed"], "none stands there"
