"""`regrow chat`: whichever way a model is named, the one that was meant is asked, in the tokens it was trained on."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from flows.chat import Chat, Sampling, load
from flows.cli import app
from flows.models import choose
from stages import generation
from stages.errors import UserError
from tests.flows.finished import NAME, Finished, finish
from tests.flows.rehearsal import Rehearsal

QUESTION = "say abcd"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Finished:
    return finish(tmp_path_factory.mktemp("finished"), tiny_model)


@pytest.fixture(scope="module")
def pair(finished: Finished) -> Chat:
    chosen = choose(NAME, (), finished.store, finished.run.runtime)
    sampling = Sampling(max_new_tokens=64)
    return load(chosen.folder(finished.store), chosen.base_folder(finished.store), "cpu", sampling)


def command(finished: Finished, *arguments: str, piped: str = "") -> str:
    done = CliRunner().invoke(app, ["chat", *arguments, *finished.options], input=piped, catch_exceptions=False)
    assert done.exit_code == 0 and done.stderr == ""
    return done.stdout


def test_a_name_a_recipe_a_run_and_a_folder_mean_the_same_model(finished: Finished) -> None:
    store, runtime = finished.store, finished.run.runtime
    weights = finished.run.artifacts["merge"].tree.digest
    base = {file.path: file.sha256 for file in finished.run.inputs("merge")["model"].files}
    for what in (NAME, finished.run.id, str(finished.recipe)):
        chosen = choose(what, (), store, runtime)
        assert chosen.tuned.digest == weights, what  # type: ignore[union-attr]
        assert {f.path: f.sha256 for f in chosen.base.files} == base, what  # type: ignore[union-attr]
    folder = choose(str(finished.folder / "out"), (), store, runtime)
    told = (folder.folder(store) / "model.safetensors").read_bytes()
    assert told == (choose(NAME, (), store, runtime).folder(store) / "model.safetensors").read_bytes()
    assert folder.base is not None and {f.path: f.sha256 for f in folder.base.files} == base


def test_a_greedy_answer_is_the_one_of_evaluate_whatever_the_folder_says_of_penalties(
    finished: Finished, pair: Chat, tmp_path: Path
) -> None:
    chosen = choose(NAME, (), finished.store, finished.run.runtime)
    folder = shutil.copytree(chosen.folder(finished.store), tmp_path / "penalised")
    settings = folder / "generation_config.json"
    settings.chmod(0o644)
    told = {**json.loads(settings.read_text()), "repetition_penalty": 1.8, "min_new_tokens": 40}
    settings.write_text(json.dumps(told))
    penalised = load(folder, None, "cpu", Sampling(max_new_tokens=64))
    pair.forget()
    assert "".join(penalised.answer("tuned", QUESTION)) == "".join(pair.answer("tuned", QUESTION))
    pair.forget()


def test_a_question_is_asked_in_the_tokens_of_the_training(finished: Finished, pair: Chat) -> None:
    word = json.loads((finished.folder / "echo.jsonl").read_text().splitlines()[0])["answer"]
    tree = finished.run.artifacts["tokenize"].tree
    [table] = [
        finished.store.view(tree) / f.path for f in tree.files if "echo" in f.path and f.path.endswith("tokens.arrow")
    ]
    trained = pa.ipc.open_file(table).read_all()["ids"][0].as_py()
    asked = pair.prompt("tuned", f"say {word}")
    assert trained[: len(asked)] == asked
    assert pair.prompt("base", f"say {word}") == asked


def test_what_streams_is_what_the_model_answers(pair: Chat) -> None:
    for name in ("base", "tuned"):
        pair.forget()
        pieces = list(pair.answer(name, QUESTION))
        model = generation.Model(pair.networks[name], pair.tokenizer)
        [whole] = generation.generate(model, [model.ask(QUESTION)], 64, (), 1, lambda done: None)
        assert "".join(pieces) == whole


def test_an_answer_comes_word_by_word(tiny_model: Path) -> None:
    chat = load(tiny_model, None, "cpu", Sampling(max_new_tokens=30, temperature=5.0))
    spoken = {chat.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in (" ", "a")}
    others = [token for token in range(len(chat.tokenizer)) if token not in spoken]
    chat.networks["tuned"].generation_config.suppress_tokens = others
    pieces = list(chat.answer("tuned", QUESTION))
    assert len(pieces) > 1 and set("".join(pieces)) <= {" ", "a"} and len("".join(pieces)) == 30


def test_the_next_question_follows_the_answer_and_a_stopped_one_is_forgotten(pair: Chat) -> None:
    pair.forget()
    first = "".join(pair.answer("base", QUESTION))
    stopped = pair.answer("base", "say efgh")
    next(stopped)
    stopped.close()
    asked = pair.tokenizer.decode(pair.prompt("base", "again"))
    assert asked.count("<|im_start|>user") == 2 and first in asked and "efgh" not in asked
    pair.forget()
    assert "abcd" not in pair.tokenizer.decode(pair.prompt("base", "again"))


def test_a_conversation_longer_than_the_context_says_so(pair: Chat) -> None:
    pair.forget()
    with pytest.raises(UserError, match=r"the conversation has \d+ tokens, the model reads 256; begin anew: /new"):
        list(pair.answer("tuned", "x" * 300))


def test_an_answer_ends_where_a_turn_of_the_template_ends(pair: Chat) -> None:
    network = pair.networks["tuned"]
    end = pair.tokenizer.convert_tokens_to_ids("<|im_end|>")
    kept = network.generation_config.eos_token_id
    try:
        network.generation_config.eos_token_id = None  # as a base model's, which knows no turns
        pair.tokenizer.eos_token = "<|im_start|>"
        assert end in pair._ends(network)
    finally:
        network.generation_config.eos_token_id = kept
        pair.tokenizer.eos_token = "<|im_end|>"


def test_one_question_on_the_command_line_and_piped(finished: Finished) -> None:
    one = json.loads(command(finished, NAME, "--prompt", QUESTION, "--max-new-tokens", "8", "--beside-base", "--json"))
    assert one["prompt"] == QUESTION and set(one["answers"]) == {"base", "tuned"}
    assert one["answers"]["base"] != one["answers"]["tuned"], "training changed what it says"
    piped = command(finished, NAME, "--max-new-tokens", "8", piped=f"{QUESTION}\n")
    assert piped == one["answers"]["tuned"] + "\n"
    both = command(finished, NAME, "--max-new-tokens", "8", "--beside-base", piped=QUESTION)
    assert both == f"base\n{one['answers']['base']}\ntuned\n{one['answers']['tuned']}\n"


def test_a_conversation_on_a_terminal(finished: Finished) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "chat", NAME, "--max-new-tokens", "4", "--beside-base", *finished.options],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
        start_new_session=True,
    )
    os.close(theirs)
    os.write(ours, f"{QUESTION}\n/quit\n".encode())
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other end is gone
            break
    assert process.wait(timeout=60) == 0, shown.decode(errors="replace")
    text = shown.decode(errors="replace")
    assert f"parrot/production, run {finished.run.id}" in text
    assert "base" in text and "tuned" in text and "┃" in text


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("nobody", "no folder, no recipe file, and nothing that ran in"),
        ("stages", "holds no model (no config.json)"),
    ],
)
def test_what_is_no_model_is_told_with_what_would_be(finished: Finished, what: str, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        choose(what, (), finished.store, finished.run.runtime)


def test_a_folder_from_elsewhere_runs_nothing(finished: Finished, tiny_model: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(tiny_model, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="its weights are pickles"):
        choose(str(pickled), (), finished.store, finished.run.runtime)
    with_code = shutil.copytree(tiny_model, tmp_path / "with_code")
    ran = tmp_path / "ran"
    (with_code / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: ...\n")
    config = json.loads((with_code / "config.json").read_text())
    names = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (with_code / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": names}))
    chosen = choose(str(with_code), (), finished.store, finished.run.runtime)
    with pytest.raises(UserError, match="does not load"):
        load(chosen.folder(finished.store), None, "cpu", Sampling())
    assert not ran.exists()


def test_nothing_trained_yet_names_the_command_that_trains(finished: Finished) -> None:
    told = f"this makes it: regrow run {finished.recipe} +merge --set train.seed=7"
    with pytest.raises(UserError, match=re.escape(told)):
        choose(str(finished.recipe), ["train.seed=7"], finished.store, finished.run.runtime)


def test_a_name_that_was_never_promoted_says_how_to(tmp_path: Path) -> None:
    rehearsal = Rehearsal(tmp_path)
    run = rehearsal.make(rehearsal.start(10))
    run.record("done")
    run.become_baseline()
    with pytest.raises(UserError, match="bot/production names no model yet: `regrow promote bot`"):
        choose("bot", (), rehearsal.store, run.runtime)


def test_an_empty_question_is_refused(finished: Finished) -> None:
    with pytest.raises(UserError, match="nothing was asked"):
        command(finished, NAME)
