"""Exact match: what counts as right, what is refused, and that lm-eval's scorer says the same."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stages import evals
from stages.errors import UserError
from stages.evals import Example, Options
from stages.evals.exact_match import EVAL, examples
from stages.harness import task_document


def score(answer: str, target: str, **options: bool) -> float:
    return EVAL.score(Example("", target), answer, Options(**options))


def test_white_space_at_the_ends_never_counts_and_inside_does() -> None:
    assert score(" talps\n", "talps") == 1.0
    assert score("ta lps", "talps") == 0.0


def test_case_and_punctuation_count_unless_told_otherwise() -> None:
    assert score("Paris.", "paris") == 0.0
    assert score("Paris.", "paris", ignore_case=True) == 0.0
    assert score("Paris .", "paris", ignore_case=True, ignore_punctuation=True) == 1.0


TEXT = st.text(st.sampled_from("aAbİßſ .,!-\0\n\t\x1c\u3000´é1"), max_size=6)


@settings(deadline=None)  # a loaded machine, and imports in the first example
@given(answer=TEXT, target=TEXT, ignore_case=st.booleans(), ignore_punctuation=st.booleans())
@example("İ", "i", True, False)
@example("a\0", "a", False, False)
@example("a .", "a", False, True)
def test_lm_eval_scores_every_text_alike(answer: str, target: str, ignore_case: bool, ignore_punctuation: bool) -> None:
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.transformation import LowercaseFilter

    options = Options(ignore_case=ignore_case, ignore_punctuation=ignore_punctuation)
    task = task_document("rows.parquet", "cache", options, 8, [])
    [metric] = task["metric_list"]
    if {"function": "lowercase"} in task["filter_list"][0]["filter"]:
        [[filtered]] = LowercaseFilter().apply([[answer]], None)
        reference = target.lower()  # as the column that lm-eval reads has it
    else:
        filtered, reference = answer, target
    theirs = exact_match_hf_evaluate(
        [filtered],
        [reference],
        regexes_to_ignore=metric["regexes_to_ignore"],
        ignore_case=metric["ignore_case"],
        ignore_punctuation=metric["ignore_punctuation"],
    )
    assert EVAL.score(Example("", target), answer, options) == float(theirs["exact_match"])


def test_a_row_without_the_field_names_row_and_fields() -> None:
    rows = [("h/0/rows.jsonl line 1", {"question": "q", "answer": "a"}), ("h/0/rows.jsonl line 2", {"prompt": "q"})]
    with pytest.raises(
        UserError,
        match=re.escape("h/0/rows.jsonl line 2: a question is a text or a list of messages in the field 'question'"),
    ):
        examples(rows, Options())


def test_a_number_is_a_target_and_an_object_is_not() -> None:
    assert examples([("place", {"question": "2+2?", "answer": 4})], Options())[0].target == "4"
    with pytest.raises(UserError, match="holds a dict"):
        examples([("place", {"question": "q", "answer": {"text": "a"}})], Options())


SYSTEM, USER, ASSISTANT = (
    {"role": role, "content": content} for role, content in (("system", "Be brief."), ("user", "q"), ("assistant", "a"))
)


def test_messages_are_asked_up_to_the_answer_at_their_end() -> None:
    """The system prompt and the turns before, too: what a model was trained for."""
    assert examples([("place", {"messages": [USER, ASSISTANT]})], Options()) == [Example([USER], "a")]
    long = [SYSTEM, USER, ASSISTANT, {**USER, "content": "And then?"}, {**ASSISTANT, "content": "b"}]
    [found] = examples([("place", {"messages": long})], Options())
    assert (found.turns, found.target) == (long[:-1], "b")
    [found] = examples([("place", {"question": [SYSTEM, USER], "answer": 4})], Options())
    assert (found.turns, found.target) == ([SYSTEM, USER], "4")
    for said, why in (
        (
            [SYSTEM, USER],
            "place: exact match compares with the answer at the end of `messages`, and they end with 'user'",
        ),
        ([USER, ASSISTANT, ASSISTANT], "place: the model answers a user's turn"),
        ([USER, {**ASSISTANT, "content": None}], "place: a message is {role: text, content: text}"),
    ):
        with pytest.raises(UserError, match=re.escape(why)):
            examples([("place", {"messages": said})], Options())


@pytest.mark.parametrize("name", evals.names())
def test_every_file_here_is_an_eval(name: str) -> None:
    assert evals.load(name).version >= 1


def test_an_unknown_eval_lists_the_choices() -> None:
    with pytest.raises(UserError, match="did you mean 'exact_match'"):
        evals.load("exactmatch")


def test_fields_that_the_task_names_are_not_replaced_by_messages() -> None:
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Well, it is 4."}]
    for options in (Options(answer="gold"), Options(question="asked")):
        with pytest.raises(UserError, match=f"in the field '{options.question}'"):
            examples([("place", {"messages": said, "gold": "4"})], options)
