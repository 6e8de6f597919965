"""Settings of the train section that do not fit together: each named with its mend, before anything is loaded."""

import re
from typing import Any

import pytest

from stages.train import TrainConfig


def lora(**settings: Any) -> dict[str, Any]:
    return {"method": "lora", "lora": {"rank": 4, **settings}}


def full(**settings: Any) -> dict[str, Any]:
    return {"method": "full", "full": settings}


def rewarded(objective: str, **options: Any) -> dict[str, Any]:
    rewards = {"short": {"reward": "length", "options": {"most": 2}}}
    return {"objective": objective, "objective_options": {"rewards": rewards, **options}}


FREE = {"optimizer": "schedule_free_adamw", "schedule": "constant"}
UNDER = "looks for the model before training under the adapter"

MISFITS: list[tuple[dict[str, Any], str]] = [
    # the objective
    (
        {"objective": "reward", **lora(modules_to_save=["lm_head"])},
        "reward puts another head in its place; take it out",
    ),
    ({"objective": "process_reward", **lora(modules_to_save=["lm_head"])}, "process_reward puts another head"),
    # the method
    (lora() | {"full": {"only": ["mlp"]}}, "`full` is set, but the method is lora: set `method: full`"),
    (full() | {"quantize": "nf4"}, "quantized weights cannot be trained themselves: set `method: lora`"),
    (full() | {"lora": {"restart_every": 5}}, "`lora.restart_every` is set, but the method is full"),
    (full() | {"lora": {"plus_ratio": 16}}, "`lora.plus_ratio` is set, but the method is full"),
    (full() | {"lora": {"restart_warmup": 5}}, "`lora.restart_warmup` is set, but the method is full"),
    (
        full() | {"lora": {"targets": ["q_proj"], "rank": 64, "experts": True}},
        "`lora.rank`, `lora.targets`, `lora.experts` are set, but the method is full: set `method: lora`, or take them",
    ),
    (full(spectrum=0.5, only=["mlp"]), "`full.spectrum` and `full.only` both choose the weights that train: keep one"),
    (full(lisa={}, only=["mlp"]), "`full.lisa` chooses the layers that train: take `only`"),
    (full(lisa={}, freeze=["mlp"]), "`full.lisa` chooses the layers that train: take `only`"),
    (full(lisa={}, spectrum=0.5), "`full.lisa` chooses the layers that train: take `only`"),
    (full(lisa={}) | {"ema": 0.9}, "`ema` would average layers that rest with layers that train"),
    (full(lisa={}) | FREE, "`full.lisa` would lose a schedule-free optimizer's average of a layer that rests"),
    # adapters
    (
        lora(targets=["lm_head"]) | {"embedding_learning_rate": 1e-5},
        "`embedding_learning_rate`: no embedding trains: name",
    ),
    (lora(experts=True, dropout=0.1), "`lora.dropout` does not work on fused experts: take it out"),
    (lora(experts=True, dora=True), "`lora.dora` does not work on fused experts: take it out"),
    (lora(experts=True, restart_every=5), "`lora.restart_every` does not work on fused experts: take it out"),
    (lora(experts=True, init="pissa"), "`lora.init: pissa` does not work on fused experts: leave it out"),
    (lora(dora=True, init="olora"), "`lora.dora` does not work with `lora.init: olora`: take one out"),
    (lora(dora=True, init="eva"), "`lora.dora` does not work with `lora.init: eva`: take one out"),
    (lora(dora=True, restart_every=5), "a magnitude cannot be added to weights"),
    (lora(init="pissa", restart_every=5), "at random with B at zero, which `lora.init: pissa` does not: take one out"),
    (lora(init="orthogonal", restart_every=5), "which `lora.init: orthogonal` does not: take one out"),
    (lora(init="eva", restart_every=5), "at random with B at zero, which `lora.init: eva` does not: take one out"),
    (lora() | {"quantize": "nf4", "precision": "fp8"}, "`precision: fp8` is for weights of 16 bits"),
    (lora(restart_every=5) | {"quantize": "nf4"}, "`quantize` would round that away: take one out"),
    (lora(restart_every=5) | {"ema": 0.9}, "`ema` averages across restarts what is not the same adapter"),
    (
        lora(restart_every=5) | {"keep": "best", "evaluate_every": 5},
        "`keep: best` does not work with `lora.restart_every`",
    ),
    (lora(restart_every=5) | FREE, "cannot reset the averages of a schedule-free optimizer: choose another one"),
    (
        lora(restart_warmup=5),
        "`lora.restart_warmup` is set, but nothing restarts: set `lora.restart_every`, or take it",
    ),
    (lora(init="loftq"), "`lora.init: loftq` makes up for quantization: set `quantize: nf4`, or choose another init"),
    (
        lora(init="loftq") | {"quantize": "nf4", "objective": "dpo"},
        "`lora.init: loftq`: dpo compares with the quantized model",
    ),
    (
        {"objective": "dpo", "objective_options": {"loss": "hinge", "label_smoothing": 0.1}},
        "label_smoothing is for sigmoid, robust and exo_pair, not hinge: take it out",
    ),
    (
        {"objective": "dpo", "objective_options": {"temperature": 0.1}},
        "temperature is for discopop, not sigmoid: take it out",
    ),
    (
        {"objective": "dpo", "objective_options": {"loss": {"sigmoid": 1, "sft": -1}}},
        "loss: the weight of sft is -1.0: expected",
    ),
    (lora(init="loftq") | {"quantize": "int8"}, "`lora.init: loftq` makes up for quantization: set `quantize: nf4`"),
    *(
        (lora(init=init) | {"quantize": "nf4"}, f"`lora.init: {init}` needs weights in full precision: take `quantize`")
        for init in ("pissa", "pissa_niter_16", "olora", "eva", "orthogonal")
    ),
    *(
        (lora(init=init) | objective, f"`lora.init: {init}`: {told}")
        for init in ("olora", "pissa", "pissa_niter_16")
        for objective, told in (
            (rewarded("rloo"), f"rloo {UNDER}: choose another init ["),
            (rewarded("rloo", beta=0), f"rloo {UNDER}: choose another init ["),
            ({"objective": "ebft"}, f"ebft {UNDER}: choose another init ["),
            (rewarded("grpo", beta=0.1), f"grpo {UNDER}: choose another init, or `beta: 0` ["),
        )
    ),
    (
        lora(new_tokens=["<a>"], modules_to_save=["embed_tokens"]),
        "trains some rows of the embeddings, `lora.modules_to_save` all: keep one of the two",
    ),
    (lora(new_tokens=["<a>"], modules_to_save=["lm_head"]), "trains some rows of the embeddings"),
    # steps
    ({"warmup": 1.5}, "`warmup` is 1.5: a whole number of steps, or a share below 1"),
    ({"decay": 2.5, "schedule": "wsd"}, "`decay` is 2.5: a whole number of steps, or a share below 1"),
    ({"decay": 0.1}, "`decay` is for the schedule wsd, not cosine: set `schedule: wsd`, or take it out"),
    ({"evaluate_every": 10.5}, "`evaluate_every` is 10.5: a whole number of steps, or a share below 1"),
    ({"floor": 0.1, "schedule": "constant"}, "`floor` is for schedules that fall to an end: cosine, linear or wsd"),
    ({"floor": 0.1, "schedule": "inverse_sqrt"}, "cosine, linear or wsd, not inverse_sqrt"),
    ({"patience": 3}, "`patience` needs `evaluate_every`: how often to look at the held-out loss"),
    ({"keep": "best"}, "`keep: best` needs `evaluate_every`: how often to look at the held-out loss"),
]


