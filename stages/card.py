"""The model card: what the model is, how it scored, what it was made from and how to load it, as Markdown."""

import os
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import yaml

from stages.compare import report
from stages.identity import Json

SECRET_NAMES = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|ACCESS_KEY(_ID)?|API_KEY)$")
"""Environment variables whose values must never be published."""
SECRET_FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bghp_[A-Za-z0-9]{20,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|(?<=://)[^/\s@\"']+:[^/\s@\"']+(?=@)"
    r"|(?<=[?&])(?:X-Amz-[A-Za-z]+|Signature|sig|token|access_token)=[^&\s\"']+",
    re.IGNORECASE,
)
"""Tokens by their form, credentials before a host, and signatures in a URL's query."""

TASKS = {"reward": "text-classification", "process_reward": "token-classification"}
"""The Hub's names for what a model is for, by objective; of the others, text-generation."""
ASKED = """
from transformers import pipeline
model = pipeline("text-generation", model=".")  # this folder, or its name on the Hub
chat = [{"role": "user", "content": "Hello!"}]
text = chat if model.tokenizer.chat_template else "Once upon a time"  # a model of plain text has no template
print(model(text, return_full_text=False)[0]["generated_text"])
"""
LOADED = {
    "reward": """
from transformers import AutoModelForSequenceClassification, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(".")  # this folder, or its name on the Hub
model = AutoModelForSequenceClassification.from_pretrained(".")
chat = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello."}]
print(model(**tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)).logits.item())
""",
    "process_reward": """
from transformers import AutoModelForTokenClassification, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(".")  # this folder, or its name on the Hub
model = AutoModelForTokenClassification.from_pretrained(".")
text = tokenizer.apply_chat_template(
    [{"role": "user", "content": "What is 2 + 3 + 4?"}], tokenize=False, add_generation_prompt=True
) + "2 + 3 = 5" + model.config.step_separator  # which ends each step, as in the training data
print(model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, -1].softmax(-1)[1].item())
""",
}
"""How a model is loaded and asked, by objective; of the others, `ASKED`."""


def redacted(text: str) -> str:
    """The text without anything that looks like, or is known from the environment as, a secret."""
    for name, value in sorted(os.environ.items(), key=lambda item: -len(item[1])):
        if SECRET_NAMES.search(name.upper()) and len(value) >= 8:
            text = text.replace(value, "[secret removed]")
    return SECRET_FORMS.sub("[secret removed]", text)


def card(
    name: str,
    recipe: str,
    license: str,
    license_file: str,
    scores: Json,
    gate: Json,
    data: str,
    lineage: Mapping[str, Json],
) -> str:
    """The card's Markdown. `recipe` is the YAML text, `data` a Markdown summary of the data.

    `license` may be "": then the base model's is named where its package tells it, else its `license_file` beside the
    card, if there is one.
    """
    parsed: Any = yaml.safe_load(recipe) or {}
    base = base_model(parsed)
    objective = str(_section(parsed, "train").get("objective", ""))
    front: dict[str, Json] = {
        **({"base_model": base} if base else {}),
        **_license(license or _license_of(parsed), license_file),
        "library_name": "transformers",
        "pipeline_tag": TASKS.get(objective, "text-generation"),
        "tags": ["regrow", *_method(parsed)],
    }
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}
---

# {name}

{"Fine-tuned from `" + base + "`" if base else "Fine-tuned"} with regrow.

## Scores

{report(scores)}
Gate: **{"passed" if gate["passed"] else "not passed"}**: {"; ".join(gate["reasons"])}.

## How to load

```python
{LOADED.get(objective, ASKED).strip()}
```

## Data

{data.strip()}

## Lineage

Keys say what was asked for, digests say what came out.

{_lineage(lineage)}

## Recipe

```yaml
{recipe.strip()}
```
"""


def base_model(recipe: Mapping[str, Any]) -> str:
    """What the recipe fine-tunes, as it may be published: a Hub name, a package, or a last path component."""
    model = _section(_section(recipe, "fetch"), "model")
    if model.get("hub"):
        return str(model["hub"])
    if model.get("package"):
        return str(model["package"])
    if model.get("url"):
        return PurePosixPath(urlsplit(str(model["url"])).path).name
    return PurePosixPath(str(model.get("path", ""))).name


def _section(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = recipe.get(name)
    return found if isinstance(found, Mapping) else {}


def _license(license: str, file: str) -> dict[str, Json]:
    """The Hub's fields for a licence by name, or by the text beside the card."""
    if license:
        return {"license": license}
    return {"license": "other", "license_link": file} if file else {}


def _license_of(recipe: Mapping[str, Any]) -> str:
    """The licence of a base model that came as a Python package, from the package's own metadata; else ""."""
    package = _section(_section(recipe, "fetch"), "model").get("package")
    if not package:
        return ""
    try:
        fields = metadata(str(package)).json
    except PackageNotFoundError:
        return ""
    told = str(fields.get("license_expression") or fields.get("license") or "")
    return told.lower() if re.fullmatch(r"[A-Za-z0-9.+-]{2,40}", told) else ""


def _method(recipe: Mapping[str, Any]) -> list[str]:
    train = _section(recipe, "train")
    return [str(train[name]) for name in ("objective", "method") if train.get(name)]


def _lineage(lineage: Mapping[str, Json]) -> str:
    rows = [f"| {stage} | `{made['key'][:16]}` | `{made['digest'][:16]}` |" for stage, made in lineage.items()]
    return "\n".join(["| stage | key | digest |", "| --- | --- | --- |", *rows])
