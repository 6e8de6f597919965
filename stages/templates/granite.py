"""Granite 3: the role between two tokens, `<|end_of_text|>` after each turn, tools in a turn of their own."""

from stages.templates import Named

TEMPLATE = Named(
    version=1,
    models="IBM Granite 3.0 Instruct",
    tokens=("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>", "<|end_of_text|>"),
    end="<|end_of_text|>",
    tools=True,
    text=r"""
{%- macro header(role) %}
    {{- '<|start_of_role|>' + role + '<|end_of_role|>' }}
{%- endmacro %}
{%- if tools %}
    {{- header('available_tools') + '\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- '\n\n' if not loop.last }}
    {%- endfor %}
    {{- '<|end_of_text|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {{- header('assistant') + '<|tool_call|>[' }}
        {%- for call in message.tool_calls %}
            {{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}' }}
            {{- ', ' if not loop.last }}
        {%- endfor %}
        {{- ']' }}
    {%- else %}
        {{- header('tool_response' if message.role == 'tool' else message.role) + message.content }}
    {%- endif %}
    {{- '<|end_of_text|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- header('assistant') }}
{%- endif %}
""",
)
