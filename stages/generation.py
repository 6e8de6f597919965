"""A language model for evaluating: loading it, and greedy answers in batches through plain transformers."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stages import arithmetic, formats
from stages.errors import UserError
from stages.formats import BadRow, Conversation
from stages.generation_settings import keep_tokens
from stages.turn_end import after_thought, answer_marks, with_end

if TYPE_CHECKING:
    from jinja2 import Template

Precision = Literal["bf16", "fp32"]
Device = Literal["auto", "cpu", "cuda"]
Turn = dict[str, str]
"""`role` and `content`."""

FROM_FOLDER: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""For transformers: nothing is looked up on a network, and no code that lies beside a model is run or asked about."""


@dataclass(frozen=True)
class Model:
    """Weights and tokenizer, on their device, in evaluation mode."""

    network: Any
    """A transformers causal language model."""
    tokenizer: Any
    thought_end: str = ""
    """What closes the reasoning that it writes before an answer; empty where its chat template knows none."""
    today: date | None = None
    """What its chat template gets when it asks for the date, never the clock: scores would depend on the day."""

    @property
    def chats(self) -> bool:
        """Whether there is a chat template to ask through."""
        return bool(self.tokenizer.chat_template)

    def ask(self, question: str | Sequence[Turn]) -> str:
        """A user's question, or a conversation, as the model is to go on with it: through its chat template when it has
        one, else the question as it stands. Raises UserError for a conversation that its chat template does not take,
        and for one of several turns where there is none."""
        turns = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        if not self.chats and len(turns) == 1:
            return turns[0]["content"]
        if not self.chats:
            roles = ", ".join(turn["role"] for turn in turns)
            raise UserError(
                f"the model has no chat template, so it can be asked a question, and no conversation of {roles}: take "
                "a `fetch.model` with a template, or ask a field of single questions (`question:`), without `system:`"
            )
        return self.render(turns)

    def render(self, turns: Sequence[Turn], begun: bool = False) -> str:
        """The text of turns by the chat template, as in training, up to where the assistant speaks, or where its last
        turn, which is `begun`, goes on. Raises UserError where the template does not take them."""
        from stages.chunks import render_chunks

        conversation = Conversation([formats.Turn(turn["role"], turn["content"]) for turn in turns])
        named, compiled = self.tokenizer.special_tokens_map, _compiled(self.tokenizer.get_chat_template(), self.today)
        try:
            chunks = render_chunks(compiled, named, None, conversation, add_generation_prompt=not begun)
        except BadRow as error:
            roles = ", ".join(turn["role"] for turn in turns)
            hint = ". It asks for the date: set `evaluate.date`" if "strftime_now" in str(error) else ""
            raise UserError(f"the model does not take the turns {roles}: {error}{hint}") from error
        while begun and (chunks[-1][1] is None or chunks[-1][1].turn < len(turns) - 1):
            chunks.pop()  # what ends the turn
        return "".join(text for text, _, _ in chunks)

    def encode(self, prompt: str) -> list[int]:
        """A prompt as training has it: what a chat template wrote is all there is; a plain text gets the begin token
        that the tokenizer puts before one, if it does."""
        begins = self.chats or prompt.startswith(self.tokenizer.bos_token or "\0")
        return list(self.tokenizer(prompt, add_special_tokens=not begins)["input_ids"])

    def ends(self, stop: Sequence[str]) -> list[int]:
        """The tokens that end an answer: its own, and those of `stop` that are one token, which no text holds."""
        added = self.tokenizer.added_tokens_encoder
        own = with_end(self.network.generation_config.eos_token_id, None)
        return list(dict.fromkeys([*own, *(added[term] for term in stop if term in added)]))

    def answer(self, ids: Sequence[int], ends: Sequence[int]) -> str:
        """The text of an answer's tokens: up to the first of `ends`, and after the model's own reasoning."""
        return after_thought(self.tokenizer, list(takewhile(lambda token: token not in ends, ids)), self.thought_end)


@cache
def _compiled(template: str, today: date | None) -> "Template":
    from stages import sandbox

    return sandbox.environment(today).from_string(template)


def load(folder: Path, precision: Precision, device: Device, packed: bool = False) -> Model:
    """The model of a local Hugging Face folder. The last one is kept, as a model's tasks follow one another.

    A `packed` model takes the batches of `packing.collate` and cannot generate. Nothing is looked up on a network.
    Raises UserError when the folder holds no loadable model.
    """
    wanted = (folder, precision, device, packed)
    if wanted not in _kept:
        # Let go first: two large models at once may not fit.
        _kept.clear()
        gc.collect()
        _kept[wanted] = _load(*wanted)
    return _kept[wanted]


