"""DeepSeek R1: V3's format with the reasoning between `<think>` and `</think>` in answer to the last question."""

from stages.templates import NO_TOOLS, Named

TEMPLATE = Named(
    version=1,
    models="DeepSeek R1 and its distilled models",
    tokens=("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    end="<｜end▁of▁sentence｜>",
    reasoning=True,
    text=NO_TOOLS
    + r"""
{{- bos_token }}
{%- for message in messages if message.role == 'system' %}
    {{- '\n\n' if not loop.first }}
    {{- message.content }}
{%- endfor %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages if message.role == 'user' %}
    {%- set ns.last = loop.index0 %}
{%- endfor %}
{%- set ns.questions = 0 %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<｜User｜>' + message.content }}
        {%- set ns.questions = ns.questions + 1 %}
    {%- elif message.role == 'assistant' %}
        {{- '<｜Assistant｜>' }}
        {%- if '</think>' in message.content %}
            {%- set thought = message.content.split('</think>')[0].split('<think>')[-1] %}
            {%- set answer = message.content.split('</think>')[-1] %}
        {%- else %}
            {%- set thought = message.reasoning_content or '' %}
            {%- set answer = message.content %}
        {%- endif %}
        {%- if ns.questions > ns.last %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- answer.lstrip('\n') + '<｜end▁of▁sentence｜>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<｜Assistant｜><think>\n' }}
{%- endif %}
""",
)
