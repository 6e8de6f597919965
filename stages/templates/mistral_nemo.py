"""Mistral v3 for the Tekken tokenizer: v3's format without its spaces."""

from dataclasses import replace
from functools import reduce

from stages.templates.mistral_v3 import TEMPLATE as V3

_CLOSE = reduce(lambda text, token: text.replace(f"{token} ", token), V3.tokens, V3.text)

TEMPLATE = replace(
    V3,
    models="Mistral Nemo, Ministral, Pixtral 12B, text only",
    text=_CLOSE.replace("' ' + message.content | trim + eos_token", "message.content + eos_token"),
)
