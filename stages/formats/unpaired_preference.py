"""One answer to a prompt, and whether it is a good one (KTO: Ethayarajh et al. 2024).

    {"prompt": "Name a colour.", "completion": "Blue.", "label": true}

Prompt and completion are texts or messages; the label is true or false, 1 or 0, or these as text. The answer is the
completion's last turn; without a prompt, the completion is a whole conversation. With `options: {wording: text}` plain
texts are raw text, without a chat template.
"""

from collections.abc import Mapping

from stages.formats import BadRow, Conversation, Example, Format, Options, Row, Turn
from stages.formats.messages import COLUMNS, MESSAGE_FIELDS, offered, with_system
from stages.row_fields import elsewhere, shown, verdict
from stages.row_turns import Wording, after_prompt, prompt_of, said, split_answer, whole_question


def convert(row: Row, options: Options) -> Example:
    """One row to a conversation with its label. Raises BadRow."""
    label, field, prompt_field = options.name("label"), options.name("completion"), options.name("prompt")
    whole_question(row, options)
    good = verdict(row.get(label))
    if good is None:
        raise BadRow("wrong type", f"{label} is {shown(row.get(label))}: expected true or false")
    completion = said(row, field, "assistant", options)
    prompt: list[Turn] = []
    if row.get(prompt_field) is not None:
        prompt, completion = after_prompt(said(row, prompt_field, "user", options), completion, field)
    elif len(completion) == 1:
        raise BadRow(
            "missing field", f"{prompt_field} is missing: expected text or messages{elsewhere(row, (label, field))}"
        )
    if not completion:
        raise BadRow("no answer", f"{field} says nothing after the prompt: expected an answer")
    before, answer = split_answer(completion, field)
    begun = prompt_of(with_system(row, prompt + before, options))
    return Example([Conversation(begun + answer, offered(row, options))], {"label": good})


def recognises(row: Row) -> Mapping[str, str] | None:
    """Rows with a label, true or false, beside a completion (or response), or LLaMA-Factory's `kto_tag`."""
    if verdict(row.get("kto_tag")) is not None:
        found = [name for name in COLUMNS if isinstance(row.get(name), list)]
        return {"completion": found[0], "label": "kto_tag"} if len(found) == 1 else None
    found = [name for name in ("completion", "response") if isinstance(row.get(name), str | list)]
    if verdict(row.get("label")) is None or len(found) != 1:
        return None
    asked = [name for name in ("prompt", "question", "instruction") if isinstance(row.get(name), str | list)]
    if len(asked) > 1 or ("instruction" in asked and "input" in row):
        return None
    called = {"completion": found[0], "prompt": asked[0] if asked else "prompt"}
    return {standard: name for standard, name in called.items() if standard != name}


FORMAT = Format(
    convert,
    version=4,
    fields=MESSAGE_FIELDS | {"prompt", "completion", "label", "system", "tools", "from", "value"},
    options=Wording,
    kind="unpaired_preference",
    recognises=recognises,
)