_kept: dict[tuple[Path, Precision, Device, bool], Model] = {}


def _load(folder: Path, precision: Precision, device: Device, packed: bool) -> Model:
    from transformers import AutoTokenizer

    network = load_network(folder, precision, device, packed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **FROM_FOLDER)
    except (OSError, ValueError) as error:
        raise UserError(f"the model's tokenizer does not load: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    thought, end = answer_marks(folder)
    if network.can_generate():
        # How long an answer may be is for the task to say. It ends by the same rule before training, whose folder may
        # not say so.
        keep_tokens(network, end, tokenizer.eos_token_id)
    return Model(network, tokenizer, thought)


def load_network(
    folder: Path, precision: Precision, device: Device, packed: bool, quantize: Literal["nf4", "int8"] | None = None
) -> Any:
    """A model's weights alone, on their device, in evaluation mode; see `load`. A folder that holds a classifier gives
    that (`stages.heads`). `quantize` holds them in 4 or 8 bits, as training does under an adapter."""
    import torch
    import transformers
    from transformers import AutoConfig

    from packing.attention import implementation
    from packing.rotary import by_document
    from stages import heads, quantization

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[arithmetic.fitting(precision, device)]
    try:
        config = AutoConfig.from_pretrained(folder, **FROM_FOLDER)
        small = quantization.settings(quantize, device, dtype) if quantize else {}
        kind = getattr(transformers, heads.classifier(folder) or "AutoModelForCausalLM")
        network = kind.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=implementation(device, config) if packed else None,
            use_safetensors=True,  # the other format is pickle, which runs what is in it
            **FROM_FOLDER,
            **small,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"the model does not load: {error}") from error
    quantization.keep_gradients(network)  # the other kernel also rounds otherwise than training does
    if packed:
        by_document(network)
    return (network if quantize else network.to(device)).eval()


def generate(
    model: Model,
    prompts: Sequence[str],
    max_new_tokens: int,
    stop: Sequence[str],
    batch: int,
    answered: Callable[[int], None],
) -> list[str]:
    """Greedy answers in the order of `prompts`, without the reasoning before each, and cut at their first stop strings;
    `answered` hears how many are done.

    Longest prompts first, so that a batch holds prompts of like length and memory peaks at once; prompts longer than
    the model's context lose their beginning (`cut` counts them). Raises UserError for answers that leave no room.
    """
    import torch
    from transformers import StopStringCriteria

    tokenizer, network = model.tokenizer, model.network
    room = _room(model, max_new_tokens)
    ids, ends = [model.encode(prompt) for prompt in prompts], model.ends(stop)
    order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), prompts[i]))
    # What stops an answer may well stand in the reasoning before it.
    stops = StopStringCriteria(tokenizer, list(stop)) if stop and not model.thought_end else None
    answers = [""] * len(ids)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        padded = tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, padding_side="left", return_tensors="pt")
        if room is not None:
            padded = {name: tensor[:, -room:] for name, tensor in padded.items()}
        begin = padded["input_ids"].shape[1]
        with torch.inference_mode():
            made = network.generate(
                **{name: tensor.to(network.device) for name, tensor in padded.items()},
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=ends or None,
                pad_token_id=tokenizer.pad_token_id,
                # In the answer alone: what the prompt ends with may begin a stop string.
                stopping_criteria=[lambda ids, scores, at=begin, **_: stops(ids[:, at:], scores)] if stops else [],
            )
        for i, answer in zip(chosen, made[:, begin:].tolist(), strict=True):
            answers[i] = _cut(model.answer(answer, ends), stop)
        answered(start + len(chosen))
    return answers


def cut(model: Model, prompts: Sequence[str], max_new_tokens: int) -> int:
    """How many of the prompts lose their beginning, because the answer would not fit into the model's context."""
    room = _room(model, max_new_tokens)
    return 0 if room is None else sum(len(model.encode(prompt)) > room for prompt in prompts)


def _room(model: Model, max_new_tokens: int) -> int | None:
    """Tokens that a prompt may have; None where the model has no longest context."""
    context = getattr(model.network.config, "max_position_embeddings", None)
    if context is not None and context <= max_new_tokens:
        raise UserError(
            f"an answer of {max_new_tokens} tokens (`max_new_tokens`) leaves no room for a question: the model's "
            f"context is {context}"
        )
    return None if context is None else int(context) - max_new_tokens


def _cut(text: str, stop: Sequence[str]) -> str:
    for term in stop:
        text = text.split(term)[0]
    return text
