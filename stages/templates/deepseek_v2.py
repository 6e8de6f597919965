"""DeepSeek V2: plain `User:` and `Assistant:`, answers ended by the end-of-text token."""

from stages.templates import NO_TOOLS, Named

TEMPLATE = Named(
    version=1,
    models="DeepSeek LLM, V2 and V2 Lite Chat",
    tokens=(),
    end="eos_token",
    text=NO_TOOLS
    + r"""
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- 'User: ' + message.content + '\n\n' }}
    {%- elif message.role == 'assistant' %}
        {{- 'Assistant: ' + message.content + eos_token }}
    {%- else %}
        {{- message.content + '\n\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}
""",
)
