"""Zephyr: the role as a heading, each turn ended by the end-of-text token."""

from stages.templates import NO_TOOLS, Named

TEMPLATE = Named(
    version=1,
    models="Zephyr 7B, StableLM Zephyr, TinyLlama Chat",
    tokens=(),
    end="eos_token",
    text=NO_TOOLS
    + r"""
{%- for message in messages %}
    {{- '<|' + message.role + '|>\n' + message.content + eos_token + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
{%- endif %}
""",
)
