"""Gemma 2 and 3: the assistant is `model`, texts are stripped, the system turn leads the first question."""

from stages.templates import NO_TOOLS, Named

TEMPLATE = Named(
    version=1,
    models="Gemma 1, 2 and 3, text only",
    tokens=("<start_of_turn>", "<end_of_turn>"),
    end="<end_of_turn>",
    text=NO_TOOLS
    + r"""
{{- bos_token }}
{%- set ns = namespace(before='', next='user') %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}
        {%- set ns.before = message.content + '\n\n' %}
    {%- elif message.role != ns.next %}
        {{- raise_exception('Gemma takes questions and answers in turn, after one system turn at most') }}
    {%- elif message.role == 'user' %}
        {{- '<start_of_turn>user\n' + ns.before + message.content | trim + '<end_of_turn>\n' }}
        {%- set ns.before = '' %}
        {%- set ns.next = 'assistant' %}
    {%- else %}
        {{- '<start_of_turn>model\n' + message.content | trim + '<end_of_turn>\n' }}
        {%- set ns.next = 'user' %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\n' }}
{%- endif %}
""",
)
