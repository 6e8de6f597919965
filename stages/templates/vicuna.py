"""Vicuna 1.1: a preamble, then `USER: … ASSISTANT: …` on one line, each answer ended by the end-of-text token."""

from stages.templates import NO_TOOLS, Named

TEMPLATE = Named(
    version=1,
    models="Vicuna 1.1 to 1.5",
    tokens=(),
    end="eos_token",
    text=NO_TOOLS
    + r"""
{{- bos_token }}
{%- if messages[0].role != 'system' %}
    {{- "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, " }}
    {{- "detailed, and polite answers to the user's questions. " }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- 'USER: ' + message.content + ' ' }}
    {%- elif message.role == 'assistant' %}
        {{- 'ASSISTANT: ' + message.content + eos_token }}
    {%- elif loop.first %}
        {{- message.content + ' ' }}
    {%- else %}
        {{- raise_exception('a system turn may only come first') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'ASSISTANT:' }}
{%- endif %}
""",
)
