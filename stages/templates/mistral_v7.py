"""Mistral v7 for the Tekken tokenizer: v3's format with system turns and tool results between tokens of their own."""

from stages.templates import Named

TEMPLATE = Named(
    version=1,
    models="Mistral Small 3 and 3.1 (2501, 2503)",
    tokens=(
        *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_CONTENT]"),
        *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    end="eos_token",
    tools=True,
    text=r"""
{%- set ns = namespace(last=-1) %}
{%- for message in messages if message.role == 'user' %}
    {%- set ns.last = loop.index0 %}
{%- endfor %}
{%- if tools and ns.last < 0 %}
    {{- raise_exception('tools are written with the last question, and there is none') }}
{%- endif %}
{%- set ns.question = -1 %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- '[SYSTEM_PROMPT]' + message.content + '[/SYSTEM_PROMPT]' }}
    {%- elif message.role == 'user' %}
        {%- set ns.question = ns.question + 1 %}
        {{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' if tools and ns.question == ns.last }}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS]' + message.tool_call_id[-9:] + '[TOOL_CONTENT]' + message.content + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- message.content if message.content is string }}
        {%- if message.tool_calls %}
            {{- '[TOOL_CALLS][' }}
            {%- for call in message.tool_calls %}
                {{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
                {{- ', "id": "' + call.id[-9:] + '"}' }}
                {{- ', ' if not loop.last }}
            {%- endfor %}
            {{- ']' }}
        {%- endif %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}
""",
)
