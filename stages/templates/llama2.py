"""Llama 2: `[INST] … [/INST]` around each question, the system turn inside the first one, texts stripped."""

from stages.templates import NO_TOOLS, Named

TEMPLATE = Named(
    version=1,
    models="Llama 2 Chat, Code Llama Instruct",
    tokens=(),
    end="eos_token",
    text=NO_TOOLS
    + r"""
{%- set ns = namespace(before='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- if not loop.first %}
            {{- raise_exception('a system turn may only come first') }}
        {%- endif %}
        {%- set ns.before = '<<SYS>>\n' + message.content + '\n<</SYS>>\n\n' %}
    {%- elif message.role == 'user' %}
        {{- bos_token + '[INST] ' + (ns.before + message.content) | trim + ' [/INST]' }}
        {%- set ns.before = '' %}
    {%- else %}
        {{- ' ' + message.content | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if ns.before %}
    {{- raise_exception('the system turn is written with the question after it, and there is none') }}
{%- endif %}
""",
)
