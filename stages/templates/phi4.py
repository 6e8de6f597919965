"""Phi 4: ChatML's tokens with `<|im_sep|>` between role and text, and no line breaks."""

from stages.templates import NO_TOOLS, Named

TEMPLATE = Named(
    version=1,
    models="Phi 4",
    tokens=("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    end="<|im_end|>",
    text=NO_TOOLS
    + r"""
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '<|im_sep|>' + message.content + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant<|im_sep|>' }}
{%- endif %}
""",
)
