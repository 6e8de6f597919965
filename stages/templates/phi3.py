"""Phi 3 and 3.5: `<|role|>` on a line of its own, `<|end|>` after each turn."""

from stages.templates import NO_TOOLS, Named

TEMPLATE = Named(
    version=1,
    models="Phi 3 and 3.5",
    tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    end="<|end|>",
    text=NO_TOOLS
    + r"""
{%- for message in messages %}
    {{- '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
{%- endif %}
""",
)
