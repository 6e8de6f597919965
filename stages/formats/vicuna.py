"""Vicuna's data: ShareGPT's rows, with `human` and `gpt` as speakers. The same as `sharegpt`.

    {"id": "identity_0", "conversations": [{"from": "human", "value": "Who are you?"},
                                           {"from": "gpt", "value": "I am Vicuna."}]}

Vicuna's wording ("USER: ... ASSISTANT: ...") is a chat template, `convert.template: vicuna`.
"""

from dataclasses import replace

from stages.formats.sharegpt import FORMAT as SHAREGPT

FORMAT = replace(SHAREGPT, recognises=lambda row: None)
