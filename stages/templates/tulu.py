"""Tülu 3: the role as a heading; only the assistant's turns are ended, by the end-of-text token."""

from stages.templates import NO_TOOLS, Named

TEMPLATE = Named(
    version=1,
    models="Tülu 2 and 3",
    tokens=(),
    end="eos_token",
    text=NO_TOOLS
    + r"""
{%- for message in messages %}
    {{- '<|' + message.role + '|>\n' + message.content }}
    {{- eos_token if message.role == 'assistant' }}
    {{- '\n' if message.role != 'assistant' or not loop.last }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\n' if messages[-1].role == 'assistant' }}
    {{- '<|assistant|>\n' }}
{%- endif %}
""",
)
