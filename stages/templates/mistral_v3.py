"""Mistral v3: `[INST]`, no header for answers; system turn and tools stand with the last question."""

from stages.templates import Named

TEMPLATE = Named(
    version=1,
    models="Mistral 7B Instruct v0.3, Mixtral 8x22B Instruct",
    tokens=(
        *("[INST]", "[/INST]", "[TOOL_CALLS]"),
        *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    end="eos_token",
    tools=True,
    text=r"""
{%- set ns = namespace(system='', last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set ns.last = loop.index0 %}
    {%- elif message.role == 'system' and not loop.first %}
        {{- raise_exception('a system turn may only come first') }}
    {%- elif message.role == 'system' %}
        {%- set ns.system = message.content + '\n\n' %}
    {%- endif %}
{%- endfor %}
{%- if ns.last < 0 and (ns.system or tools) %}
    {{- raise_exception('system turn and tools are written with the last question, and there is none') }}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' if tools and loop.index0 == ns.last }}
        {{- '[INST] ' }}
        {{- ns.system if loop.index0 == ns.last }}
        {{- message.content + '[/INST]' }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id[-9:] + '"}' }}
        {{- '[/TOOL_RESULTS]' }}
    {%- elif message.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
            {{- ', "id": "' + call.id[-9:] + '"}' }}
            {{- ', ' if not loop.last }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}
""",
)
