"""Rewards: what each is worth, found by themselves; and the judge, which nothing that a reward does can stop."""

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stages import rewards
from stages.errors import UserError
from stages.judge import Judge
from stages.rewards import RewardChoice

GYM = {"answer": "4", "question": "2 + 2?", "metadata": {"source_dataset": "chain_sum", "source_index": 0}}
BARE = [
    (r"\frac12", "The answer is 0.5"),
    (r"\dfrac{3}{4}", "0.75"),
    (r"2\sqrt{3}", r"$2\sqrt{3}$"),
    (r"3\pi/2", r"\boxed{\frac{3\pi}{2}}"),
    ("10^{5}", "100000"),
    ("3x+1", "It is $1+3x$"),
    ("(1,2)", "$(1,2)$"),
    ("1,000", "1000"),
    (r"\text{(C)}", r"\boxed{C}"),
    (r"\$18", "18"),
    ("18 dollars", "He pays 18"),
    ("1/2 cup", "0.5"),
    ("2**3", "8"),
    ("12:30", "12:30"),
    ("The answer is 72", "72"),
    ("#### 72", "$72$"),
    (r"\(x^2\)", "$x^2$"),
    ("-3", "x = -3"),
    ("x=5", "5"),
    ("50%", "0.5"),
    ("1 000 000", "1000000"),
    (r"1\,000", "It is 1 000."),
    ("2 1/2", r"$2\frac{1}{2}$"),
    ("-2 1/2", "It is -2.5"),
    ("2 1/2 cups", "It takes 2 1/2."),
    ("1e3", "1,000"),
    ("1.5e-3", r"$1.5\times 10^{-3}$"),
    ("1e+16", "$10^{16}$"),
    (r"\$18", r"It costs \$18."),
    ("3:4", r"\boxed{3 : 4}"),
    ("$3:4$", "The ratio is 3:4."),
    ("10:30 AM", "It leaves at 10:30 am."),
    ("1 2 3", "Sorted they are 1 2 3"),
    ("A", "The answer is (A)."),
    ("(B)", r"\boxed{\textbf{(\text{B})}}"),
    ("C", "**Answer: C**"),
    ("yes", "Yes."),
    ("Paris", "It is Paris"),
    (r"\text{odd}", "odd"),
    ("New York", r"$\text{New York}$"),
    ("x", "$x$"),
]
WRONG = [
    (r"2\sqrt{3}", "2"),
    ("10^{5}", "10"),
    ("3x+1", "3"),
    ("18 dollars", "17 dollars"),
    ("1 000 000", "0"),
    ("2 1/2", "1.5"),
    ("1e3", "1"),
    ("3:4", "3:5"),
    ("3:4", "13:4"),
    ("10:30", "10:45"),
    ("10:30", "10"),
    ("1 2 3", "6"),
    ("A", "The answer is B"),
    ("A", r"A? No: \boxed{B}"),
    ("yes", "eyes"),
    ("Paris", "London"),
    ("New York", "York"),
    ("x", "$y + x$"),
]
CASES: dict[str, list[tuple[dict[str, Any], str, dict[str, Any], float]]] = {
    "exact_match": [
        ({}, " Paris \n", {"answer": "Paris"}, 1.0),
        ({}, "paris", {"answer": "Paris"}, 0.0),
        ({"ignore_case": True, "field": "city"}, "paris", {"city": "Paris"}, 1.0),
        ({}, "4", {"answer": 4}, 1.0),
        ({}, "The answer is Paris", {"answer": "Paris"}, 0.0),
    ],
    "regex": [
        ({"pattern": r"<answer>.*</answer>"}, "so <answer>4\n</answer>.", {}, 1.0),
        ({"pattern": r"\d+", "whole": True}, "4 apples", {}, 0.0),
        ({"pattern": r"\d+", "whole": True}, "44", {}, 1.0),
    ],
    "length": [
        ({"most": 10}, "x" * 10, {}, 1.0),
        ({"most": 10}, "x" * 15, {}, 0.5),
        ({"most": 10}, "x" * 30, {}, 0.0),
        ({"most": 10, "least": 3}, " x ", {}, 0.0),
    ],
    "reasoning_gym": [({}, "4", GYM, 1.0), ({"strict": True}, "the answer is 4", GYM, 0.0), ({}, "5", GYM, 0.0)],
    "math": [
        ({}, r"so it is $\frac{1}{2}$", {"answer": "0.5"}, 1.0),
        ({}, "$3$", {"answer": "$2$"}, 0.0),
        ({"field": "gold"}, "The result is $x^2 + 2x + 1$", {"gold": "$(x+1)^2$"}, 1.0),
        # A data set's answers are mostly bare.
        *[({}, given, {"answer": answer}, 1.0) for answer, given in BARE],
        *[({}, given, {"answer": answer}, 0.0) for answer, given in WRONG],
        *[({}, given, {"answer": 14.0}, worth) for given, worth in (("14", 1.0), ("$14.0$", 1.0), ("15", 0.0))],
    ],
}


