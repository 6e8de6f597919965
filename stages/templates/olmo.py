"""OLMo 2: Tülu's format after the begin token."""

from stages.templates import NO_TOOLS, Named

TEMPLATE = Named(
    version=1,
    models="OLMo 2",
    tokens=(),
    end="eos_token",
    text=NO_TOOLS
    + r"""
{{- bos_token }}
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
