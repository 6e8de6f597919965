"""Command R and Aya: a token for each role, texts stripped, questions and answers in turn."""

from stages.templates import NO_TOOLS, Named

TEMPLATE = Named(
    version=1,
    models="Cohere Command R, Aya 23 and Aya Expanse, without their tools",
    tokens=(
        *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        *("<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    ),
    end="<|END_OF_TURN_TOKEN|>",
    text=NO_TOOLS
    + r"""
{{- bos_token }}
{%- set ns = namespace(next='user') %}
{%- for message in messages %}
    {{- '<|START_OF_TURN_TOKEN|>' }}
    {%- if message.role == 'system' and loop.first %}
        {{- '<|SYSTEM_TOKEN|>' + message.content }}
    {%- elif message.role != ns.next %}
        {{- raise_exception('Command R takes questions and answers in turn, after one system turn at most') }}
    {%- elif message.role == 'user' %}
        {{- '<|USER_TOKEN|>' + message.content | trim }}
        {%- set ns.next = 'assistant' %}
    {%- else %}
        {{- '<|CHATBOT_TOKEN|>' + message.content | trim }}
        {%- set ns.next = 'user' %}
    {%- endif %}
    {{- '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}
{%- endif %}
""",
)
