"""Plain words for a tokenizer without any control tokens: `User: …`, `Assistant: …` and the end-of-text token."""

from stages.templates import NO_TOOLS, Named

TEMPLATE = Named(
    version=1,
    models="base models without a chat format",
    tokens=(),
    end="eos_token",
    text=NO_TOOLS
    + r"""
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- message.content + '\n\n' }}
    {%- elif message.role == 'user' %}
        {{- 'User: ' + message.content + '\n\n' }}
    {%- else %}
        {{- 'Assistant: ' + message.content + eos_token + '\n\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}
""",
)
