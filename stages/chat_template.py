"""A chat template, compiled, with what a few small renders tell about it: how it opens and ends turns.

The sandbox it runs in is set up like the one of Hugging Face's transformers, so that the text is the same.
"""

import datetime
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

import jinja2

from stages import sandbox, templates
from stages.chunks import CONTENT, REASONING, Calls, render_chunks
from stages.errors import UserError
from stages.formats import BadRow, Conversation, Turn
from stages.templates import Named
from stages.tokenizer_files import Tokenizer


@dataclass(frozen=True)
class Template:
    """A compiled template with what was learned about it."""

    source: str
    """Jinja text."""
    compiled: jinja2.Template
    variables: dict[str, str]
    """Named tokens (`bos_token`, ...) that the template may use."""
    control: tuple[str, ...] = ()
    """Token texts that only the template may write: the special tokens, and added ones that stand in its source."""
    openings: Mapping[str, str] = field(default_factory=dict)
    """By the role that spoke last: what stands after its words when the assistant is asked to go on."""
    prompt: str = ""
    """What `add_generation_prompt` adds, which the model never has to write; empty where the template adds nothing."""
    header: str = ""
    """The beginning of `prompt`, up to its first control token."""
    endings: tuple[str, ...] = ()
    """Texts that end a turn."""
    answer_end: str = ""
    """The control token that ends a plain answer of the assistant's, the last one of several; empty where none does."""
    end_in_words: str = ""
    """What ends it where that is no control token, so that nothing stops there."""
    thought_end: str = ""
    """What stands between the assistant's reasoning and its answer, such as `</think>`; empty where it knows none."""
    calls: Calls | None = None
    """How it takes tool calls; None where it knows none."""


