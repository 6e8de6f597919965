"""Answers judged step by step, by a process reward model that regrow trained: an answer is cut and tokenized as its
data was, what the steps are given is what training's own path and one pass a prefix give, and the model says where its
steps end."""

import itertools
import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from flows.recipe import loads
from packing.collate import PackedBins, collate
from stages import convert, encoding, evaluate, heads, merge, reward_models, steps
from stages.compare import compare, report
from stages.errors import UserError
from stages.evaluate import Measure, Task
from stages.generation import load, load_network
from stages.judge import Judge
from stages.objectives import process_reward
from stages.reward_models import ProcessRewardModel
from stages.rewards import RewardChoice
from stages.runtime import Runtime
from stages.stage import Work
from stages.tokenized import find_shards
from stages.train import STAGE as TRAIN
from stages.train import TrainConfig
from tests.stages.chats import MARKERS, rows_of, run_convert, run_tokenize, smollm2, source
from tests.stages.packed import Packed
from tests.stages.test_judged_answers import always

CPU = Runtime(device="cpu", eval_batch=4)
CHANCE = random.Random(0)


def step(right: bool) -> str:
    """Letters are right, digits are wrong."""
    return "".join(CHANCE.choices("abcdefgh" if right else "0123456789", k=4))


def solution(number: int) -> dict[str, Any]:
    labels = [CHANCE.random() < 0.5 for _ in range(1 + number % 3)]
    return {"prompt": "solve it", "completions": [step(label) for label in labels], "labels": labels}


SOLUTIONS = [solution(number) for number in range(60)]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models so small are slower on two."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def plan(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    """What training reads, with steps that end with a semicolon; and what convert says of the asking."""
    folder = tmp_path_factory.mktemp("plan")
    rows = source(folder / "rows", SOLUTIONS[:48], name="solutions")
    shard, _ = run_convert(folder, rows, tiny_model, {"format": "stepwise", "options": {"separator": ";"}})
    tokens, _ = run_tokenize(folder, shard, tiny_model)
    (folder / "all/solutions").mkdir(parents=True)
    shutil.copytree(tokens, folder / "all/solutions/00000")
    packed = Packed(folder / "all", folder / "plan/out", sequence_length=128, global_batch=4).output
    return {"model": tiny_model, "tokens": folder / "all", "plan": packed, "templates": shard}


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory, plan: dict[str, Path]) -> Path:
    """A process reward model that regrow's own stages made."""
    folder = tmp_path_factory.mktemp("judge")
    (folder / "trained").mkdir()
    config = {"objective": "process_reward", "learning_rate": 1e-2, "precision": "fp32", "max_steps": 60}
    parsed = TrainConfig.model_validate({**config, "lora": {"rank": 8}})
    TRAIN.run(parsed, plan, folder / "trained", Work(folder / "work", CPU))
    (folder / "weights").mkdir()
    given = {**plan, "trained": folder / "trained"}
    merge.run(merge.MergeConfig(), given, folder / "weights", Work(folder / "merging", CPU))
    return folder / "weights"


def opened(folder: Path, how: reward_models.Steps | None = None) -> ProcessRewardModel:
    loaded = load(folder, "fp32", "cpu")
    found = reward_models.of(folder, loaded.network, loaded.tokenizer, how)
    assert isinstance(found, ProcessRewardModel)
    return found


def prompt_of(row: dict[str, Any], model: ProcessRewardModel) -> str:
    return reward_models.text_of(model.tokenizer, [{"role": "user", "content": row["prompt"]}])


@pytest.mark.parametrize("separator", ["\n", "\n\n", ".", " +\n"])
def test_answers_are_cut_and_tokenized_as_the_data_was(tmp_path: Path, separator: str) -> None:
    """The stages convert and tokenize are the oracle, on texts that tokenizers join and that look like control tokens;
    the pieces are such that cutting what was joined gives them back."""
    from transformers import AutoTokenizer

    chance = random.Random(separator)
    pieces = [*MARKERS, " ", "  x", "\n", "\n\n", "Hello", " world", "é", "漢字", "🙂", "12", "x.", "?!", "e\u0301"]
    rows = []
    for number in range(300):
        written = ["".join(chance.choices(pieces, k=chance.randint(1, 4))) for _ in range(chance.randint(1, 4))]
        if steps.cut(separator.join(written), separator) == written:
            rows.append({"prompt": f"q{number}", "completions": written, "labels": [True] * len(written)})
    assert len(rows) > 30
    shard, _ = run_convert(
        tmp_path,
        source(tmp_path / "r", rows),
        smollm2(),
        {"format": "stepwise", "template": "chatml", "options": {"separator": separator}},
    )
    trained_on = rows_of(run_tokenize(tmp_path, shard, smollm2())[0])
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    tokenizer.chat_template = (shard / "chat_template.jinja").read_text()
    encoder = encoding.load(tokenizer.backend_tokenizer.to_str(), ())
    for row, trained in zip(rows, trained_on, strict=True):
        prompt = reward_models.text_of(tokenizer, [{"role": "user", "content": row["prompt"]}])
        answer = separator.join(row["completions"])
        ids, ends = steps.tokens(encoder, prompt, steps.cut(answer, separator), separator)
        last = {span["turn"]: span["end"] - 1 for span in trained["spans"] if span["role"] == "text"}
        assert (ids, ends) == (trained["ids"], [*last.values()])
    assert json.loads((shard / "step_separator.json").read_text()) == separator