@pytest.mark.parametrize("name", [name for name in rewards.names() if name != "reward_model"])
def test_every_reward_gives_what_it_says(name: str) -> None:
    if name == "math":
        pytest.importorskip("math_verify")
    assert CASES[name], "give each reward its cases"
    for options, completion, row, expected in CASES[name]:
        reward, parsed = rewards.load(RewardChoice(reward=name, options=options))
        assert reward.score(completion, row, parsed) == pytest.approx(expected), (completion, row)
        assert all(column in row for column in reward.needs(parsed))


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ({"reward": "exact_mtch"}, "did you mean 'exact_match'"),
        ({"reward": "length"}, "most"),
        ({"reward": "length", "options": {"most": 0}}, "most: .*greater than or equal to 1"),
        ({"reward": "regex", "options": {"pattern": "("}}, "no regular expression"),
        ({"reward": "./nowhere.py"}, "cannot read ./nowhere.py"),
    ],
)
def test_a_reward_that_does_not_fit_is_named(choice: dict[str, Any], told: str) -> None:
    with pytest.raises((ValidationError, UserError), match=told):
        RewardChoice.model_validate(choice)


OWN = """
import numpy
import time
from stages.rewards import Reward

def score(completion, row, options):
    if completion == "raise":
        raise KeyError("no such thing")
    if completion == "hang":
        while True:
            time.sleep(1)
    if completion == "die":
        import os
        os._exit(3)
    if completion in ("vast", "least"):
        return {"vast": 1e300, "least": -2e18}[completion]  # beyond what the trainer can square
    wrong = {"nan": float("nan"), "words": "1.5", "several": [1.0, 2.0], "none": None, "array": numpy.ones(2)}
    return wrong.get(completion, numpy.float32(len(completion)))

REWARD = Reward(1, score)
"""


@pytest.fixture
def own(tmp_path: Path) -> RewardChoice:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return RewardChoice(reward=str(path))


def test_scores_come_back_in_order_from_several_rewards_and_workers(own: RewardChoice) -> None:
    items = [("x" * n, {"answer": "xxx"}) for n in range(20)]
    choices = {"mine": own, "right": RewardChoice(reward="exact_match")}
    with Judge(choices, seconds=30, workers=2) as judge:
        found = judge.score(items)
        assert found["mine"] == [float(n) for n in range(20)]
        assert found["right"] == [float(n == 3) for n in range(20)]
        assert judge.score([]) == {"mine": [], "right": []}


def test_what_cannot_be_scored_counts_otherwise_and_the_rest_goes_on(own: RewardChoice) -> None:
    completions = ["ab", "raise", "hang", "abc", "nan", "die", "words", "vast", "least", "abcd"]
    with Judge({"mine": own}, seconds=1.0, workers=2, otherwise=0.0) as judge:
        found = judge.score([(text, {}) for text in completions])
        assert found["mine"] == [2.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 4.0]
        assert judge.unscored == {"mine": 7}


SLOW_TO_LOAD = """
import time
from pathlib import Path
from stages.rewards import Reward

HUNG, LOADING = Path("FOLDER/hung"), Path("FOLDER/loading")
if HUNG.exists():
    LOADING.touch()
    time.sleep(SECONDS)

def score(completion, row, options):
    if completion == "hang":
        HUNG.touch()
        time.sleep(1000)
    if completion == "half":
        time.sleep(SECONDS / 2)
    if completion == "late":
        while not LOADING.exists():
            time.sleep(0.01)
    return len(completion)

REWARD = Reward(1, score)
"""


def test_who_answers_while_another_worker_is_replaced_has_answered(tmp_path: Path) -> None:
    seconds = 1.0
    path = tmp_path / "mine.py"
    path.write_text(SLOW_TO_LOAD.replace("FOLDER", str(tmp_path)).replace("SECONDS", str(seconds)))
    choice = RewardChoice(reward=str(path))
    with Judge({"mine": choice}, seconds=seconds, workers=2, otherwise=0.0) as judge:
        # The second worker begins with "late" half a time limit after "hang", and ends it while a third one loads.
        assert judge.score([(text, {}) for text in ("hang", "half", "late")])["mine"] == [0.0, 4.0, 4.0]
        assert judge.unscored == {"mine": 1}


