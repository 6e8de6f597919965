"""Jamba 1.5: `<|bom|>` and `<|eom|>` around each turn; tools with the system turn, a list of calls after the text."""

from stages.templates import Named

TEMPLATE = Named(
    version=1,
    models="AI21 Jamba 1.5",
    tokens=("<|startoftext|>", "<|bom|>", "<|eom|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"),
    end="<|eom|>",
    tools=True,
    text=r"""
{%- macro offer() %}
    {{- '<tool_definitions>\n# Tools\n\n## Functions' }}
    {%- for tool in tools %}
        {{- '\n\n' + tool.function | tojson(indent=2) }}
    {%- endfor %}
    {{- '\n</tool_definitions>' }}
{%- endmacro %}
{{- '<|startoftext|>' }}
{%- if messages[0].role != 'system' %}
    {{- '<|bom|><|system|> ' }}
    {{- offer() if tools }}
    {{- '<|eom|>' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|bom|><|' + message.role + '|> ' }}
    {{- message.content if message.content is string }}
    {%- if loop.first and message.role == 'system' and tools %}
        {{- '\n\n' if message.content }}
        {{- offer() }}
    {%- endif %}
    {%- if message.tool_calls %}
        {{- '<tool_calls>[\n' }}
        {%- for call in message.tool_calls %}
            {{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}' }}
            {{- ',' if not loop.last }}
        {%- endfor %}
        {{- '\n]</tool_calls>' }}
    {%- endif %}
    {{- '<|eom|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|bom|><|assistant|>' }}
{%- endif %}
""",
)
