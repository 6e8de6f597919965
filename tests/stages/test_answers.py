"""Where an answer begins and ends: after the model's own reasoning, and before the end of its turn."""

import json
import shutil
from pathlib import Path

import pytest

from stages import generation, templates
from stages.turn_end import answer_marks
from tests.stages.chatting import TEMPLATE, chat_model, one_thread, through_lm_eval

__all__ = ["chat_model", "one_thread"]


def test_answers_end_where_a_turn_of_the_template_ends(chat_model: Path, tmp_path: Path) -> None:
    """Also of a model before training, whose own end is another token and whose folder does not know the template's."""
    from transformers import AutoTokenizer

    folder = shutil.copytree(chat_model, tmp_path / "ends_otherwise")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_start|>"
    tokenizer.save_pretrained(folder)
    (a,), end = tokenizer("a")["input_ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")
    settings = {"eos_token_id": 0, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model = generation.load(folder, "fp32", "cpu")
    # It says "a", ends its turn, says "a", and so on.
    model.network.generation_config.sequence_bias = [[[a], 1e3], [[a, end], 2e3]]
    assert model.network.generation_config.eos_token_id == [0, end]
    assert generation.generate(model, [model.ask("q")], 8, [], 1, lambda done: None) == ["a"]
    [theirs] = through_lm_eval(model, ["q"], tmp_path / "h", 8, target="a")
    assert (theirs.answer, theirs.score) == ("a", 1.0)


def test_what_ends_a_turn_is_found_in_a_template_that_asks_for_the_date(chat_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chat_model, tmp_path / "dated")
    (folder / "chat_template.jinja").write_text("Today is {{ strftime_now('%Y') }}.\n" + TEMPLATE)
    assert answer_marks(folder) == answer_marks(chat_model) != ("", None)


def says(model: generation.Model, ids: list[int]) -> None:
    """Make the network write these tokens, whatever it is asked."""
    biases = [[ids[: place + 1], 1e3 * (place + 1)] for place in range(len(ids))]
    model.network.generation_config.sequence_bias = biases


def heard(model: generation.Model, folder: Path, tokens: int, stop: tuple[str, ...] = ()) -> str:
    """What both scorers take for its answer."""
    [ours] = generation.generate(model, [model.ask("q")], tokens, stop, 1, lambda done: None)
    [theirs] = through_lm_eval(model, ["q"], folder, tokens, stop)
    assert theirs.answer == ours
    return ours


CHANNELS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% if m.reasoning_content %}"
    "<|im_start|>thought {{ m.reasoning_content }}{% endif %}<|im_start|>final {% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "said", "expected"),
    [
        ("qwen3", "<think>\n\n</think>\n\nBlue.<|im_end|>", "Blue."),
        ("qwen3", "<think>\nIs it red?\nNo.\n</think>\n\nBlue.\nOr so.<|im_end|>", "Blue."),
        ("qwen3", "Blue.<|im_end|>", "Blue."),
        ("qwen3", "<think>\nRed? Red?", "<think>"),
        ("deepseek_r1", "It is\nso.\n</think>\n\nBlue.<|im_end|>", "Blue."),
        (CHANNELS, "<|im_start|>final Blue.<|im_end|>", "Blue."),
        (CHANNELS, "<|im_start|>thought Red?\n<|im_start|>final Blue.<|im_end|>", "Blue."),
        (TEMPLATE, "</think>Blue.<|im_end|>", "</think>Blue."),
    ],
)
def test_an_answer_is_what_follows_the_models_own_reasoning(
    chat_model: Path, tmp_path: Path, template: str, said: str, expected: str
) -> None:
    """Which some templates open and close before a plain answer too. One that never closes it has said that."""
    folder = shutil.copytree(chat_model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(templates.find(template).text if "{" not in template else template)
    model = generation.load(folder, "fp32", "cpu")
    ids = model.tokenizer(said, add_special_tokens=False)["input_ids"]
    says(model, ids)
    assert heard(model, tmp_path / "h", len(ids), ("\n",)) == expected


def test_an_end_that_is_no_special_token_is_no_part_of_an_answer(chat_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chat_model, tmp_path / "model")
    settings = json.loads((folder / "tokenizer.json").read_text())
    for token in settings["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    named = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, "eos_token": "!", "pad_token": "!"}))
    model = generation.load(folder, "fp32", "cpu")
    assert model.tokenizer.decode([1], skip_special_tokens=True) == "<|im_end|>"
    says(model, model.tokenizer("cd<|im_end|>", add_special_tokens=False)["input_ids"])
    assert heard(model, tmp_path / "h", 8) == "cd"


def test_a_control_token_may_stop_an_answer_of_a_model_without_an_end(chat_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chat_model, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, "eos_token_id": None}))
    named = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, "eos_token": None}))
    model = generation.load(folder, "fp32", "cpu")
    assert model.ends(()) == []
    says(model, model.tokenizer("ab<|im_start|>cd", add_special_tokens=False)["input_ids"])
    assert generation.generate(model, ["q"], 6, ["<|im_start|>"], 1, lambda done: None) == ["ab"]


def test_each_text_gets_the_begin_token_that_it_lacks(chat_model: Path, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    folder = shutil.copytree(chat_model, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    begins = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)])
    tokenizer.backend_tokenizer.post_processor = begins
    tokenizer.save_pretrained(folder)
    model = generation.load(folder, "fp32", "cpu")
    questions = ["<|im_start|>ab", "ab"]
    for asked in (questions, questions[::-1]):
        first, second = generation.generate(model, asked, 6, (), 2, lambda done: None)
        theirs = through_lm_eval(model, asked, tmp_path / "h", 6)
        assert first == second == theirs[0].answer == theirs[1].answer
