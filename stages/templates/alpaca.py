"""Alpaca: a preamble, then `### Instruction:` and `### Response:`; later turns repeat the two headings."""

from stages.templates import NO_TOOLS, Named

TEMPLATE = Named(
    version=1,
    models="Stanford Alpaca",
    tokens=(),
    end="eos_token",
    text=NO_TOOLS
    + r"""
{{- bos_token }}
{%- if messages[0].role != 'system' %}
    {{- 'Below is an instruction that describes a task. Write a response that appropriately completes the request.' }}
    {{- '\n\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '### Instruction:\n' + message.content + '\n\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '### Response:\n' + message.content + eos_token + '\n\n' }}
    {%- elif loop.first %}
        {{- message.content + '\n\n' }}
    {%- else %}
        {{- raise_exception('a system turn may only come first') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Response:\n' }}
{%- endif %}
""",
)
