"""ChatML: every turn between `<|im_start|>` and `<|im_end|>`, its role on the first line."""

from stages.templates import Named

TEMPLATE = Named(
    version=1,
    models="ChatML (OpenAI's chat markup language, 2023)",
    tokens=("<|im_start|>", "<|im_end|>"),
    end="<|im_end|>",
    text=(
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
)
