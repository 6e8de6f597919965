"""Mistral v1: `[INST] … [/INST]` around questions as plain text, no header for answers, system turn in the first."""

from stages.templates import NO_TOOLS, Named

TEMPLATE = Named(
    version=1,
    models="Mistral 7B Instruct v0.1 and v0.2, Mixtral 8x7B Instruct",
    tokens=(),
    end="eos_token",
    text=NO_TOOLS
    + r"""
{{- bos_token }}
{%- set ns = namespace(before='') %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}
        {%- set ns.before = message.content + '\n\n' %}
    {%- elif message.role == 'user' %}
        {{- ' [INST] ' + ns.before + message.content + ' [/INST]' }}
        {%- set ns.before = '' %}
    {%- elif message.role == 'assistant' and not ns.before %}
        {{- ' ' + message.content + eos_token }}
    {%- else %}
        {{- raise_exception('one system turn may come first, and a question must follow it') }}
    {%- endif %}
{%- endfor %}
""",
)