def test_every_step_is_given_what_training_and_one_pass_a_prefix_give_it(judge: Path, plan: dict[str, Path]) -> None:
    import torch

    model = opened(judge)
    network, bins = load_network(judge, "fp32", "cpu", packed=True), PackedBins(plan["tokens"], plan["plan"])
    for packed in itertools.islice((bins[number] for number in range(len(bins))), 3):
        batch = process_reward.prepare(collate([packed]))
        with torch.inference_mode():
            trained = heads.of(network, batch, batch["ends"]).softmax(-1)[:, 1].tolist()
        found: list[float] = []
        for ids in np.split(packed.ids, np.cumsum(packed.lengths)[:-1]):
            text = model.tokenizer.decode(ids)
            prompt, opening, answer = text.rpartition("<|im_start|>assistant\n")
            found += model.right(prompt + opening, answer)
        assert found == pytest.approx(trained, rel=1e-4, abs=1e-6)
    row = SOLUTIONS[-1]
    prompt = prompt_of(row, model)
    for number, right in enumerate(model.right(prompt, ";".join(row["completions"]))):
        text = prompt + "".join(f"{one};" for one in row["completions"][: number + 1])
        ids = model.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            assert right == pytest.approx(float(model.network(ids).logits[0, -1].softmax(-1)[1]), rel=1e-4)


def test_it_tells_right_steps_from_wrong_ones(judge: Path) -> None:
    model, told = opened(judge), []
    for row in SOLUTIONS[48:]:
        found = model.right(prompt_of(row, model), ";".join(row["completions"]))
        told += [(right > 0.5) == label for right, label in zip(found, row["labels"], strict=True)]
    assert sum(told) > 0.8 * len(told) and len(told) > 20


def test_steps_combine_as_the_recipe_says(judge: Path) -> None:
    row = {"prompt": "solve it", "completions": ["abab", "0101", "cdcd"]}
    turns, answer = [{"role": "user", "content": row["prompt"]}], ";".join(row["completions"])
    model = opened(judge)
    prompt = prompt_of(row, model)
    right = model.right(prompt, answer)
    assert len(set(right)) == 3
    expected = {"min": min(right), "product": math.prod(right), "mean": sum(right) / 3, "last": right[-1]}
    assert model.worth(turns, answer) == expected["min"], "of none is said"
    for how, worth in expected.items():
        one = opened(judge, how)  # type: ignore[arg-type]
        assert one.worth(turns, answer) == one.worth_after(prompt, answer) == pytest.approx(worth, rel=1e-6)


def test_what_is_no_step_counts_nothing(judge: Path) -> None:
    model = opened(judge)
    prompt = prompt_of({"prompt": "solve it"}, model)
    assert model.worth_after(prompt, "") == model.worth_after(prompt, " ; \n;") == 0.0
    assert model.right(prompt, "abab;; ;0101;") == model.right(prompt, "abab;0101")


def test_a_completion_cannot_write_control_tokens(judge: Path) -> None:
    """Else it could close its turn and open one that says whatever is likely right."""
    model = opened(judge)
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompt = prompt_of({"prompt": "solve it"}, model)
    ids, ends = steps.tokens(model.encoder, prompt, ["abab<|im_end|>"], model.separator)
    asked = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert end in asked and end not in ids[len(asked) :] and ends == [len(ids) - 1]


