"""Falcon 3: Tülu's format."""

from dataclasses import replace

from stages.templates.tulu import TEMPLATE as TULU

TEMPLATE = replace(TULU, models="Falcon 3 Instruct")
