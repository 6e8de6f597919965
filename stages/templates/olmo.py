"""OLMo 2: Tülu's format after the begin token."""

from dataclasses import replace

from stages.templates import NO_TOOLS
from stages.templates.tulu import TEMPLATE as TULU

TEMPLATE = replace(TULU, models="OLMo 2", text=TULU.text.replace(NO_TOOLS, NO_TOOLS + "\n{{- bos_token }}"))
