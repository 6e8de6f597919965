"""Environments as TRL's trainers act on them: with a time limit on every call, and prompts as messages.

TRL renders a prompt with the environment's tools, reads calls out of what the model writes, and goes on with their
answers. What a tool raises, also for an answer that comes too late, is told to the model.
"""

import functools
import inspect
import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import get_json_schema
from trl import chat_template_utils

from stages import own_code
from stages.environments import EnvironmentChoice, load
from stages.errors import UserError

Message = dict[str, Any]


class Episodes:
    """The environment of a recipe, for a tokenizer whose chat template the prompts went through.

    `kind` is the class that TRL takes; `weights` has the weight of its reward, if it has one. Raises UserError for an
    environment, or a chat template, that cannot work.
    """

    def __init__(self, choice: EnvironmentChoice, tokenizer: Any) -> None:
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # it warns of environments, whose interface may still change
        self.tokenizer = tokenizer
        self.kind = _limited(choice, tuple(tokenizer.added_tokens_encoder))
        self.weights = [choice.weight] if self.kind._rewarded else []
        _set_response_template(tokenizer)
        _refuse_rewriting(tokenizer)

    def reward(self, place: "_Limited") -> float:
        """What the episode was worth that an environment is in."""
        return float(place._call(place._inner.get_reward))

    def texts(
        self, prompts: Sequence[Any], completions: Sequence[Sequence[Message]], ids: Sequence[Sequence[int]]
    ) -> tuple[list[str], list[str], list[str]]:
        """Of a batch of episodes: the prompts as they were rendered, all that followed, and what the model said last,
        which is what rewards are given."""
        tools = [member for name, member in vars(self.kind).items() if inspect.isfunction(member)]
        rendered = [
            self.tokenizer.apply_chat_template(prompt, tools=tools, tokenize=False, add_generation_prompt=True)
            for prompt in prompts
        ]
        said = [[m.get("content") or "" for m in episode if m["role"] == "assistant"] for episode in completions]
        return rendered, self.tokenizer.batch_decode(ids), [texts[-1] if texts else "" for texts in said]


def _limited(choice: EnvironmentChoice, controls: Sequence[str]) -> type["_Limited"]:
    """The class of a recipe's environment as TRL takes it. Raises UserError when it is none."""
    kind = load(choice)
    public = {name: member for name, member in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}
    if "reset" not in public:
        raise UserError("environment: its class has no method `reset`, which begins an episode: define one")
    tools = {name: method for name, method in public.items() if name not in ("reset", "get_reward")}
    if not tools:
        raise UserError("environment: its class has no tool: define a public method besides reset and get_reward")
    for name, method in public.items():
        if inspect.iscoroutinefunction(method):
            raise UserError(f"environment: its method {name} is async: make it an ordinary function")
    for name, method in tools.items():
        try:
            get_json_schema(method)
        except Exception as error:  # its several own
            raise UserError(f"environment: its tool {name} cannot be described to the model: {error}") from error
    given = {"_kind": kind, "_seconds": choice.seconds, "_controls": controls, "_rewarded": "get_reward" in public}
    return type(kind.__name__, (_Limited,), {**given, **{name: _tool(name, method) for name, method in tools.items()}})


class _Limited:
    """An environment whose calls end after `_seconds`, which is told its prompt and row, and whose reward the
    recorder asks, beside the others, instead of TRL."""

    _kind: type
    _seconds: float
    _controls: Sequence[str]
    _rewarded: bool

    def __init__(self) -> None:
        self._inner: Any = None
        self._stuck = False

    def reset(self, prompt: Any, columns: str, **_: Any) -> str | None:
        """Begin an episode; what hung in the last one is left behind. Raises UserError when the environment fails."""
        if self._stuck:
            self._inner, self._stuck = None, False
        row = json.loads(columns)
        try:
            if self._inner is None:
                self._inner = self._call(self._kind)
            told = self._call(self._inner.reset, prompt=prompt, **row)
            added = None if told is None else _text(told)
            if added and (control := self._control_in(added)):
                raise ValueError(f"its text holds the control token {control}, which would be taken for one")
        except Exception as error:  # whatever a user's code raises
            shown = json.dumps(row, ensure_ascii=False)[:200]
            raise UserError(
                f"environment: reset fails: {own_code.told(error, 'environment')}, for the row {shown}"
            ) from error
        return added

    def _control_in(self, text: str) -> str | None:
        """A control token that stands in a text."""
        return next((token for token in self._controls if token in text), None)

    def _call(self, function: Callable[..., Any], /, **given: Any) -> Any:
        """Its result within the time limit. Raises what it raises, or TimeoutError."""
        if self._stuck:
            raise TimeoutError("an earlier call has not come back")
        done: list[Any] = []
        failed: list[Exception] = []

        def run() -> None:
            try:
                done.append(function(**given))
            except Exception as error:  # raised again below, by whoever asked
                failed.append(error)

        thread = threading.Thread(target=run, daemon=True)  # which nothing can stop, and which must not keep us alive
        thread.start()
        thread.join(self._seconds)
        if failed:
            raise failed[0]
        if not done:
            self._stuck = True
            raise TimeoutError(f"no answer within {self._seconds:g} s")
        return done[0]