@pytest.mark.parametrize(
    ("completion", "told"),
    [
        ("raise", "KeyError: 'no such thing'"),
        ("hang", "no score within 0.5 s"),
        ("nan", "it gave nan, expected a number up to 1e+15"),
        ("vast", "it gave 1e+300, expected a number up to 1e+15"),
        ("die", "its process died"),
        ("words", "it gave the str '1.5', expected a number for each completion"),
        ("several", "it gave the list [1.0, 2.0], expected a number for each completion"),
        ("none", "it gave the NoneType None, expected a number"),
        ("array", "it gave the ndarray array([1., 1.]), expected a number"),
    ],
)
def test_or_is_told_with_reward_completion_and_row(own: RewardChoice, completion: str, told: str) -> None:
    with Judge({"mine": own}, seconds=0.5) as judge, pytest.raises(UserError) as caught:
        judge.score([(completion, {"question": "why?"})])
    for part in ("the reward mine", told, repr(completion), "why?", "on_error"):
        assert part in str(caught.value)


def test_a_reward_is_bounded_with_its_weight(own: RewardChoice) -> None:
    heavy = own.model_copy(update={"weight": -1e15})
    with Judge({"mine": heavy}, seconds=10) as judge:
        assert judge.score([("a", {})]) == {"mine": [1.0]}
        told = r"the reward mine: it gave 2 \(-2e\+15 with its weight of -1e\+15\), expected a number up to 1e\+15"
        with pytest.raises(UserError, match=told):
            judge.score([("ab", {})])


def test_a_file_that_fails_is_told_before_anything_is_scored(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("REWARD = 3")
    with pytest.raises(UserError, match="has no REWARD"):
        Judge({"mine": RewardChoice(reward=str(path))}, seconds=1)


@pytest.mark.parametrize("otherwise", [None, 0.0], ids=["stop", "zero"])
def test_a_library_that_is_missing_is_told_before_anything_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, otherwise: float | None
) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(UserError, match=r"the reward math needs math-verify: pip install 'regrow\[math\]'"):
        Judge({"right": RewardChoice(reward="math")}, seconds=10, otherwise=otherwise)


ASKED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def reward_model(tmp_path: Path, tiny_model: Path) -> Path:
    """A folder as the objective `reward` publishes it."""
    import shutil

    import torch

    from stages import heads

    folder = tmp_path / "reward"
    shutil.copytree(tiny_model, folder)
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(4))
    heads.save({"weight": weight}, tmp_path)
    heads.convert(folder, tmp_path / heads.HEAD)
    return folder


def processes() -> int:
    """How many processes score for this one."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return sum(b"stages.judge" in Path(f"/proc/{child}/cmdline").read_bytes() for child in children)


@pytest.mark.full
def test_a_reward_model_is_in_memory_once_however_many_workers_there_are(reward_model: Path, own: RewardChoice) -> None:
    worth = RewardChoice(reward="reward_model", options={"model": "kind"})
    models = {"kind": reward_model}
    with Judge({"worth": worth}, seconds=60, workers=3, models=models):
        assert processes() == 1
    with Judge({"mine": own, "worth": worth}, seconds=60, workers=2, models=models) as judge:
        assert processes() == 2 + 1
        found = judge.score([("x" * n, {"rendered_prompt": ASKED}) for n in range(5)])
        assert found["mine"] == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert len(set(found["worth"])) == 5
    assert processes() == 0


def test_a_reward_model_in_bfloat16_is_read_in_float32_where_the_cpu_would_emulate_it(
    reward_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes 35 times as long, and scores have a time limit."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path / "narrow"
    model = AutoModelForSequenceClassification.from_pretrained(reward_model, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(reward_model).save_pretrained(folder)
    model.config.pad_token_id = None
    text = f"{ASKED}yes<|im_end|>\n"
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    expected = float(model.float()(ids).logits)
    monkeypatch.setattr("stages.arithmetic.cpu_has_bf16", lambda: False)
    reward, options = rewards.load(RewardChoice(reward="reward_model", options={"model": "narrow"}))
    reward.ready(options, {"narrow": folder})
    assert reward.score("yes", {"rendered_prompt": ASKED}, options) == pytest.approx(expected, rel=1e-5)


def test_a_reward_model_scores_prompt_and_completion(reward_model: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    choice = RewardChoice(reward="reward_model", options={"model": "kind"})
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    asked = [{"role": "user", "content": "hi"}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    chat = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": "yes"}], tokenize=False)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    model.config.pad_token_id = None
    expected = float(model(tokenizer(chat, add_special_tokens=False, return_tensors="pt")["input_ids"]).logits)
    with Judge({"worth": choice}, seconds=20, models={"kind": reward_model}) as judge:
        found = judge.score([("yes", {"rendered_prompt": prompt})])
        assert found["worth"] == [pytest.approx(expected, rel=1e-4)]
        with pytest.raises(UserError, match=r"the reward worth: .*its chat template opens an answer with"):
            judge.score([("yes", {"rendered_prompt": "Question: hi"})])
        with pytest.raises(UserError, match=r"the reward worth: .*reads 256 tokens at most"):
            judge.score([("yes" * 90, {"rendered_prompt": prompt})])