@pytest.mark.full
def test_the_judge_of_rewards_asks_it_and_has_it_once(judge: Path) -> None:
    model = opened(judge)
    prompt, answer = prompt_of({"prompt": "solve it"}, model), "abab;0101;cdcd"
    right = model.right(prompt, answer)
    choices = {
        "least": RewardChoice(reward="reward_model", options={"model": "kind"}),
        "end": RewardChoice(reward="reward_model", options={"model": "kind", "steps": "last"}),
    }
    with Judge(choices, seconds=60, models={"kind": judge}) as scoring:
        found = scoring.score([(answer, {"rendered_prompt": prompt}), ("", {"rendered_prompt": prompt})])
        assert found == {"least": [pytest.approx(min(right), rel=1e-4), 0.0], "end": [pytest.approx(right[-1]), 0.0]}
        with pytest.raises(UserError, match=r"its chat template opens an answer with"):
            scoring.score([("abab", {"rendered_prompt": "Question: hi"})])
        with pytest.raises(UserError, match=r"reads 256 tokens at most; question and answer have 2"):
            scoring.score([("a" * 260, {"rendered_prompt": prompt})])


def test_evaluate_asks_it_and_reports_shares(tmp_path: Path, judge: Path, tiny_model: Path) -> None:
    (tmp_path / "rows/asked/00000").mkdir(parents=True)
    asked = [{"question": f"solve {n}"} for n in range(9)]
    (tmp_path / "rows/asked/00000/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    letters = {"base": "7", "tuned": "b"}
    task = Task(source="asked", reward_model="steps", steps="product", max_new_tokens=5)
    for name, letter in letters.items():
        output = tmp_path / "scores" / name / "worth"
        output.mkdir(parents=True)
        weights = always(tmp_path / letter, tiny_model, letter)
        inputs = {"weights": weights, "rows": tmp_path / "rows", "reward_model": judge}
        evaluate.run(Measure(task=task, precision="fp32"), inputs, output, Work(tmp_path / "work", CPU))
    model = opened(judge, "product")
    found = compare(tmp_path / "scores")
    for name, letter in letters.items():
        scores = [model.worth([{"role": "user", "content": row["question"]}], letter * 5) for row in asked]
        assert found["tasks"]["worth"][name]["value"] == pytest.approx(sum(scores) / 9, rel=1e-4)
    worth = found["tasks"]["worth"]
    assert worth["metric"] == "product over steps by steps" and worth["better"] == "tuned"
    assert "unbounded" not in worth and worth["base"]["low"] < worth["base"]["high"] <= 1
    line = next(line for line in report(found).splitlines() if line.startswith("| worth"))
    assert f"{100 * worth['tuned']['value']:.1f} % (" in line


def test_what_a_process_reward_model_is_says_where_its_steps_end(tmp_path: Path, judge: Path) -> None:
    reward_models.check(judge, "here")
    assert json.loads((judge / "config.json").read_text())["step_separator"] == ";"
    for changes, told in (
        ({"step_separator": None}, r'does not say where steps end. Add .* e.g. "step_separator": "\\n"'),
        ({"step_separator": ""}, "does not say where steps end"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "sorts tokens into 3 labels, and a step is wrong or right"),
        ({"id2label": {"0": "right", "1": "wrong"}}, "its label 0 is 'right' in config.json, and label 0 is to be"),
        ({"id2label": {"0": "LABEL_0", "1": "Incorrect"}}, "its label 1 is 'Incorrect' in config.json"),
    ):
        config = {**json.loads((judge / "config.json").read_text()), **changes}
        folder = Path(shutil.copytree(judge, tmp_path / str(len(list(tmp_path.iterdir())))))
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=f"^here: .*{told}"):
            reward_models.check(folder, "here")


def test_steps_go_with_a_process_reward_model() -> None:
    with pytest.raises(ValidationError, match="it goes with `reward_model`"):
        Task.model_validate({"source": "a", "eval": "exact_match", "steps": "min"})
    with pytest.raises(ValidationError, match=r"min.*product.*mean.*last"):
        Task.model_validate({"source": "a", "reward_model": "m", "steps": "sum"})


TWO = """
name: judge
fetch: {{model: {{path: m}}, data: {{one: {{files: a.jsonl}}, two: {{files: b.jsonl}}}}}}
convert: {{format: stepwise, sources: {{two: {{options: {{separator: "{two}"}}}}}}}}
train: {{objective: process_reward}}
"""


