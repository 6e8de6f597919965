"""merge: the model with its training folded in, as an ordinary Hugging Face folder, and the proof that it is the same.

    model = AutoModelForCausalLM.from_pretrained(folder)

After LoRA, every adapted weight becomes W + alpha / rank * B A, computed in float32 and rounded once, to the dtype of
the model. On a few texts, logits are compared along the way: adapter and merged weights (equal, but for the order of
float32 sums), what was saved and what is read back from disk (equal), adapter and final model (as near as rounding
allows). A merge that lost the training, or part of it, fails here and not in production.

After full fine-tuning the weights are passed on. A head that was trained in place of the one for words (`stages.heads`)
then makes the folder a classifier's. All other files (config, tokenizer) are the model's own, byte for byte, but for
the chat template, which is the data's wherever one stands, and generation_config.json where it lacks what ends a turn
of that (`stages.turn_end`).
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages import weight_files
from stages.stage import Facts, Stage, StageConfig, UserError, Work
from stages.tokenizer_files import default_template
from stages.turn_end import put_end

if TYPE_CHECKING:
    import torch

TEXTS = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "Question: A bus leaves at 9:40 and arrives at 12:15. How long does the trip take?\nAnswer: 2 hours 35 minutes",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Spell the word 'garden' backwards, one letter at a time: n e d r a g",
    '{"name": "Ada", "born": 1815, "languages": ["English", "Français", "日本語"]}',
    "Once there was a fox who lived under the roots of an old oak, and every evening she went out to look for supper.",
)
"""What the logits are compared on: prose, arithmetic, code, data, and letters beyond ASCII."""

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
ROOM = 1.2
"""Of a GPU's memory to the model's size in float32: for the adapter, a matrix's update, and logits."""
EXACT = 1e-3
"""Largest difference of logits, relative to the largest logit, that float32 arithmetic in another order explains."""
NOISE = 5e-3
"""KL divergence in nats that rounding the weights may always cost: ten times what bfloat16 costs SmolLM2-135M."""
KEPT = 0.1
"""Share of the weights' update that rounding must leave."""
DAMAGE = 0.1
"""Share of the training's own KL divergence that it may cost besides."""


class MergeConfig(StageConfig):
    """Nothing to choose: the merged model has the dtype of the model it came from."""


@dataclass(frozen=True)
class Likeness:
    """How near the saved model's next-token distributions are to the trained ones, over all positions of the texts."""

    positions: int
    max_difference: float
    """Largest absolute difference of two logits."""
    max_logit: float
    """Largest absolute logit: the scale of the above."""
    top1_agreement: float
    """Share of positions with the same most likely token."""
    kl: float
    """Mean KL(trained || saved), in nats."""
    kl_of_training: float
    """Mean KL(trained || model before training), in nats: how much the training changed."""


