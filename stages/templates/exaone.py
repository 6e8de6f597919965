"""EXAONE 3: `[|role|]` before each turn; a question ends with its line, the others with `[|endofturn|]`."""

from stages.templates import NO_TOOLS, Named

TEMPLATE = Named(
    version=1,
    models="EXAONE 3.0 and 3.5",
    tokens=("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"),
    end="[|endofturn|]",
    text=NO_TOOLS
    + r"""
{%- if messages[0].role != 'system' %}
    {{- '[|system|][|endofturn|]\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '[|' + message.role + '|]' + message.content }}
    {{- '[|endofturn|]' if message.role != 'user' }}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '[|assistant|]' }}
{%- endif %}
""",
)
