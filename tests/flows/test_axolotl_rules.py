"""What Axolotl refuses in a configuration, and what it should have: said of a recipe of ours, before anything runs.

Its rules are of three sorts. Two keys that contradict each other there are one key here, or none: such a recipe cannot
be written, because a key that is not known is refused. Settings that cannot work are refused by name. And some of its
limits are not ours: preferences are packed, and a source with `split: heldout` may stand beside a held-out share.
"""

import copy
import re
from typing import Any

import pytest
import yaml

from flows.recipe import loads
from stages.errors import UserError
from stages.runtime import from_environment

GOOD: dict[str, Any] = {
    "name": "mine",
    "fetch": {"model": {"path": "model"}, "data": {"chats": {"files": "chats.jsonl"}}},
    "convert": {"format": "messages"},
    "train": {},
}
PAIRS = {"convert.format": "preference", "train.objective": "dpo"}
PROMPTS = {"convert.format": "prompt_only", "train.objective": "grpo"}


def read(settings: dict[str, Any]) -> None:
    """Load the good recipe with some settings, by dotted key; None takes a key out."""
    recipe = copy.deepcopy(GOOD)
    for dotted, value in settings.items():
        *above, last = dotted.split(".")
        place = recipe
        for key in above:
            place = place.setdefault(key, {})
        place[last] = value
        if value is None:
            del place[last]
    loads(yaml.safe_dump(recipe), "mine.yaml")


CANNOT_BE_WRITTEN: list[tuple[str, str, Any]] = [
    ("a key that does not exist (it drops such keys silently)", "sequence_lenn", 2048),
    ("one of a data source, too", "fetch.data.chats.typ", "alpaca"),
    ("pushing prepared data without a token", "fetch.push_dataset_to_hub", "me/data"),
    ("a separate packing of evaluation", "pack.eval_sample_packing", False),
    ("a table of predictions beside packing", "evaluate.eval_table_size", 5),
    ("packing with attention that leaks", "pack.sample_packing", True),
    ("softmax scaling without flex attention", "train.scaling_softmax", True),
    ("accumulation beside a batch size", "train.gradient_accumulation_steps", 4),
    ("a micro-batch in the recipe", "train.micro_batch_size", 2),
    ("padding to full length", "pack.pad_to_sequence_len", True),
    ("warmup steps and a warmup ratio", "train.warmup_ratio", 0.1),
    ("saving by steps beside another strategy", "train.save_steps", 100),
    ("evaluations an epoch beside those by steps", "train.evals_per_epoch", 2),
    ("two names of the same noise", "train.noisy_embedding_alpha", 5),
    ("reentrant checkpointing of a model frozen in parts", "train.gradient_checkpointing_kwargs", {}),
    ("a second tokenizer beside the model's", "convert.tokenizer_use_mistral_common", True),
    ("learning rates by group beside LoRA+", "train.lr_groups", []),
    ("layers to adapt, and a pattern of them", "train.lora.layers_to_transform", [0]),
    ("kernels that do not take 8 bits", "train.lora_qkv_kernel", True),
    ("quantizing in two ways", "train.load_in_4bit", True),
    ("several kernels of the loss", "train.chunked_cross_entropy", True),
    ("DeepSpeed in the recipe", "train.deepspeed", "zero2.json"),
    ("FSDP beside it (it misses that)", "train.fsdp_config", {}),
    ("QAT of an adapter (it misses that)", "train.qat", {}),
    ("bounding memory twice", "train.max_memory", {}),
    ("streaming without a number of steps", "fetch.data.chats.streaming", True),
    ("offloading without checkpointing", "train.activation_offloading", True),
    ("context parallelism without its kernel", "train.context_parallel_size", 2),
    ("an attention nobody has", "train.attn_implementation", "fa9"),
    ("code of a model", "fetch.model.trust_remote_code", True),
    ("a removed key", "train.rpo_alpha", 0.1),
]


