"""Llama 3: a header before each turn, `<|eot_id|>` after it; tools in the first question, as in 3.1 to 3.3."""

from stages.templates import Named

TEMPLATE = Named(
    version=1,
    models="Llama 3, 3.1, 3.2 and 3.3 Instruct",
    tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    end="<|eot_id|>",
    tools=True,
    text=r"""
{%- macro header(role) %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}
{%- endmacro %}
{{- bos_token }}
{%- set ns = namespace(tools=tools) %}
{%- if tools and messages[0].role != 'system' %}
    {{- header('system') + 'Environment: ipython\n<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- header('system') }}
        {{- 'Environment: ipython\n' if tools and loop.first }}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- elif message.role == 'user' %}
        {{- header('user') }}
        {%- if ns.tools %}
            {{- 'Given the following functions, please respond with a JSON for a function call with its proper ' }}
            {{- 'arguments that best answers the given prompt.\n\nRespond in the format {"name": function name, ' }}
            {{- '"parameters": dictionary of argument name and its value}.Do not use variables.\n\n' }}
            {%- for tool in tools %}
                {{- tool | tojson(indent=4) + '\n\n' }}
            {%- endfor %}
            {%- set ns.tools = none %}
        {%- endif %}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- elif message.role == 'tool' %}
        {{- header('ipython') + message.content | tojson + '<|eot_id|>' }}
    {%- elif message.tool_calls %}
        {%- if message.tool_calls | length > 1 %}
            {{- raise_exception('Llama 3 calls one tool at a time: this turn calls several') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- header('assistant') + '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + '}<|eot_id|>' }}
    {%- else %}
        {{- header('assistant') + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- header('assistant') }}
{%- endif %}
""",
)