def test_a_model_looks_for_one_separator(tmp_path: Path, tiny_model: Path) -> None:
    loads(TWO.format(two="\\n"), "judge.yaml")
    with pytest.raises(UserError, match=r"judge.yaml:4: .*looks for one separator: give all sources the same"):
        loads(TWO.format(two=";"), "judge.yaml")
    own = """
from stages.formats import Conversation, Example, Format, Turn
def convert(row, options):
    turns = [Turn("user", "q"), Turn("text", "a")]
    return Example([Conversation(turns, between=row["closed"])], {"labels": [True]})
FORMAT = Format(convert, kind="stepwise")
"""
    part = convert.ConvertPart.model_validate({"format": "own", "code": own, "bad_rows": "drop"})
    for name, separators in (("shard", (";", ";", ".")), ("none", (None, ";"))):
        rows = source(tmp_path / f"{name}-rows", [{"closed": separator} for separator in separators])
        (tmp_path / name).mkdir()
        work = Work(tmp_path / "w", Runtime(allow_code=True), where={"name": "mine.jsonl"})
        facts = convert.run(part, {"rows": rows, "tokenizer": tiny_model}, tmp_path / name, work)
        assert facts["dropped"] == {"other separator": 1}, "whichever comes first"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/step_separator.json").write_text('"\\n"')
    with pytest.raises(UserError, match=re.escape("closed by '\\n' and ';', and a model looks for one separator")):
        merge._separator(tmp_path)


SHORT = {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}


def test_sources_with_other_separators_are_told_before_they_are_packed(tmp_path: Path, tiny_model: Path) -> None:
    """However they are read: recognised here."""
    for name, separator in (("one", "\n"), ("same", "\n"), ("two", ";")):
        config = {"format": "stepwise", "options": {"separator": separator}} if separator != "\n" else {}
        rows = source(tmp_path / name / "rows", [SHORT], name=name)
        shard, _ = run_convert(tmp_path / name, rows, tiny_model, config)
        run_tokenize(tmp_path / "all" / name, shard, tiny_model)
    told = r"one closes its steps with '\\n' \(one/tokens\), two with ';' \(two/tokens\): .* Give all sources the same"
    with pytest.raises(UserError, match=told):
        find_shards(tmp_path / "all")
    shutil.rmtree(tmp_path / "all/two")
    assert len(find_shards(tmp_path / "all")) == 2


@pytest.mark.parametrize(
    ("separator", "bad", "reason", "told"),
    [
        ("\n", "a\nb", "separator in a step", "step 2 holds '\\n', which closes steps: set another options.separator"),
        ("\n\n", "a\n", "separator in a step", "step 2 ends with the beginning of '\\n\\n'"),
        (";", " ", "blank step", "step 2 says nothing: take it out, and its label"),
        (";", "", "blank step", "step 2 says nothing"),
    ],
)
def test_a_step_that_an_answer_could_not_be_cut_into_is_a_bad_row(
    tmp_path: Path, tiny_model: Path, separator: str, bad: str, reason: str, told: str
) -> None:
    assert steps.cut(separator.join(["a", bad, "c"]), separator) != ["a", bad, "c"]
    row = {"prompt": "q", "completions": ["a", bad, "c"], "labels": [True, True, False]}
    rows = source(tmp_path / "r", [SHORT, row])
    config = {"format": "stepwise", "options": {"separator": separator}}
    with pytest.raises(UserError, match=re.escape(f"line 2: {told}")):
        run_convert(tmp_path / "error", rows, tiny_model, config)
    _, facts = run_convert(tmp_path / "drop", rows, tiny_model, {**config, "bad_rows": "drop"})
    assert facts["dropped"] == {reason: 1}


def test_a_model_of_raw_text_alone_is_not_asked_through_a_chat_template(tmp_path: Path, tiny_model: Path) -> None:
    """merge says where steps end only if convert does, and what does not say so is refused."""
    chat = {**SHORT, "prompt": [{"role": "user", "content": "q"}]}
    for name, rows in (("text", [SHORT]), ("some", [SHORT, chat])):
        config = {"format": "stepwise", "options": {"wording": "text"}}
        shard, _ = run_convert(tmp_path / name, source(tmp_path / name / "rows", rows), tiny_model, config)
        assert merge._separator(shard) == (None if name == "text" else "\n")
        assert json.loads((shard / "counts.json").read_text())["step_separator"] == "\n"


def test_what_steps_cannot_be_written_with_is_told_before_anything_is_answered(tmp_path: Path, judge: Path) -> None:
    broken = Path(shutil.copytree(judge, tmp_path / "broken"))
    (broken / "chat_template.jinja").write_text("{% for m in messages %}")
    (tmp_path / "rows/asked/00000").mkdir(parents=True)
    (tmp_path / "rows/asked/00000/rows.jsonl").write_text('{"question": "solve it"}\n')
    inputs = {"weights": tmp_path / "gone", "rows": tmp_path / "rows", "reward_model": broken}
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="template"):
        task = Task(source="asked", reward_model="steps")
        evaluate.run(Measure(task=task, precision="fp32"), inputs, tmp_path / "out", Work(tmp_path / "work", CPU))
