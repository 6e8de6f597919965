"""DeepSeek V3: `<｜User｜>` and `<｜Assistant｜>`, system turns first, tool calls as JSON blocks between tokens.

The model has no place for tools on offer: they stand in the system turn's text, so a list of them is refused.
"""

from stages.templates import Named

TEMPLATE = Named(
    version=1,
    models="DeepSeek V3 and V2.5",
    tokens=("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    end="<｜end▁of▁sentence｜>",
    text=r"""
{%- if tools %}
    {{- raise_exception('DeepSeek V3 has no place for tools on offer: describe them in the system turn') }}
{%- endif %}
{{- bos_token }}
{%- set ns = namespace(systems=0) %}
{%- for message in messages if message.role == 'system' %}
    {{- '\n\n' if not loop.first }}
    {{- message.content }}
{%- endfor %}
{%- for message in messages %}
    {%- set after_tool = not loop.first and loop.previtem.role == 'tool' %}
    {%- if message.role == 'user' %}
        {{- '<｜User｜>' + message.content }}
    {%- elif message.role == 'tool' %}
        {{- '\n' if after_tool else '<｜tool▁outputs▁begin｜>' }}
        {{- '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- '<｜tool▁outputs▁end｜>' }}
        {%- endif %}
    {%- elif message.role == 'assistant' %}
        {{- '<｜Assistant｜>' if not after_tool }}
        {{- message.content if message.content is string }}
        {%- if message.tool_calls %}
            {{- '<｜tool▁calls▁begin｜>' }}
            {%- for call in message.tool_calls %}
                {{- '\n' if not loop.first }}
                {{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name + '\n```json\n' }}
                {%- set given = call.function.arguments %}
                {{- given if given is string else given | tojson }}
                {{- '\n```<｜tool▁call▁end｜>' }}
            {%- endfor %}
            {{- '<｜tool▁calls▁end｜>' }}
        {%- endif %}
        {{- '<｜end▁of▁sentence｜>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role != 'tool' %}
    {{- '<｜Assistant｜>' }}
{%- endif %}
""",
)
