"""The memory plan: it fits, it prefers what is fast, and where nothing fits it names what would."""

import gc
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from packing.collate import Bin, PackedBins, collate
from stages.errors import UserError
from stages.lm_head import model_inputs
from stages.runtime import Runtime
from stages.stage import Facts, Work
from stages.train import STAGE, TrainConfig
from stages.train.memory import HEADROOM, Costs, choose, free_memory, measure, nearest, smaller
from stages.train.model import load
from stages.train.recomputing import MODES, Mode
from tests.stages import tiny

GB = 10**9


@settings(deadline=None)
@given(
    static=st.integers(0, 50),
    token=st.integers(10**5, 10**7),
    sequences=st.integers(1, 64),
    length=st.sampled_from([512, 2048, 8192]),
    room=st.integers(1, 200),
)
def test_a_plan_fits_and_none_that_is_faster_does(
    static: int, token: int, sequences: int, length: int, room: int
) -> None:
    costs = Costs(static * GB, 0, 0, {"none": token, "selective": token / 2, "full": token / 8}, 0)
    try:
        plan = choose(costs, room * GB, length, sequences, "auto", "auto", "cuda")
    except UserError:
        assert costs.total(length, "full") > room * GB * HEADROOM
        return
    batch = plan.micro_batch * length
    assert costs.total(batch, plan.activation_checkpointing) == plan.expected_bytes <= room * GB * HEADROOM
    for faster in MODES[: MODES.index(plan.activation_checkpointing)]:
        assert costs.total(length, faster) > room * GB * HEADROOM
    passes = -(-sequences // plan.micro_batch)
    assert plan.micro_batch == -(-sequences // passes), "passes are as even as can be"
    if passes > 1 and batch + length <= 32768:
        larger = -(-sequences // (passes - 1))
        assert larger * length > 32768 or costs.total(larger * length, plan.activation_checkpointing) > (
            room * GB * HEADROOM
        )


def test_what_is_given_stays() -> None:
    costs = Costs(GB, 0, 0, {"none": 10**5, "full": 10**4, "offloaded": 10**3}, 0)
    plan = choose(costs, 80 * GB, 2048, 16, 3, "offloaded", "cuda")
    assert (plan.micro_batch, plan.activation_checkpointing) == (3, "offloaded")


@pytest.mark.parametrize(
    ("sequences", "room", "said"), [(16, 50, (False, False)), (17, 50, (True, False)), (17, 38, (False, True))]
)
def test_gradients_of_many_passes_are_added_up_in_float32_if_there_is_room(
    sequences: int, room: int, said: tuple[bool, bool]
) -> None:
    costs = Costs(16 * GB, 16 * GB, 0, {"none": 10**5}, 0, wider=10 * GB)
    plan = choose(costs, room * GB, 8192, sequences, 1, "auto", "cuda")
    assert (plan.wide_sums, plan.rough_sums) == said
    assert ("lose accuracy" in str(plan)) == plan.rough_sums
    assert plan.expected_bytes == costs.total(8192, "none") + 10 * GB * plan.wide_sums


def test_an_impossible_plan_names_those_that_fit() -> None:
    costs = Costs(32 * GB, 32 * GB, 64 * GB, {"none": 10**6, "full": 10**5}, GB)

    def near() -> str:
        return nearest(costs, 80 * GB, 8192, "full", 16 * GB, 1, "none", "cuda")

    with pytest.raises(UserError) as told:
        choose(costs, 80 * GB, 8192, 16, "auto", "auto", "cuda", near)
    message = str(told.value)
    assert "129.8 GB at least (weights 32.0, gradients 32.0, optimizer 64.0, loss 1.0)" in message
    assert re.search(r"train.method lora \(about 17.8 GB\), or 2 ranks with the runtime's shard: fsdp$", message)


def test_too_long_a_sequence_is_told_the_longest_that_fits() -> None:
    costs = Costs(GB, 0, 0, {"none": 10**7, "full": 10**6}, 0)
    told = nearest(costs, 10 * GB, 65536, "lora", GB, 1, "none", "cpu")
    [length] = map(int, re.findall(r"sequence_length (\d+)", told))
    assert costs.total(length, "full") <= 10 * GB * HEADROOM < costs.total(length + 256, "full")


def test_after_running_out_of_memory_the_next_plan_is_smaller_until_none_is() -> None:
    plans: list[tuple[int, Mode]] = [(6, "none")]
    while (found := smaller(*plans[-1], "full")) is not None:
        plans.append(found)
    assert plans == [(6, "none"), (3, "none"), (1, "none"), (1, "full")]
    assert smaller(1, "none", "none") is None, "a model whose layers cannot be recomputed"


def test_offloading_is_named_where_nothing_else_fits() -> None:
    costs = Costs(GB, 0, 0, {"none": 10**7, "full": 2 * 10**6, "offloaded": 10**6}, 0)
    assert "activation_checkpointing: offloaded" in nearest(costs, 12 * GB, 8192, "lora", GB, 1, "fsdp", "cuda")


def test_the_record_says_what_was_chosen_and_a_token_costs_what_it_does_however_many(tmp_path: Path) -> None:
    inputs = {"model": tiny.llama(tmp_path / "model"), **tiny.plan(tmp_path, tiny.documents(8))}
    told: list[str] = []

    def tell(done: float, total: float | None = None, unit: str = "", **metrics: Any) -> None:
        told.extend(filter(None, [metrics.get("memory_plan")]))

    (tmp_path / "output").mkdir()
    work = Work(tmp_path / "work", Runtime(device="cpu"), tell=tell)
    facts = STAGE.run(TrainConfig.model_validate({"max_steps": 1}), inputs, tmp_path / "output", work)
    assert told[0].startswith("memory plan: micro-batch 1, activations kept: about")
    costs = facts["memory_plan"]["costs"]
    narrow = facts["precision"] == "bf16"  # weights of two bytes, what they lack beside the optimizer's two averages
    gradient, state = (2, 2 + 8) if narrow else (4, 8)
    assert (costs["gradients"], costs["optimizer"]) == (
        gradient * facts["trained_weights"],
        state * facts["trained_weights"],
    )
    assert costs["token"]["full"] < costs["token"]["selective"] < costs["token"]["none"]


@pytest.mark.parametrize(("kind", "keeps_scores"), [("Llama", False), ("Gemma2", True)])
def test_long_documents_cost_more_where_attention_keeps_scores(tmp_path: Path, kind: str, keeps_scores: bool) -> None:
    folder = tiny.save(tmp_path / "model", f"{kind}Config")
    inputs = tiny.plan(tmp_path, tiny.documents(8))
    model = load(folder, TrainConfig(method="full", precision="fp32"), "cpu")
    bins = PackedBins(inputs["tokens"], inputs["plan"])

    def forward(tokens: int, trained: int) -> torch.Tensor:
        batch = collate([Bin(np.ones(n, np.int32), np.ones(n, np.int64), np.array([n])) for n in [tokens // 2] * 2])
        found: torch.Tensor = model(**model_inputs(batch), use_cache=False).logits.sum()
        return found

    short, long = (measure(model, forward, "sgd", "fp32", 1, longest=longest).token for longest in (16, 1016))
    heads, layers = model.config.num_attention_heads, model.config.num_hidden_layers
    more = long["none"] - short["none"]
    assert more > 4 * 1000 * heads * layers if keeps_scores else more == 0
    assert long["full"] - short["full"] < more if keeps_scores else long == short
    assert bins.longest == max(max(bins.document_lengths(number)) for number in range(len(bins)))


def kernel(folder: Path, available: int, held: int, limit: str = "max", used: int = 0, cached: int = 0) -> int:
    """Free memory in MiB, by files as Linux writes them."""
    proc, group = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True, exist_ok=True)
    group.mkdir(exist_ok=True)
    meminfo = {"MemTotal": 64 * 1024, "MemFree": 500, "MemAvailable": available, "Buffers": 700, "Cached": 12000}
    lines = [f"{name + ':':<16}{size * 1024:>8} kB" for name, size in meminfo.items()]
    (proc / "meminfo").write_text("\n".join([*lines, "HugePages_Total:       0"]) + "\n")
    told = f"Name:\tpython\nGroups:\t \nVmRSS:\t  999999 kB\nRssAnon:\t{held * 1024:>8} kB\nRssFile:\t  1504 kB\n"
    (proc / "self/status").write_text(told)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used * 2**20}\n")
    stat = {"anon": held, "file": cached, "inactive_anon": 1, "inactive_file": cached - cached // 4}
    stat["active_file"] = cached // 4
    (group / "memory.stat").write_text("".join(f"{name} {size * 2**20}\n" for name, size in stat.items()))
    return free_memory(proc, group) // 2**20


def test_the_weights_that_are_loaded_already_leave_as_much_room_as_before(tmp_path: Path) -> None:
    before = kernel(tmp_path, available=40_000, held=500)
    assert kernel(tmp_path, available=40_000 - 14_000, held=500 + 14_000) == before == 40_500


def test_a_container_that_has_just_copied_a_model_has_room(tmp_path: Path) -> None:
    limit = str(32 * 2**30)
    full = {"used": 32 * 1024 - 100, "cached": 16_000}
    assert kernel(tmp_path, available=60_000, held=500, limit=limit, **full) == 100 + 16_000 + 500
    assert kernel(tmp_path, available=9_000, held=500, limit=limit, **full) == 9_500, "the machine has less"
    assert kernel(tmp_path, available=60_000, held=500, limit=limit, used=32 * 1024 - 100) == 600


def test_this_machine_has_memory() -> None:
    """Whatever its kernel's files look like."""
    assert 2**20 < free_memory() < 2**60


@pytest.mark.gpu
def test_memory_that_runs_out_is_planned_smaller_and_the_losses_stay(tmp_path: Path) -> None:
    """The allocator refuses what the device would still have, which the plan does not know of."""
    import torch

    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "head_dim": 128}
    inputs = {
        "model": tiny.save(tmp_path / "model", "LlamaConfig", max_position_embeddings=4096, **sizes),
        **tiny.plan(tmp_path, tiny.documents(3000), sequence_length=4096, global_batch=4),
    }
    config = {"method": "full", "max_steps": 3, "precision": "bf16"}
    peaks = {}
    for rows in (2, 4):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        peaks[rows], plain = train_on_gpu(tmp_path / f"plain{rows}", inputs, config, rows)
        assert plain["notes"] == []
    assert peaks[2] < 0.7 * peaks[4]
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.85 * peaks[4] / whole)
    try:
        _, facts = train_on_gpu(tmp_path / "short", inputs, config, 4)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    (note,) = facts["notes"]
    assert re.match(r"the device ran out of memory in step 1: .*; went on with micro-batch 2, activations kept", note)
    assert facts["steps"] == 3
    assert facts["last_loss"] == pytest.approx(plain["last_loss"], rel=1e-2)


def train_on_gpu(folder: Path, inputs: dict[str, Path], config: dict[str, Any], rows: int) -> tuple[int, Facts]:
    """The peak of its memory, and the facts."""
    import torch

    (folder / "output").mkdir(parents=True)
    runtime = {"device": "cuda", "micro_batch": rows, "activation_checkpointing": "none", "compile": "never"}
    work = Work(folder / "work", Runtime.model_validate(runtime))
    facts = STAGE.run(TrainConfig.model_validate(config), inputs, folder / "output", work)
    return torch.cuda.max_memory_allocated(), facts


@pytest.mark.parametrize(
    ("shard", "weights", "others"),
    [("none", 4, 4), ("fsdp", 1, 1), ("zero2", 4 + 1, 1), ("zero3", 1 + 1, 1)],
)
def test_a_rank_of_four_holds_its_part(tmp_path: Path, shard: str, weights: int, others: int) -> None:
    """In quarters of the model; DeepSpeed keeps a copy of the part that a rank updates."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.llama(tmp_path))

    def forward(tokens: int, trained: int) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=torch.ones(1, tokens, dtype=torch.long)).logits.sum()
        return found

    quarter = sum(p.numel() for p in model.parameters())  # of float32: a byte of four
    costs = measure(model, forward, "adamw_torch_fused", "fp32", 4, shard)
    held = (costs.weights, costs.gradients, costs.optimizer)
    assert held == pytest.approx((weights * quarter, others * quarter, 2 * others * quarter), rel=0.01)


def test_an_average_of_the_weights_is_counted(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.llama(tmp_path))

    def forward(tokens: int, trained: int) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=torch.ones(1, tokens, dtype=torch.long)).logits.sum()
        return found

    without, with_it = (measure(model, forward, "sgd", "fp32", 1, averaged=each).optimizer for each in (False, True))
    assert with_it - without == 4 * sum(p.numel() for p in model.parameters())


def test_what_was_measured_can_be_forgotten(tmp_path: Path) -> None:
    """Or every rank that holds a part of the model would hold all of it beside that, until its process ends."""

    def measured() -> list[Any]:
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny.llama(tmp_path))

        def forward(tokens: int, trained: int) -> torch.Tensor:
            found: torch.Tensor = model(input_ids=torch.ones(1, tokens, dtype=torch.long)).logits.sum()
            return found

        measure(model, forward, "adamw_torch_fused", "fp32", 1)
        return [weakref.ref(p) for p in model.parameters()]

    weights = measured()
    gc.collect()
    assert not any(weight() is not None for weight in weights)


def test_a_rank_gathers_layers_one_by_one_and_keeps_no_cast_of_all(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.llama(tmp_path, num_hidden_layers=16))

    def forward(tokens: int, trained: int) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            found: torch.Tensor = model(input_ids=torch.ones(1, tokens, dtype=torch.long)).logits.sum()
        return found

    cast, gathered = (measure(model, forward, "adamw_torch_fused", "bf16", 4, each).work for each in ("zero3", "fsdp"))
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    outside = sum(p.numel() for p in model.parameters()) - 16 * layer
    # Of 16 layers in 16 bits two remain, and of what lies outside; then gradients of one layer and the outside.
    assert cast - gathered == pytest.approx(2 * 14 * layer - 6 * layer - 6 * outside, rel=0.15)