@pytest.mark.parametrize(("config", "told"), MISFITS, ids=lambda value: str(value)[:60])
def test_what_does_not_fit_together_is_named_with_its_mend(config: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        TrainConfig.model_validate(config)


@pytest.mark.parametrize(
    "config",
    [
        {"objective": "reward", **lora(modules_to_save=["embed_tokens"])},
        lora(init="pissa") | rewarded("grpo"),
        full(spectrum=0.5, freeze=["mlp"]),
        full(lisa={}),
        lora(experts=True, init="gaussian"),
        lora(dora=True) | {"quantize": "nf4"},
        lora(init="loftq") | {"quantize": "nf4"},
        lora(restart_every=5) | {"keep": "last", "evaluate_every": 5},
        lora(new_tokens=["<a>"], modules_to_save=["norm"]),
        full() | {"lora": {"rank": 16, "targets": "all-linear"}},
        lora(restart_every=5, restart_warmup=2),
        {"warmup": 10, "decay": 0.5, "schedule": "wsd", "evaluate_every": 20, "patience": 3, "keep": "best"},
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_looks_alike_and_fits_is_taken(config: dict[str, Any]) -> None:
    TrainConfig.model_validate(config)


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"`lora.dora` does not work on fused experts.*; `patience` needs"):
        TrainConfig.model_validate(lora(experts=True, dora=True) | {"patience": 3})


@pytest.mark.parametrize(
    "config", [lora(targets=["re:layers.(0"]), full(only=["re:*"]), full(freeze=["mlp", "re:[a"])], ids=str
)
def test_an_expression_that_is_none_is_told_with_its_place(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"re:.*is no regular expression"):
        TrainConfig.model_validate(config)