_QUESTION = Turn("user", "?")
_ANSWER = Turn("assistant", "!")
_CALL = Turn(
    "assistant",
    None,
    tool_calls=[{"id": "000000000", "type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}],
)
_THOUGHT = Turn("assistant", "!", reasoning="~")
_RESULT = Turn("tool", "=", name="f", tool_call_id="000000000")


def load(tokenizer: Tokenizer, choice: str, today: datetime.date | None = None) -> Template:
    """Compile the template `choice`: `tokenizer`, a named one, or Jinja text.

    `today` is what the template gets when it asks for the date. Raises UserError when there is no such template, or
    when it cannot be compiled or does not write a plain question and answer.
    """
    named = templates.find(choice) if choice in templates.names() else None
    if choice == "tokenizer":
        if tokenizer.template is None:
            raise UserError(
                "the model's tokenizer has no chat template: name one, e.g. "
                f"`convert.template: {_fitting(tokenizer)}`, or choose `convert.format: completion`"
            )
        source = tokenizer.template
    elif named:
        source = named.text
        if lacking := _lacking(tokenizer, named):
            plain = ", or set `convert.template: plain`" if _fitting(tokenizer) == "plain" else ""
            raise UserError(
                f"the model's tokenizer lacks tokens of the chat template {choice}, which it would take apart: "
                f"add them with `fetch.model.new_tokens: {json.dumps(lacking, ensure_ascii=False)}`{plain}"
            )
    else:
        source = choice
    try:
        compiled = sandbox.environment(today).from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template does not compile: line {error.lineno}: {error.message}") from error
    except RecursionError as error:
        raise UserError("the chat template does not compile: it is nested too deeply") from error
    bare = Template(source, compiled, tokenizer.variables)
    try:
        _, after_question = _around(bare, [_QUESTION])
        before_answer, after_answer = _around(bare, [_QUESTION, _ANSWER])
        _, prompted = _around(bare, [_QUESTION], add_generation_prompt=True)
    except BadRow as error:
        hint = ". It asks for the date: set `convert.date`" if "strftime_now" in str(error) else ""
        raise UserError(f"the chat template fails on a plain question and answer: {error}{hint}") from error
    own = named.tokens if named else ()  # it may put them together from parts
    written = {text for text in tokenizer.added if (text in source and not text.isspace()) or text in own}
    variable = {token for name, token in tokenizer.variables.items() if name in source and token in tokenizer.added}
    control = tuple(sorted({*tokenizer.special, *written, *variable}))
    answered = _answer_ending(bare, after_answer, control)
    answer_end = max((token for token in control if answered.endswith(token)), key=len, default="")
    endings = {_ending(after_question, control), answered, answer_end} - {""}
    calls, after_call = _calls(bare)
    if not any(ending in after_call for ending in endings):
        endings |= {token for token in control if after_call.rstrip().endswith(token)}
    prompt = prompted.removeprefix(after_question) if prompted.startswith(after_question) else ""
    return Template(
        source,
        compiled,
        tokenizer.variables,
        control,
        openings=_openings(replace(bare, calls=calls)),
        prompt=prompt,
        header=_ending(prompt, control) or prompt,
        endings=tuple(sorted(endings)),
        answer_end=answer_end,
        end_in_words="" if answer_end else answered,
        thought_end=_thought_end(bare, before_answer.removeprefix(prompted)),
        calls=calls,
    )


def _lacking(tokenizer: Tokenizer, named: Named) -> list[str]:
    """The control tokens of a named template that the tokenizer does not have."""
    return [token for token in named.tokens if token not in tokenizer.added]


def _fitting(tokenizer: Tokenizer) -> str:
    """The template for a base model: ChatML, or plain words where that would need new tokens and these do not."""
    ends = tokenizer.variables.get("eos_token") in tokenizer.added
    return "plain" if ends and _lacking(tokenizer, templates.find("chatml")) else "chatml"


def _openings(bare: Template) -> dict[str, str]:
    """What stands after the words of each role, for those that the template lets speak before the assistant."""
    before = {
        "user": [_QUESTION],
        "system": [Turn("system", "~")],
        "assistant": [_QUESTION, _ANSWER],
        "tool": [_QUESTION, _CALL, _RESULT],
    }
    openings = {}
    for role, turns in before.items():
        with suppress(BadRow):
            openings[role] = _around(bare, turns, add_generation_prompt=True)[1]
    return openings


def _around(template: Template, turns: list[Turn], **more: bool) -> tuple[str, str]:
    """What the template writes before and after the last turn's leaves. Raises BadRow when it leaves that turn out."""
    chunks = render_chunks(template.compiled, template.variables, template.calls, Conversation(turns), **more)
    last = [number for number, (_, leaf, _) in enumerate(chunks) if leaf and leaf.turn == len(turns) - 1]
    if not last:
        raise BadRow("left out by the chat template", f"it leaves out what the {turns[-1].role} says")
    before, after = chunks[: last[0]], chunks[last[-1] + 1 :]
    return before[-1][0] if before else "", after[-1][0] if after else ""


def _ending(after: str, control: tuple[str, ...]) -> str:
    """The text that ends a turn, from what stands after the last one: up to its first control token, if any."""
    ends = [after.index(token) + len(token) for token in control if token in after]
    return after[: min(ends)] if ends else after.rstrip()


def _answer_ending(bare: Template, after: str, control: tuple[str, ...]) -> str:
    """The text that ends an answer: up to the last of the control tokens which stand there side by side, and which it
    also ends in (`after` is the text after the last answer) where another question follows."""
    end, before_question = len(_ending(after, control)), after
    with suppress(BadRow):
        before_question, _ = _around(bare, [_QUESTION, _ANSWER, _QUESTION])
    stops = [stop for stop in side_by_side(after, end, control) if before_question.startswith(after[:stop])]
    return after[: max([end, *stops])]


def side_by_side(text: str, at: int, control: tuple[str, ...]) -> list[int]:
    """Where each of the control tokens ends that follow one another from `at` on, with nothing between them."""
    stops = []
    while token := max((token for token in control if text.startswith(token, at)), key=len, default=""):
        stops.append(at := at + len(token))
    return stops


def _thought_end(bare: Template, opening: str) -> str:
    """What closes the assistant's reasoning: what the template writes between that and an answer, or only the part of
    it that a plain answer opens with too (`opening`, beyond what the assistant is given). A template may also take
    reasoning out of answers without ever writing any."""
    between = ""
    with suppress(BadRow, UserError):
        chunks = render_chunks(bare.compiled, bare.variables, None, Conversation([_QUESTION, _THOUGHT]))
        kinds = [leaf.kind if leaf and leaf.turn == 1 else "" for _, leaf, _ in chunks]
        if REASONING in kinds and CONTENT in kinds:
            between = "".join(text for text, _, _ in chunks[kinds.index(REASONING) + 1 : kinds.index(CONTENT)])
    shared = next((between[at:] for at in range(len(between)) if opening.endswith(between[at:])), "")
    known = (mark for mark in ("</think>", "[/THINK]") if mark in bare.source)
    return shared.strip() or between.strip() or next(known, "")


def _calls(bare: Template) -> tuple[Calls | None, str]:
    """How the template takes tool calls, and what it writes after one."""
    silences: list[Mapping[str, str | None]] = [{}, {"content": None}, {"content": ""}]
    for calls in (Calls(silence, as_text) for as_text in (False, True) for silence in silences):
        try:
            _, after = _around(replace(bare, calls=calls), [_QUESTION, _CALL])
            return calls, after
        except BadRow:
            continue
    return None, ""