def run(config: MergeConfig, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    """Merge `inputs["trained"]` (train's `adapter/` or `weights/`) into `inputs["model"]`.

    The chat template in the folder is the one that the data was rendered with (`inputs["templates"]`, one copy a
    shard): what is asked later must look like what was trained on. What closes the steps that a process reward model
    judges comes from there too, and goes into its config.json. What ends a turn in that template goes into
    generation_config.json, or the model would not stop there.

    Writes a model folder and `merge.json`, the figures of the comparison. Raises UserError when the result is not the
    trained model.
    """
    trained = inputs["trained"]
    merged = (trained / "adapter").is_dir()
    assert merged or (trained / "weights").is_dir(), f"{trained} holds neither adapter/ nor weights/"
    facts, where = (
        _merge(inputs["model"], trained / "adapter", output, work)
        if merged
        else (_pass_on(inputs["model"], trained, output), {})
    )
    _put_template(inputs["templates"], output)
    head = trained / "head.safetensors"
    if head.exists():
        from stages import heads

        heads.convert(output, head, _separator(inputs["templates"]))
    changed, count = _changed(inputs["model"], output)
    facts |= {"tensors": count, "changed_tensors": changed}
    if not head.exists():
        put_end(output)
    warnings = []
    if not changed:
        warnings.append("training changed nothing: the result is identical to the model before training")
    if _asked_otherwise(inputs["templates"], output):
        warnings.append(
            "the model was trained on raw text and keeps the chat template of the model before training: evaluate, and "
            "whoever loads it, ask through that"
        )
    if warnings:
        facts["warning"] = "; ".join(warnings)
    (output / "merge.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    return facts | where


def _put_template(templates: Path, output: Path) -> None:
    texts = {path.read_text("utf-8") for path in templates.rglob("chat_template.jinja")}
    if len(texts) > 1:
        raise UserError(
            "merge: the data was rendered with different chat templates, and a model carries one: "
            "give all sources the same convert.template"
        )
    for text in texts:
        (output / "chat_template.jinja").write_text(text, "utf-8")
        _take_out_others(output, text)


def _take_out_others(folder: Path, template: str) -> None:
    """Leave no other chat template in the files where some look before chat_template.jinja, as llama.cpp does."""
    for name in ("tokenizer_config.json", "chat_template.json"):
        path = folder / name
        settings = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        if default_template(settings.pop("chat_template", template)) == template:
            continue
        if settings:
            path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
        else:
            path.unlink()


def _asked_otherwise(templates: Path, output: Path) -> bool:
    """Whether the data went through no chat template, and the model has one all the same."""
    from stages.tokenizer_files import read_tokenizer

    if next(templates.rglob("chat_template.jinja"), None):
        return False
    with suppress(UserError):
        return read_tokenizer(output).template is not None
    return False


def _separator(templates: Path) -> str | None:
    """What closes the steps of a process reward model's data; None where the data does not say."""
    found = {json.loads(path.read_text("utf-8")) for path in templates.rglob("step_separator.json")}
    if len(found) > 1:
        raise UserError(
            f"merge: the data's steps are closed by {' and '.join(map(repr, sorted(found)))}, and a model looks for "
            "one separator: give all sources the same"
        )
    return next(iter(found), None)


def _copy_rest(model: Path, output: Path) -> None:
    for path in sorted(p for p in model.rglob("*") if p.is_file()):
        if not any(path.match(pattern) for pattern in WEIGHTS):
            target = output / path.relative_to(model)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _pass_on(model: Path, trained: Path, output: Path) -> Facts:
    _copy_rest(model, output)
    for pattern in WEIGHTS:
        for path in sorted((trained / "weights").glob(pattern)):
            with suppress(OSError):  # another file system
                os.link(path, output / path.name)
                continue
            shutil.copyfile(path, output / path.name)
    return {"method": "full"}


def _merge(model: Path, adapter: Path, output: Path, work: Work) -> tuple[Facts, Facts]:
    """What is true of the result, and where it was computed, which is not."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    dtype = weight_files.dtype(model)
    probes = _probes(model)
    work.tell(0, 3, "models")
    base = _load(model, "cpu")
    device = _device(base, work.runtime.device)
    base = base.to(device)
    before = _logits(base, probes)
    work.tell(1, 3, "models")
    adapted = PeftModel.from_pretrained(base, str(adapter)).eval()
    wanted = _logits(adapted, probes)
    merged = adapted.merge_and_unload(safe_merge=True)
    require_same(compare(before, wanted, _logits(merged, probes)))
    work.tell(2, 3, "models")
    narrow = AutoModelForCausalLM.from_pretrained(model, dtype="auto", local_files_only=True)
    share = _round(merged, narrow)
    require_update(share, dtype)
    rounded = _logits(merged, probes)
    del base, adapted, merged
    narrow.save_pretrained(output)
    _copy_rest(model, output)
    del narrow
    saved = _logits(_load(output, device), probes)
    require_saved(compare(before, rounded, saved))
    likeness = compare(before, wanted, saved)
    require_kept(likeness, dtype)
    work.tell(3, 3, "models")
    facts: Facts = {"method": "lora", "dtype": _name(dtype), "update_kept": share, "likeness": asdict(likeness)}
    return facts, {"device": device}


def _device(model: Any, wanted: str) -> str:
    """Where to compute: on the GPU if there is one, it is not unwanted, and it has the memory."""
    import torch

    if wanted == "cpu" or not torch.cuda.is_available():
        return "cpu"
    size = sum(parameter.numel() for parameter in model.parameters()) * torch.float32.itemsize
    return "cuda" if fits(size, torch.cuda.mem_get_info()[0]) else "cpu"


def fits(size: int, free: int) -> bool:
    """Whether a model of so many bytes, its adapter and the matrices that are made of both go into free memory."""
    return size * ROOM <= free


def _round(wide: Any, narrow: Any) -> float | None:
    """Give `narrow`, the model in its own dtypes, the weights of `wide`, and `wide` what rounding left of them.

    Weights that were not merged come out with the bits they had. Returns the share of the weights' update that is left:
    with d the update and k what is left of it, (k . d) / (d . d) over all weights; None when there is none.
    """
    import torch

    theirs = dict(wide.named_parameters())
    if others := theirs.keys() ^ dict(narrow.named_parameters()).keys():
        raise UserError(
            f"merge: {min(others)} belongs to one of the merged model and the model before training alone, so this "
            "adapter cannot be folded into this model: train without modules_to_save of weights that are shared"
        )
    with torch.no_grad():
        left = whole = 0.0
        for name, ours in narrow.named_parameters():
            before = ours.to(theirs[name], copy=True)
            update = theirs[name] - before
            theirs[name].copy_(ours.copy_(theirs[name]))
            left += float(((theirs[name] - before) * update).double().sum())
            whole += float((update * update).double().sum())
    return _three_digits(torch.tensor(left / whole)) if whole else None


def _load(folder: Path, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return loaded.to(device).eval()


def _probes(model: Path) -> "list[torch.Tensor]":
    """Token ids [1, tokens] of the texts, and of one as a conversation where the tokenizer has a chat template."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    texts: list[str] = list(TEXTS)
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": TEXTS[1]}, {"role": "assistant", "content": TEXTS[0]}]
        texts.append(tokenizer.apply_chat_template(turns, tokenize=False))
    ids = [tokenizer(text)["input_ids"] for text in texts]
    return [torch.tensor([each]) for each in ids if each]


def _logits(model: Any, probes: "Sequence[torch.Tensor]") -> "torch.Tensor":
    """[positions, vocabulary] on the CPU."""
    import torch

    with torch.inference_mode():
        found = [model(input_ids=ids.to(model.device), use_cache=False).logits[0].float().cpu() for ids in probes]
    return torch.cat(found)


def compare(before: "torch.Tensor", wanted: "torch.Tensor", found: "torch.Tensor") -> Likeness:
    """Compare the saved model's logits `found` with the trained ones `wanted`; all [positions, vocabulary]."""
    from torch.nn.functional import kl_div, log_softmax

    def kl(other: "torch.Tensor") -> float:
        ours, theirs = log_softmax(wanted, -1), log_softmax(other, -1)
        return _three_digits(kl_div(theirs, ours, log_target=True, reduction="batchmean").clamp(min=0))

    return Likeness(
        positions=len(wanted),
        max_difference=_three_digits((wanted - found).abs().max()),
        max_logit=_three_digits(wanted.abs().max()),
        top1_agreement=_three_digits((wanted.argmax(-1) == found.argmax(-1)).float().mean()),
        kl=kl(found),
        kl_of_training=kl(before),
    )


def _three_digits(number: "torch.Tensor") -> float:
    """What lies beyond is the order of floating-point sums on this machine."""
    return float(f"{number:.3g}")


def require_same(likeness: Likeness) -> None:
    """Raise UserError when weights merged in float32 do not give the adapter's logits."""
    if not likeness.max_difference <= EXACT * likeness.max_logit:
        raise UserError(
            "merge: the merged weights do not give the adapter's logits, so this adapter cannot be folded into this "
            f"model (a layer that shares its weights with another one, or a model it was not trained on): {likeness}"
        )


def require_saved(likeness: Likeness) -> None:
    """Raise UserError when the model read back from disk is not the one that was written."""
    if not likeness.max_difference <= EXACT * likeness.max_logit:
        raise UserError(
            "merge: the saved model does not give the logits of the model that was saved: the model's library does "
            f"not write what it reads: {likeness}"
        )


def require_update(share: float | None, dtype: "torch.dtype") -> None:
    """Raise UserError when rounding to `dtype` left next to nothing of the weights' update."""
    if share is not None and not share >= KEPT:
        raise UserError(
            f"merge: of the adapter's changes only {share:.1%} are left in {_name(dtype)}, the dtype of the model: the "
            "others are smaller than it can hold. Train longer or with a higher learning rate, or start from the model "
            "in a wider dtype"
        )


def require_kept(likeness: Likeness, dtype: "torch.dtype") -> None:
    """Raise UserError when rounding to `dtype` damaged what was trained."""
    if not likeness.kl <= NOISE + DAMAGE * likeness.kl_of_training:
        raise UserError(
            f"merge: rounding the merged weights to {_name(dtype)}, the dtype of the model, takes too much of the "
            f"training; start from the model in a wider dtype: {likeness}"
        )


def _name(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")


def _changed(model: Path, output: Path) -> tuple[int, int]:
    """How many tensors differ between the two folders' weights, and how many there are."""
    import torch

    before, count, changed = dict(weight_files.tensors(model)), 0, 0
    for name, tensor in weight_files.tensors(output):
        count += 1
        other = before.get(name)
        changed += other is None or not torch.equal(tensor(), other())
    return changed, count


STAGE = Stage(name="merge", artifact="weights", version=6, config=MergeConfig, run=run)