@pytest.mark.parametrize(("rule", "key", "value"), CANNOT_BE_WRITTEN, ids=[rule for rule, *_ in CANNOT_BE_WRITTEN])
def test_it_cannot_be_written(rule: str, key: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^mine\.yaml:\d+: unknown key `{re.escape(key)}`; (did you mean|known here)"):
        read({key: value})


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("no data", {"fetch.data": None}, "`fetch.data` is missing"),
    ("an empty list of data", {"fetch.data": {}}, "`fetch.data`: dictionary should have at least 1 item"),
    ("a format that does not exist", {"convert.format": "sharegtp"}, "Did you mean sharegpt"),
    ("rows of two places in one source", {"fetch.data.chats.hub": "me/x"}, "expected exactly one of files, hub"),
    (
        "no sequences a step",
        {"pack.global_batch": 0},
        "`pack.global_batch`: input should be greater than or equal to 1",
    ),
    ("a warmup between steps and share", {"train.warmup": 1.5}, "a whole number of steps, or a share below 1"),
    ("looks without rows held out", {"train.evaluate_every": 10}, "and the recipe holds no rows out"),
    ("a gate on them", {"publish.gate": {"max_heldout_loss_increase": 0}}, "and the recipe holds no rows out"),
    ("stopping early without looks", {"train.patience": 3}, "`patience` needs `evaluate_every`"),
    ("the best of no looks", {"train.keep": "best"}, "`keep: best` needs `evaluate_every`"),
    ("a metric that does not exist", {"evaluate.tasks": {"t": {"source": "chats", "metric": "chrf"}}}, "not by 'chrf'"),
    ("noise of no size", {"train.neftune_alpha": 0}, "`train.neftune_alpha`: input should be greater than 0"),
    ("fp8 under an optimizer without it", {"train.precision": "fp8", "train.optimizer": "adafactor"}, "fp8` needs"),
    ("frozen weights beside an adapter", {"train.full": {"freeze": ["mlp"]}}, "but the method is lora"),
    ("quantized weights that train", {"train.method": "full", "train.quantize": "nf4"}, "cannot be trained themselves"),
    ("an adapter that does not exist", {"train.method": "qlora"}, "`train.method`: input should be 'lora' or 'full'"),
    ("bits that QLoRA has not", {"train.quantize": "gptq"}, "`train.quantize`: input should be 'nf4' or 'int8'"),
    ("dropout on fused experts", {"train.lora": {"experts": True, "dropout": 0.1}}, "does not work on fused experts"),
    ("targets that are no expression", {"train.lora": {"targets": ["re:("]}}, "'re:(' is no regular expression"),
    ("no targets", {"train.lora": {"targets": []}}, "name at least one layer, or leave it out for all-linear"),
    ("weights of losses without the losses", PAIRS | {"train.objective_options": {"loss": {}}}, "name at least one"),
    ("another loss's settings", {"train.objective_options": {"beta": 0.1}}, "sft has no option 'beta'"),
    ("a group of one", PROMPTS | {"train.objective_options": {"group_size": 1}}, "greater than or equal to 2"),
    ("pairs for an objective without", {"train.objective": "dpo"}, "the objective dpo trains on preference"),
    ("a loss against weights in other bits", PAIRS | {"train.quantize": "nf4"}, "set `score.quantize: nf4`"),
    (
        "ReLoRA under a schedule of its own",
        {"train.lora": {"restart_every": 9, "init": "pissa"}},
        "starts anew at random",
    ),
    ("ReLoRA without an adapter", {"train.method": "full", "train.lora": {"restart_every": 9}}, "the method is full"),
    ("a template of no name", {"convert.template": "jinja"}, "there is no template 'jinja'"),
    (
        "two templates",
        {"fetch.data.more": {"files": "b"}, "convert.sources": {"more": {"template": "chatml"}}},
        "one chat",
    ),
    ("a window smaller than a step", {"pack.window": 100}, "a step alone reads up to"),
    ("an optimizer that does not exist (it misses that)", {"train.optimizer": "notanopt"}, "notanopt"),
    (
        "a schedule that does not exist (it misses that)",
        {"train.schedule": "bogus"},
        "`train.schedule`: input should be 'c",
    ),
    ("sequences of no tokens (it misses that)", {"pack.sequence_length": 0}, "greater than or equal to 64 (got 0)"),
    ("less than no epochs (it misses that)", {"train.epochs": -1}, "`train.epochs`: input should be greater than 0"),
    (
        "less than nothing held out (it misses that)",
        {"pack.heldout_fraction": -0.5},
        "`pack.heldout_fraction`: input should be greater than or equal to 0 (got -0.5)",
    ),
    ("everything held out", {"pack.heldout_fraction": 1}, "`pack.heldout_fraction`: input should be less than 1"),
    (
        "an adapter of no rank",
        {"train.lora": {"rank": 0}},
        "`train.lora.rank`: input should be greater than or equal to 1",
    ),
]


@pytest.mark.parametrize(("rule", "settings", "told"), REFUSED, ids=[rule for rule, *_ in REFUSED])
def test_it_is_refused_with_its_place(rule: str, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        read(settings)
    assert all(line.startswith("mine.yaml:") for line in str(caught.value).splitlines())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        PAIRS | {"pack.sequence_length": 256, "train.quantize": "nf4", "score.quantize": "nf4"},
        {"convert.format": "sharegpt"},
        {"fetch.data.probe": {"files": "p.jsonl", "split": "heldout"}, "pack.heldout_fraction": 0.1},
        {"train.lora": {"plus_ratio": 16, "modules_to_save": ["embed_tokens"]}, "train.embedding_learning_rate": 1e-5},
    ],
    ids=["nothing", "packed pairs over 4 bits", "sharegpt", "two kinds of held-out rows", "learning rates by kind"],
)
def test_what_is_no_contradiction_here_is_taken(settings: dict[str, Any]) -> None:
    read(settings)


@pytest.mark.parametrize("shards", ["fsdp,zero3", "fsdp2", "deepspeed"])
def test_a_model_is_cut_over_ranks_in_one_way(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGROW_SHARD", shards)
    with pytest.raises(ValueError, match=r"shard\n.*'none', 'fsdp', 'zero2' or 'zero3'"):
        from_environment()
