"""evaluate: both scorers agree, errors name the place, held-out loss is the trained one, parts read what they need."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stages import evaluate, evaluating, generation, harness
from stages.build import Built, build
from stages.compare import compare
from stages.errors import UserError
from stages.evaluate import EvaluateConfig, Measure, Task
from stages.identity import Action, Json, Tree, tree_of
from stages.jobs import Hooks
from stages.runtime import Runtime
from stages.stage import Work
from stages.store import Store
from stages.tables import BINS, documents_schema, tokens_schema, write_table
from tests.stages.chatting import QUESTIONS, TEMPLATE, chat_model, one_thread, through_lm_eval

__all__ = ["chat_model", "one_thread"]


def rows(folder: Path, values: list[Mapping[str, Json]], source: str = "spelling") -> Path:
    shard = folder / "rows" / source / "00000"
    shard.mkdir(parents=True)
    (shard / "rows.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    return folder / "rows"


def run(tmp_path: Path, config: Measure, inputs: Mapping[str, Path]) -> tuple[Json, list[Json], Json, list[float]]:
    """(scores, samples, facts, progress) of one part."""
    told: list[float] = []
    work = Work(tmp_path / "work", Runtime(eval_batch=2, device="cpu"), tell=lambda done, *_, **__: told.append(done))
    output = tmp_path / "output"
    output.mkdir(parents=True)
    facts = evaluate.run(config, inputs, output, work)
    samples = output / "samples.jsonl"
    lines = [json.loads(line) for line in samples.read_text().splitlines()] if samples.exists() else []
    return json.loads((output / "scores.json").read_text()), lines, facts, told


def test_lm_eval_and_our_own_generation_and_scorer_agree_item_for_item(tmp_path: Path, chat_model: Path) -> None:
    model = generation.load(chat_model, "fp32", "cpu")
    answers = generation.generate(model, [model.ask(q) for q in QUESTIONS], 8, [], 2, lambda done: None)
    # A random model hits no real target: some targets are its own answers, so that right ones are met too.
    targets = [answer.strip() if i % 2 else "talps" for i, answer in enumerate(answers)]
    values = [{"question": q, "answer": t} for q, t in zip(QUESTIONS, targets, strict=True)]
    inputs = {"weights": chat_model, "rows": rows(tmp_path, values)}
    task: dict[str, Any] = {"source": "spelling", "max_new_tokens": 8}
    theirs = run(tmp_path / "a", Measure(task=Task(**task), precision="fp32"), inputs)
    ours = run(tmp_path / "b", Measure(task=Task(**task, eval="exact_match"), precision="fp32"), inputs)

    assert [sample["answer"] for sample in theirs[1]] == answers
    assert theirs[1] == ours[1]
    assert [sample["score"] for sample in theirs[1]] == [0.0, 1.0, 0.0, 1.0, 0.0]
    assert theirs[0]["tasks"][""] == {"metric": "exact_match", "n": 5, "value": 0.4} == ours[0]["tasks"][""]
    assert theirs[2]["scored_twice"] == theirs[2]["agreeing"] == 5
    assert theirs[3] == [2, 4, 5] == ours[3]


def test_a_chat_template_is_all_there_is_before_a_question(chat_model: Path, tmp_path: Path) -> None:
    """A tokenizer that puts a begin token before every text puts none before a rendered chat: training has none."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = shutil.copytree(chat_model, tmp_path / "begins")
    bare = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    bare.post_processor = TemplateProcessing(single="<|im_end|> $A", special_tokens=[("<|im_end|>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<|im_end|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    with_begin, without = (generation.load(place, "fp32", "cpu") for place in (folder, chat_model))
    assert with_begin.tokenizer("a")["input_ids"][0] == 1
    prompts = [without.ask(q) for q in QUESTIONS]
    plain = generation.generate(without, prompts, 8, [], 2, lambda done: None)
    assert generation.generate(with_begin, prompts, 8, [], 2, lambda done: None) == plain
    theirs = through_lm_eval(with_begin, QUESTIONS, tmp_path / "h", 8)
    assert [sample.answer for sample in theirs] == plain


THROUGH = pytest.mark.parametrize("through", [{}, {"eval": "exact_match"}], ids=["lm-eval", "our own"])


@THROUGH
def test_a_conversation_is_asked_as_training_has_it(through: dict[str, str], chat_model: Path, tmp_path: Path) -> None:
    """The system prompt of the row, or else the task's, and the turns before the answer."""
    spoken = [("user", QUESTIONS[0]), ("assistant", "nus"), ("user", QUESTIONS[1]), ("assistant", "noom")]
    said = [{"role": role, "content": content} for role, content in spoken]
    brief, slow = ({"role": "system", "content": content} for content in ("Be brief.", "Spell slowly."))
    model = generation.load(chat_model, "fp32", "cpu")
    asked = [[brief, *said[:3]], [slow, *said[:3]], [brief, *said[:1]]]
    answers = generation.generate(model, [model.ask(turns) for turns in asked], 8, [], 2, lambda done: None)
    assert len(set(answers)) == 3
    values = [{"messages": said}, {"messages": [slow, *said]}, {"question": QUESTIONS[0], "answer": answers[2]}]
    inputs = {"weights": chat_model, "rows": rows(tmp_path, values)}
    task = Task(source="spelling", max_new_tokens=8, system="Be brief.", **through)
    _, samples, _, _ = run(tmp_path / "a", Measure(task=task, precision="fp32"), inputs)
    assert [sample["answer"] for sample in samples] == answers
    assert [(sample["target"], sample["score"]) for sample in samples] == [
        ("noom", 0.0),
        ("noom", 0.0),
        (answers[2], 1.0),
    ]
    assert samples[1]["question"].startswith(f"system: Spell slowly.\nuser: {QUESTIONS[0]}\nassistant: nus\n")


DATED = "Today is {{ strftime_now('%d %B %Y') }}.\n"
PERHAPS = "Today is {% if strftime_now is defined %}{{ strftime_now('%d %B %Y') }}{% else %}some day{% endif %}.\n"


@pytest.mark.parametrize(("first", "date"), [(DATED, "2026-01-31"), (PERHAPS, "2026-01-31"), (PERHAPS, None)])
@THROUGH
def test_the_date_that_a_template_asks_for_is_the_recipes(
    through: dict[str, str], first: str, date: str | None, chat_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(chat_model, tmp_path / "dated")
    (folder / "chat_template.jinja").write_text(first + TEMPLATE)
    plain = generation.load(chat_model, "fp32", "cpu")
    begin = f"Today is {'31 January 2026' if date else 'some day'}.\n"
    answers = generation.generate(plain, [begin + plain.ask(q) for q in QUESTIONS], 8, [], 2, lambda done: None)
    task = {"source": "spelling", "max_new_tokens": 8, **through}
    config = Measure.model_validate({"task": task, "precision": "fp32", "date": date})
    inputs = {"weights": folder, "rows": rows(tmp_path, [{"question": q, "answer": "a"} for q in QUESTIONS])}
    _, samples, _, _ = run(tmp_path / "a", config, inputs)
    assert [sample["answer"] for sample in samples] == answers
    if first == DATED:
        with pytest.raises(UserError, match=r"It asks for the date: set `evaluate\.date`"):
            run(tmp_path / "b", config.model_copy(update={"date": None}), inputs)


@THROUGH
def test_questions_that_lose_their_beginning_are_counted(
    through: dict[str, str], chat_model: Path, tmp_path: Path
) -> None:
    values = [{"question": "spell " + "a b " * n, "answer": "x"} for n in (1, 200)]
    inputs = {"weights": chat_model, "rows": rows(tmp_path, values)}
    task = Task(source="spelling", max_new_tokens=8, **through)
    scores, _, facts, _ = run(tmp_path / "a", Measure(task=task, precision="fp32"), inputs)
    assert scores["cut_questions"] == facts["cut_questions"] == 1
    task = Task(source="spelling", max_new_tokens=256, **through)
    with pytest.raises(UserError, match=r"256 tokens .* leaves no room .* context is 256"):
        run(tmp_path / "b", Measure(task=task, precision="fp32"), inputs)


def test_stop_strings_end_answers_alike(chat_model: Path, tmp_path: Path) -> None:
    model = generation.load(chat_model, "fp32", "cpu")
    prompts = [model.ask(q) for q in QUESTIONS]
    free = generation.generate(model, prompts, 12, [], 2, lambda done: None)
    stop = [free[0][2:4], free[1][1:2]]
    ours = generation.generate(model, prompts, 12, stop, 2, lambda done: None)
    theirs = through_lm_eval(model, QUESTIONS, tmp_path, 12, stop)
    assert ours != free
    assert [sample.answer for sample in theirs] == ours
    assert not any(term in answer for term in stop for answer in ours)


def test_a_stop_string_is_looked_for_in_the_answer_alone(chat_model: Path) -> None:
    model = generation.load(chat_model, "fp32", "cpu")
    prompt = model.ask(QUESTIONS[0])
    (free,) = generation.generate(model, [prompt], 6, [], 1, lambda done: None)
    assert len(free) > 2
    (answer,) = generation.generate(model, [prompt], 6, [prompt[-1] + free[0]], 1, lambda done: None)
    assert answer == free


@pytest.mark.parametrize("own", [{"max_new_tokens": 3}, {"max_new_tokens": 40}, {"repetition_penalty": 1.5}])
def test_a_models_own_settings_do_not_change_how_it_is_asked(
    chat_model: Path, tmp_path: Path, own: dict[str, Any]
) -> None:
    folder = shutil.copytree(chat_model, tmp_path / "model")
    plain = generation.load(chat_model, "fp32", "cpu")
    expected = generation.generate(plain, [plain.ask(q) for q in QUESTIONS], 12, (), 2, lambda done: None)
    settings = {**json.loads((folder / "generation_config.json").read_text()), **own}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model = generation.load(folder, "fp32", "cpu")
    ours = generation.generate(model, [model.ask(q) for q in QUESTIONS], 12, (), 2, lambda done: None)
    assert ours == expected
    theirs = through_lm_eval(model, QUESTIONS, tmp_path / "work", 12)
    assert [sample.answer for sample in theirs] == ours


def test_ignoring_case_keeps_the_answer_as_it_was_written(chat_model: Path, tmp_path: Path) -> None:
    model = generation.load(chat_model, "fp32", "cpu")
    answer = generation.generate(model, [model.ask("sun")], 8, [], 2, lambda done: None)[0]
    inputs = {
        "weights": chat_model,
        "rows": rows(tmp_path, [{"question": "sun", "answer": f" {answer.swapcase()}"}]),
    }
    task = Task(source="spelling", max_new_tokens=8, ignore_case=True)
    scores, samples, facts, _ = run(tmp_path / "a", Measure(task=task, precision="fp32"), inputs)
    assert answer.swapcase() != answer
    assert samples[0]["answer"] == answer
    assert samples[0]["target"] == f" {answer.swapcase()}"
    assert (scores["tasks"][""]["value"], facts["agreeing"]) == (1.0, 1)


def test_local_tasks_need_no_network(chat_model: Path, tmp_path: Path) -> None:
    inputs = {"weights": chat_model, "rows": rows(tmp_path, [{"question": "q", "answer": "a"}])}
    code = f"""
import socket, sys
from pathlib import Path
def refuse(*args, **kwargs):
    print("NETWORK", args, file=sys.stderr)
    raise OSError("no network")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
from stages import evaluate
from stages.stage import Work
from stages.store import Store
from stages.runtime import Runtime
from stages.evaluate import Measure, Task
evaluate.run(Measure(task=Task(source="spelling", max_new_tokens=2)),
    {{"weights": Path({str(chat_model)!r}), "rows": Path({str(inputs["rows"])!r})}},
    Path({str(tmp_path)!r}), Work(Path({str(tmp_path / "work")!r}), Runtime(device="cpu")))
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "NETWORK" not in done.stderr


def test_a_bad_row_stops_it_before_the_model_is_loaded(tmp_path: Path) -> None:
    inputs = {
        "weights": tmp_path / "nowhere",
        "rows": rows(tmp_path, [{"question": "q", "answer": "a"}, {"text": "t"}]),
    }
    config = Measure(task=Task(source="spelling"))
    with pytest.raises(UserError, match=re.escape("spelling/00000/rows.jsonl line 2: a question is a text or")):
        run(tmp_path / "a", config, inputs)


def test_a_limit_takes_the_first_rows_over_all_shards(tmp_path: Path) -> None:
    folder = rows(tmp_path, [{"question": str(i), "answer": "a"} for i in range(3)])
    (folder / "spelling/00001").mkdir()
    (folder / "spelling/00001/rows.jsonl").write_text('{"question": "3", "answer": "a"}\n{"question": "4"}\n')
    read = list(evaluating._read(folder, Task(source="spelling", limit=4)))
    assert [row["question"] for _, row in read] == ["0", "1", "2", "3"]


def test_no_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no rows"):
        run(tmp_path / "a", Measure(task=Task(source="spelling")), {"weights": tmp_path, "rows": rows(tmp_path, [])})


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=re.escape("pip install 'regrow[evaluate]'")):
        harness.require()


# ---- configuration and parts ------------------------------------------------------------------------------------


def trees(**models: str) -> dict[str, Tree]:
    def tree(*paths: str, content: str = "") -> Tree:
        from stages.identity import File, sha256_text

        return Tree(tuple(File(p, 1, sha256_text(content + p)) for p in paths))

    return {
        "base": tree("config.json", content=models.get("base", "base")),
        "weights": tree("config.json", "merge.json", content=models.get("tuned", "tuned")),
        "rows": tree("spelling/00000/rows.jsonl", "other/00000/rows.jsonl"),
        "plan": tree("plan.json", "bins.arrow", "documents.arrow", "heldout_bins.arrow", "heldout_documents.arrow"),
    }


@pytest.mark.full
def test_another_tuned_model_leaves_the_base_models_parts_as_they_were() -> None:
    config = EvaluateConfig(tasks={"spelling": {"source": "spelling"}})  # type: ignore[dict-item]
    before = {p.name: p for p in evaluate.parts(config, trees())}
    after = {p.name: p for p in evaluate.parts(config, trees(tuned="other"))}
    assert list(before) == ["base/spelling", "base/heldout_loss", "tuned/spelling", "tuned/heldout_loss"]
    assert [name for name in before if before[name] != after[name]] == ["tuned/spelling", "tuned/heldout_loss"]


def test_parts_read_only_what_they_need() -> None:
    config = EvaluateConfig(tasks={"spelling": {"source": "spelling"}})  # type: ignore[dict-item]
    parts = {p.name: p for p in evaluate.parts(config, trees())}
    read = {name: sorted(f.path for f in tree.files) for name, tree in parts["tuned/spelling"].inputs.items()}
    assert read == {"weights": ["config.json"], "rows": ["spelling/00000/rows.jsonl"]}
    plan = parts["base/heldout_loss"].inputs["plan"]
    assert sorted(f.path for f in plan.files) == ["heldout_bins.arrow", "heldout_documents.arrow", "plan.json"]


def test_an_unknown_source_names_the_nearest() -> None:
    config = EvaluateConfig(tasks={"spelling": {"source": "speling"}})  # type: ignore[dict-item]
    with pytest.raises(UserError, match="did you mean 'spelling'"):
        evaluate.parts(config, trees())


def test_tasks_may_be_a_list() -> None:
    config = EvaluateConfig.model_validate({"tasks": [{"source": "spelling", "limit": 5}, "gsm8k"]})
    assert {name: (task.source, task.lm_eval) for name, task in config.tasks.items()} == {
        "spelling": ("spelling", ""),
        "gsm8k": ("", "gsm8k"),
    }


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"a": {}}, "either `source`"),
        ({"a": {"source": "s", "lm_eval": "gsm8k"}}, "either `source`"),
        ({"a": {"source": "s", "eval": "exactmatch"}}, "did you mean 'exact_match'"),
        ({"a": {"source": "s", "metric": "bleu"}}, "scored by 'exact_match'"),
        ({"a": {"source": "s", "few_shot": 5}}, "`few_shot` says nothing to a task with `source`"),
        ({"a": {"lm_eval": "gsm8k", "max_new_tokens": 512}}, "`max_new_tokens` says nothing to a task with `lm_eval`"),
        (
            {"a": {"source": "s", "reward_model": "m", "answer": "x"}},
            "`answer` says nothing to a task with `reward_model`",
        ),
        ({"a/b": {"source": "s"}}, "cannot name a task"),
        ({"heldout_loss": {"source": "s"}}, "cannot name a task"),
        ([{"source": "s"}, {"source": "s"}], "two tasks would be called 's'"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused(tasks: Json, message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        EvaluateConfig.model_validate({"tasks": tasks})


def test_evals_versions_enter_the_key() -> None:
    config = EvaluateConfig.model_validate({"tasks": [{"source": "spelling"}, "gsm8k"]})
    assert evaluate.plugins(config) == {"eval:exact_match": 2}
    assert evaluate.plugins(Measure()) == {} == evaluate.plugins(Measure(task=Task(lm_eval="gsm8k")))


# ---- held-out loss ----------------------------------------------------------------------------------------------


def heldout(folder: Path, documents: list[list[int]], bins: list[list[int]], vocabulary: int) -> dict[str, Path]:
    """A plan whose held-out documents train from their third token on."""
    plan = folder / "plan"
    write_table(plan / "heldout_tokens.arrow", tokens_schema(vocabulary), ({"ids": ids} for ids in documents))
    write_table(
        plan / "heldout_documents.arrow",
        documents_schema(1, 2048),
        (
            {"shard": 0, "row": i, "number": i, "length": len(ids), "trained": [{"start": 2, "end": len(ids)}]}
            for i, ids in enumerate(documents)
        ),
    )
    lengths = [sum(len(documents[d]) for d in numbers) for numbers in bins]
    write_table(
        plan / "heldout_bins.arrow",
        BINS,
        (
            {"documents": numbers, "length": length, "trained": length - 2 * len(numbers)}
            for numbers, length in zip(bins, lengths, strict=True)
        ),
    )
    description = {"sequence_length": 32, "global_batch": 2, "max_documents": 8, "shards": [{"path": "chat/00000"}]}
    (plan / "plan.json").write_text(json.dumps(description))
    return {"plan": plan}


def test_heldout_loss_is_each_documents_own_cross_entropy(chat_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    documents = [[(7 * i + 3 * j) % 250 + 2 for j in range(5 + i)] for i in range(6)]
    bins = [[0, 3], [1, 2, 4], [5]]
    inputs = {"weights": chat_model, **heldout(tmp_path, documents, bins, 300)}
    scores, _, facts, told = run(tmp_path / "a", Measure(precision="fp32"), inputs)

    model = AutoModelForCausalLM.from_pretrained(chat_model).eval()
    expected = []
    for numbers in bins:
        total = 0.0
        for document in (documents[d] for d in numbers):
            with torch.no_grad():
                logs = model(torch.tensor([document])).logits[0].log_softmax(-1)
            total -= sum(float(logs[i - 1, document[i]]) for i in range(2, len(document)))
        expected.append(total)
    assert scores["sums"] == pytest.approx(expected, rel=1e-4)
    assert scores["tokens"] == [9, 16, 8]
    assert facts["heldout_tokens"] == 33
    assert told == [1, 2, 3]


def test_without_heldout_rows_no_model_is_loaded(tmp_path: Path) -> None:
    inputs = {"weights": tmp_path / "nowhere", **heldout(tmp_path, [], [], 300)}
    scores, _, facts, _ = run(tmp_path / "a", Measure(), inputs)
    assert scores == {"sums": [], "tokens": []}
    assert facts["heldout_tokens"] == 0


def test_the_same_model_scores_the_same_bytes(chat_model: Path, tmp_path: Path) -> None:
    inputs = {"weights": chat_model, "rows": rows(tmp_path, [{"question": q, "answer": "x"} for q in QUESTIONS])}
    config = Measure(task=Task(source="spelling", max_new_tokens=4))
    for name in ("a", "b"):
        run(tmp_path / name, config, inputs)
    assert tree_of(tmp_path / "a/output") == tree_of(tmp_path / "b/output")


@pytest.mark.full
def test_another_tuned_model_is_scored_alone(chat_model: Path, store: Store, tmp_path: Path) -> None:
    held = heldout(tmp_path, [[5, 6, 7, 8, 9]], [[0]], 300)
    folders = {"base": chat_model, "rows": rows(tmp_path, [{"question": "q", "answer": "a"}]), **held}
    trees = {name: committed(store, folder) for name, folder in folders.items()}
    config = EvaluateConfig(tasks={"spelling": Task(source="spelling", max_new_tokens=2)})
    ran: list[str] = []
    hooks = Hooks(on_event=lambda event: ran.append(event["name"]) if event["event"] == "task" else None)

    def evaluated(epsilon: float) -> Built:
        tuned = tmp_path / f"tuned-{epsilon}"
        shutil.copytree(chat_model, tuned)
        settings = json.loads((tuned / "config.json").read_text())
        (tuned / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": epsilon}))
        inputs = {**trees, "weights": committed(store, tuned)}
        return build(evaluate.STAGE, config, inputs, store, Runtime(cache=store.cache), hooks=hooks)

    evaluated(0.1)
    assert ran == ["base/spelling", "base/heldout_loss", "tuned/spelling", "tuned/heldout_loss"]
    ran.clear()
    built = evaluated(0.5)
    assert ran == ["tuned/spelling", "tuned/heldout_loss"]
    scores = compare(store.view(built.artifact.tree))
    assert scores["tasks"]["spelling"]["n"] == 1
    assert scores["heldout_loss"]["tokens"] == 3
    assert scores["heldout_loss"]["base"]["value"] != scores["heldout_loss"]["tuned"]["value"]
    assert built.artifact.facts["items"] == 2
    assert built.artifact.facts["scored_twice"] == built.artifact.facts["agreeing"] == 2


def committed(store: Store, folder: Path) -> Tree:
    copy = store.cache.parent / "copies" / folder.name
    shutil.copytree(folder, copy)
    return store.commit(Action("fetch", {"fetch": 1}, {"n": folder.name}, {}), copy, {}, {}).tree
