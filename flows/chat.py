"""`regrow chat`: a conversation with a model, and with the one before training beside it.

What is asked goes through the chat template in the tuned model's folder, which merge took from the training, and ends
where a turn of that template ends. Both models get the same tokens. A model without a template goes on with the text as
it stands, one text at a time.
"""

import json
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from stages.errors import UserError
from stages.generation import Device

Turns = list[dict[str, str]]


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn."""

    max_new_tokens: int = 512
    """Tokens an answer may have at most."""
    temperature: float = 0.0
    """0 takes the most likely token every time, as `evaluate` does."""
    seed: int = 0
    """Of the draws, where the temperature is above 0."""


@dataclass
class Chat:
    """One or two models with one tokenizer, and what each has said so far."""

    tokenizer: Any
    networks: Mapping[str, Any]
    """`base` and `tuned`, or `tuned` alone: each has a conversation of its own, as their answers differ."""
    sampling: Sampling
    system: str = ""
    said: dict[str, Turns] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.forget()

    @property
    def chats(self) -> bool:
        """Whether there is a chat template to ask through."""
        return bool(self.tokenizer.chat_template)

    def forget(self) -> None:
        """Begin anew."""
        opening = [{"role": "system", "content": self.system}] if self.system else []
        self.said = {name: list(opening) for name in self.networks}

    def prompt(self, name: str, question: str) -> list[int]:
        """The tokens that a model is asked with. Raises UserError when they leave no room for an answer."""
        ids = self._tokens([*self.said[name], {"role": "user", "content": question}], question)
        context = getattr(self.networks[name].config, "max_position_embeddings", None)
        if context is not None and len(ids) >= context:
            raise UserError(f"the conversation has {len(ids):,} tokens, the model reads {context:,}; begin anew: /new")
        return ids

    def answer(self, name: str, question: str) -> Iterator[str]:
        """A model's answer, piece by piece as it is made. The conversation goes on with a whole one; closing the
        iterator stops the model, and nothing was said."""
        ids, pieces = self.prompt(name, question), []
        for piece in self._stream(self.networks[name], ids):
            pieces.append(piece)
            yield piece
        if self.chats:
            self.said[name] += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": "".join(pieces)},
            ]

    def _tokens(self, turns: Turns, question: str) -> list[int]:
        if not self.chats:
            return list(self.tokenizer(question)["input_ids"])
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise UserError(f"the model's chat template refuses this conversation: {error}") from error
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _stream(self, network: Any, ids: list[int]) -> Iterator[str]:
        import torch
        from transformers import StoppingCriteria, TextIteratorStreamer

        stop = threading.Event()

        class Stopped(StoppingCriteria):  # type: ignore[misc]
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                return torch.full((len(input_ids),), stop.is_set(), device=input_ids.device)

        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failed: list[BaseException] = []
        asked = torch.tensor([ids], device=network.device)
        context = getattr(network.config, "max_position_embeddings", None) or len(ids) + self.sampling.max_new_tokens
        drawn = self.sampling.temperature > 0

        def make() -> None:
            try:
                torch.manual_seed(self.sampling.seed)
                with torch.inference_mode():
                    network.generate(
                        input_ids=asked,
                        attention_mask=torch.ones_like(asked),
                        max_new_tokens=min(self.sampling.max_new_tokens, context - len(ids)),
                        do_sample=drawn,
                        temperature=self.sampling.temperature if drawn else None,
                        eos_token_id=self._ends(network),
                        pad_token_id=self.tokenizer.pad_token_id,
                        stopping_criteria=[Stopped()],
                        streamer=streamer,
                    )
            except BaseException as error:
                failed.append(error)
                streamer.end()  # or whoever reads would wait for ever

        maker = threading.Thread(target=make, daemon=True)
        maker.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            stop.set()
            maker.join()
        if failed:
            raise failed[0]

    def _ends(self, network: Any) -> list[int]:
        """Tokens that end an answer: the model's own, and what ends a turn in its template."""
        from stages.turn_end import turn_end, with_end

        own = with_end(network.generation_config.eos_token_id, turn_end(Path(self.tokenizer.name_or_path)))
        return with_end(own, self.tokenizer.eos_token_id)


def load(tuned: Path, base: Path | None, device: Device, sampling: Sampling, system: str = "") -> Chat:
    """The models of two folders, ready to be asked. Raises UserError when one does not load, and for a `system` prompt
    where there is no chat template."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from stages import generation
    from stages.generation_settings import keep_tokens

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(tuned, **generation.FROM_FOLDER)
    except (OSError, ValueError) as error:
        raise UserError(f"{tuned}: the model's tokenizer does not load: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    folders = {**({"base": base} if base else {}), "tuned": tuned}
    networks = {name: generation.load_network(folder, "bf16", device, False) for name, folder in folders.items()}
    if not sampling.temperature:  # the likeliest tokens, as in evaluate, whatever penalties a folder names
        for network in networks.values():
            keep_tokens(network)
    chat = Chat(tokenizer, networks, sampling, system)
    if system and not chat.chats:
        raise UserError("--system: this model has no chat template, it goes on with a text as it stands")
    return chat


def ask_once(chat: Chat, question: str, console: Console, as_json: bool) -> None:
    """Ask one question and show the answers."""
    if as_json:
        answers = {name: "".join(chat.answer(name, question)) for name in chat.networks}
        console.print_json(json.dumps({"prompt": question, "answers": answers}))
    else:
        _show(chat, question, console)


def converse(chat: Chat, title: str, console: Console) -> None:
    """Talk until the person leaves."""
    console.print(f"[dim]{escape(title)}[/]", soft_wrap=True)
    console.print("[dim]/new begins anew, /quit or Ctrl-D leaves, Ctrl-C stops an answer[/]")
    if not chat.chats:
        console.print("[yellow]this model has no chat template: it goes on with a text as it stands[/]")
    while True:
        try:
            question = console.input("[bold]> [/]").strip()
        except EOFError:
            console.print()
            return
        match question:
            case "":
                continue
            case "/quit" | "/exit":
                return
            case "/new":
                chat.forget()
                continue
        try:
            _show(chat, question, console)
        except UserError as error:
            console.print(f"[red]{escape(str(error))}[/]")
        except KeyboardInterrupt:
            console.print("\n[dim]stopped; that question is forgotten[/]")


def _show(chat: Chat, question: str, console: Console) -> None:
    """The answers as they come: of one model as plain text, of two in columns, or one after the other in a pipe."""
    if len(chat.networks) == 1:
        for piece in chat.answer("tuned", question):
            _write(console, piece)
        console.print()
    elif console.is_terminal:
        answers = dict.fromkeys(chat.networks, "")
        with Live(_columns(answers), console=console, vertical_overflow="visible", refresh_per_second=8) as live:
            for name in chat.networks:
                for piece in chat.answer(name, question):
                    answers[name] += piece
                    live.update(_columns(answers))
    else:
        for name in chat.networks:
            console.print(f"[bold]{name}[/]")
            for piece in chat.answer(name, question):
                _write(console, piece)
            console.print()


def _columns(answers: Mapping[str, str]) -> Table:
    table = Table(expand=True, show_lines=False)
    for name in answers:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(escape(text) for text in answers.values()))
    return table


def _write(console: Console, piece: str) -> None:
    """A piece as it is: rich would wrap it and read brackets as markup."""
    console.file.write(piece)
    console.file.flush()


def piped() -> str | None:
    """What was piped in, if anything was."""
    return None if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().strip()
