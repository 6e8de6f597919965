"""Llama 4: a header before each turn, `<|eot|>` after it."""

from stages.templates import NO_TOOLS, Named

TEMPLATE = Named(
    version=1,
    models="Llama 4 Instruct, without its tools",
    tokens=("<|header_start|>", "<|header_end|>", "<|eot|>"),
    end="<|eot|>",
    text=NO_TOOLS
    + r"""
{{- bos_token }}
{%- for message in messages %}
    {{- '<|header_start|>' + message.role + '<|header_end|>\n\n' + message.content | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\n\n' }}
{%- endif %}
""",
)
