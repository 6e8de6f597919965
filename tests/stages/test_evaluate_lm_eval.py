"""evaluate: tasks that lm-eval brings count by the metrics and the items that they should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages import evaluate, generation, harness
from stages.errors import UserError
from stages.evaluate import EvaluateConfig, Task
from tests.stages.chatting import QUESTIONS, chat_model, one_thread

__all__ = ["chat_model", "one_thread"]


CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: right
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_lm_evals_choices_are_scored_an_item_each(chat_model: Path, tmp_path: Path) -> None:
    import torch
    from lm_eval.tasks import TaskManager

    model = generation.load(chat_model, "fp32", "cpu")
    questions = [("sun", ["nus", "uns"]), ("moon", ["noom", "moon", "oomn"]), ("tree", ["a", "b"])]

    def log_likelihood(question: str, choice: str) -> float:
        before = model.tokenizer(model.ask(question))["input_ids"]
        after = model.tokenizer(model.ask(question) + choice)["input_ids"]
        with torch.no_grad():
            logs = model.network(torch.tensor([after])).logits[0].log_softmax(-1)
        return sum(float(logs[i - 1, after[i]]) for i in range(len(before), len(after)))

    rows = []
    expected = []
    for number, (question, choices) in enumerate(questions):
        best = max(range(len(choices)), key=lambda i: log_likelihood(question, choices[i]))
        right = best if number != 1 else (best + 1) % 3
        rows.append(json.dumps({"question": question, "choices": choices, "right": right}))
        expected.append(float(right == best))
    (tmp_path / "rows.json").write_text("\n".join(rows))
    (tmp_path / "choices.yaml").write_text(CHOICES.format(file=tmp_path / "rows.json", cache=tmp_path / "cache"))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    told: list[tuple[int, int]] = []
    samples, lost = harness._samples(model, manager, "choices", "", 2, lambda *now: told.append(now))
    assert lost == 0
    assert [(sample.task, sample.metric, sample.score) for sample in samples] == [
        ("choices", "acc", score) for score in expected
    ]
    assert expected == [1.0, 0.0, 1.0]
    assert told[-1] == (7, 7)
    with pytest.raises(UserError, match="choices has no metric 'bleu'"):
        harness._samples(model, manager, "choices", "bleu", 2, lambda *now: None)


OF_LESS = """
task: of_less
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: loglikelihood
doc_to_text: question
doc_to_target: answer
process_results: !function results.of_an_item
metric_list: [{metrics}]
"""
FALLING = (
    "{metric: perplexity, aggregation: perplexity, higher_is_better: false}",
    "{metric: preferred, aggregation: mean, higher_is_better: false}",
)
RISING = ("{metric: points, aggregation: mean, higher_is_better: true}",)


@pytest.mark.parametrize(
    ("metrics", "metric", "told"),
    [
        ((*FALLING, *RISING), "", ""),  # as lambada's, whose perplexity comes first
        ((*FALLING, *RISING), "preferred", "of of_less's metric 'preferred' less is better.*name another one: points"),
        (FALLING, "", "of all metrics of of_less less is better.*: perplexity, preferred"),  # as crows_pairs'
        (FALLING, "preferred", "has no other: take the task out"),
    ],
)
def test_a_metric_of_which_less_is_better_is_no_score(
    chat_model: Path, tmp_path: Path, metrics: tuple[str, ...], metric: str, told: str
) -> None:
    from lm_eval.tasks import TaskManager

    (tmp_path / "rows.json").write_text("\n".join(json.dumps({"question": q, "answer": "x"}) for q in QUESTIONS))
    given = {"perplexity": -9.0, "preferred": 1.0, "points": 30.0}
    known = {name: value for name, value in given.items() if f"metric: {name}," in str(metrics)}
    (tmp_path / "results.py").write_text(f"def of_an_item(doc, results):\n    return {known}\n")
    text = OF_LESS.format(file=tmp_path / "rows.json", cache=tmp_path / "cache", metrics=", ".join(metrics))
    (tmp_path / "of_less.yaml").write_text(text)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    model = generation.load(chat_model, "fp32", "cpu")
    if told:
        with pytest.raises(UserError, match=told):
            harness._samples(model, manager, "of_less", metric, 2, lambda *now: None)
        return
    samples, _ = harness._samples(model, manager, "of_less", metric, 2, lambda *now: None)
    assert {(sample.metric, sample.score) for sample in samples} == {("points", 30.0)}


WRITTEN = """
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: right
generation_kwargs: {{until: [], do_sample: false, max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.parametrize(("name", "text"), [("written", WRITTEN), ("choices", CHOICES)])
def test_questions_of_lm_eval_that_lose_their_beginning_are_counted(
    chat_model: Path, tmp_path: Path, name: str, text: str
) -> None:
    from lm_eval.tasks import TaskManager

    asked = ["sun", "x" * 300, "moon", "y" * 300]  # the model reads 256 tokens
    rows = [json.dumps({"question": question, "choices": ["a", "b"], "right": 0}) for question in asked]
    (tmp_path / "rows.json").write_text("\n".join(rows))
    (tmp_path / f"{name}.yaml").write_text(text.format(file=tmp_path / "rows.json", cache=tmp_path / "cache"))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    model = generation.load(chat_model, "fp32", "cpu")
    samples, lost = harness._samples(model, manager, name, "", 2, lambda *now: None)
    assert (len(samples), lost) == (4, 2)


def test_a_system_prompt_stands_before_questions_and_examples_of_lm_eval(chat_model: Path, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    rows = [json.dumps({"question": question, "right": "a"}) for question in ("sun", "moon")]
    (tmp_path / "rows.json").write_text("\n".join(rows))
    shots = "fewshot_split: test\nfewshot_config: {sampler: first_n}\n"
    text = WRITTEN.format(file=tmp_path / "rows.json", cache=tmp_path / "cache")
    (tmp_path / "written.yaml").write_text(text + shots)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    model = generation.load(chat_model, "fp32", "cpu")
    samples, _ = harness._samples(model, manager, "written", "", 2, print, few_shot=1, system="Be brief.")
    begins = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert all(sample.question.startswith(begins) and "assistant\na<|im_end|>" in sample.question for sample in samples)


@pytest.mark.full
def test_an_unknown_lm_eval_task_is_told_before_anything_runs() -> None:
    with pytest.raises(UserError, match=r"lm-eval has no task 'gsm9k'\. Nearest names: .*gsm8k"):
        evaluate.check(EvaluateConfig(tasks={"a": Task(lm_eval="gsm9k")}))
    evaluate.check(EvaluateConfig(tasks={"a": Task(lm_eval="gsm8k"), "b": Task(lm_eval="mmlu"), "c": Task(source="s")}))


@pytest.mark.full
def test_a_task_whose_data_cannot_be_had_says_so(chat_model: Path, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from stages import generation, harness
model = generation.load(Path({str(chat_model)!r}), "fp32", "cpu")
harness.shipped(model, "gsm8k", "", None, None, "", 2, print)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert "UserError: evaluate.tasks: lm-eval's task 'gsm8k' does not load" in done.stderr