def _tool(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """A tool with the name, signature and docstring of the environment's own, whose answer is text. Neither that nor
    what it raises, which TRL tells the model too, holds a control token."""

    @functools.wraps(method)
    def call(self: _Limited, /, **given: Any) -> str:
        failure: Exception | None = None
        try:
            told = _text(self._call(getattr(self._inner, name), **given))
        except Exception as error:  # whatever a user's code raises
            told, failure = str(error), error
        if self._control_in(told):  # not named: this is told to the model as well
            raise ValueError("the answer holds a control token, which would be taken for one") from failure
        if failure:
            raise failure
        return told

    return call


def _text(told: Any) -> str:
    """What an environment says, as the model reads it: JSON where it is no text."""
    return told if isinstance(told, str) else json.dumps(told, ensure_ascii=False, default=str)


def template_in(folder: Path) -> str:
    """The one chat template that convert wrote. Raises UserError when there is none, or more."""
    texts = {path.read_text("utf-8") for path in folder.rglob("chat_template.jinja")}
    if len(texts) != 1:
        raise UserError(f"an environment needs prompts of one chat template, and convert used {len(texts) or 'none'}")
    return texts.pop()


def _set_response_template(tokenizer: Any) -> None:
    """Give the tokenizer a way to read calls out of answers. Raises UserError for a template that has none."""
    if not chat_template_utils.supports_tool_calling(tokenizer):
        raise UserError(
            "the chat template does not write tool calls and their answers, which an environment lives by: "
            "take one that does, e.g. `convert.template: qwen`"
        )
    try:
        chat_template_utils.add_response_schema(tokenizer)
    except ValueError:  # not one of those that TRL knows by heart
        tokenizer.response_template = _tagged(tokenizer)


def _refuse_rewriting(tokenizer: Any) -> None:
    """Raise UserError for a template that writes a turn otherwise once another follows, if TRL has no other for it."""
    if chat_template_utils.is_chat_template_prefix_preserving(tokenizer):
        return
    try:
        chat_template_utils.get_training_chat_template(tokenizer)
    except ValueError as error:
        raise UserError(
            "the chat template writes a turn otherwise once an answer follows it, and an episode goes on from what was "
            "written: take one that does not, e.g. `convert.template: qwen`. Of a Qwen 3 model its own may stay "
            "(`convert.template: tokenizer`): TRL has another one for it"
        ) from error


def _tagged(tokenizer: Any) -> dict[str, Any]:
    """How to read calls that stand as JSON between `<tool_call>` and `</tool_call>`, in transformers' terms."""
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
    asked = [{"role": "user", "content": "?"}]
    answered = [*asked, {"role": "assistant", "content": "", "tool_calls": [call]}]
    opened, before = (
        tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=b) for b in (True, False)
    )
    written = tokenizer.apply_chat_template(answered, tokenize=False).removeprefix(opened)
    begin, end = "<tool_call>", "</tool_call>"
    try:
        said = json.loads(written[written.index(begin) + len(begin) : written.index(end)])
    except ValueError:
        said = None
    if said != call["function"]:
        raise UserError(
            f"nobody knows how to read this chat template's tool calls, which it writes as {written!r}: take one that "
            "writes them as JSON between <tool_call> and </tool_call>, e.g. `convert.template: qwen`"
        )
    stop = written[written.index(end) + len(end) :].strip()
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": opened.removeprefix(before),
        "fields": {
            "reasoning_content": {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"},
            "tool_calls": {
                "open": begin,
                "close_pattern": rf"{end}\s*",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close_pattern": rf"{re.escape(stop)}\s*", "content": "text"},
        },
    }
