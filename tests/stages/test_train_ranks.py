"""Several ranks compute what one does: the same losses, checkpoints that either goes on from, one clear end."""

import json
import os
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages import arithmetic
from stages.errors import UserError
from stages.runtime import Runtime
from stages.stage import Facts, Work
from stages.train import STAGE, TrainConfig, adamw, checkpoints, checks, run, speed, supervise, zero
from stages.train.ranks import Group, RankFailed, _judge
from tests.stages import tiny

CONFIG: dict[str, Any] = {"epochs": 3, "learning_rate": 1e-2, "precision": "fp32"}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 4}},
    "full": {},
    "16bit": {"optimizer": "adamw_16bit", "precision": "bf16"},
    "bf16": {"lora": {"rank": 4}, "precision": "bf16"},
    "pissa": {"lora": {"rank": 4, "init": "pissa_niter_16"}, "learning_rate": 1e-3},
}
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
on_two_gpus = [pytest.param("cuda", marks=[pytest.mark.gpu, needs_two_gpus])]
long_on_a_cpu = pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.full), *on_two_gpus])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Five steps of eight sequences and one of three, so that ranks also get unlike hands."""
    folder = tmp_path_factory.mktemp("ranks")
    rows = tiny.documents(43)
    return {"model": tiny.llama(folder / "model"), **tiny.plan(folder, rows, global_batch=8, packed=False)}


def train(
    folder: Path, inputs: dict[str, Path], tell: Any = None, method: str = "lora", **runtime: Any
) -> tuple[list[float], Facts]:
    output = folder / "output"
    output.mkdir(parents=True, exist_ok=True)
    settings = Runtime.model_validate({"device": "cpu", **runtime})
    work = Work(folder / "work", settings, **({"tell": tell} if tell else {}))
    given = {**CONFIG, "method": "lora" if "lora" in ADAPTERS[method] else "full", **ADAPTERS[method]}
    facts = STAGE.run(TrainConfig.model_validate(given), inputs, output, work)
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines], facts


def figures(folder: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (folder / "output" / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(one: Path, other: Path) -> None:
    """What two trainings wrote, up to the rounding of sums."""
    [file], [like] = ([*folder.joinpath("output").rglob("*.safetensors")] for folder in (one, other))
    found, wanted = load_file(file), load_file(like)
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-2, atol=1e-3)


def needs(shard: str) -> None:
    # Not imported here: the ranks do that, and what it says while they do is looked at.
    if shard in zero.STAGES and find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: pip install -c constraints.txt 'regrow[deepspeed]'")


def warn_after(step: int) -> Any:
    """A spot machine's warning, once a step's loss was told."""
    warned = []

    def tell(done: float, total: float | None = None, unit: str = "", **metrics: Any) -> None:
        if "loss" in metrics and done >= step and not warned:
            warned.append(done)
            os.kill(os.getpid(), signal.SIGTERM)

    return tell


def test_two_ranks_of_four_are_one_of_eight_and_one_goes_on_where_two_were_stopped(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    alone, _ = train(tmp_path / "alone", inputs, micro_batch=1)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "shared", inputs, warn_after(4), ranks=2, micro_batch=4)
    assert stopped.value.code == 75
    found, facts = train(tmp_path / "shared", inputs, micro_batch=8)
    assert 4 <= facts["resumed_at_step"] < 18 == len(found)
    assert found == pytest.approx(alone, rel=1e-5)


@pytest.mark.full
def test_a_warning_before_the_ranks_listen_suspends_them(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = supervise.launch

    def warned(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return launch(*given)

    monkeypatch.setattr(supervise, "launch", warned)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, inputs, ranks=2)
    assert stopped.value.code == 75


@long_on_a_cpu
def test_ranks_stop_together_before_a_step_is_left_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], device: str
) -> None:
    """On a GPU one that still gathers from another that ended would never end."""
    model = AutoModelForCausalLM.from_pretrained(tiny.llama(tmp_path / "model"))
    with torch.no_grad():
        model.get_input_embeddings().weight[60] = float("nan")
    model.save_pretrained(tmp_path / "model")
    rows = [[5 + 4 * n + i for i in range(4)] for n in range(8)]
    rows[4] = [58, 59, 60, 61]
    poisoned = {"model": tmp_path / "model", **tiny.plan(tmp_path, rows, global_batch=2, packed=False)}
    settings = Runtime.model_validate({"device": device, "ranks": 2, "shard": "fsdp", "save_seconds": 1e-9})
    config = TrainConfig.model_validate({**CONFIG, "epochs": 1, "on_spike": "rollback"})
    (tmp_path / "output").mkdir()
    facts = STAGE.run(config, poisoned, tmp_path / "output", Work(tmp_path / "work", settings))
    [left_out] = facts["left_out_steps"]
    assert figures(tmp_path, "step") == [step for step in range(1, 5) if step != left_out["step"]]
    assert facts["resumed_at_step"] == left_out["step"] - 1
    assert "Traceback" not in "".join(capfd.readouterr())


def test_all_ranks_go_on_from_the_checkpoint_that_the_first_one_found(tmp_path: Path) -> None:
    class Second(Group):
        def agree(self, value: int) -> int:
            return 2

    for step in (2, 4):
        (tmp_path / "aside").mkdir()
        (tmp_path / "aside" / "file").write_text("")
        checkpoints.publish(tmp_path / "aside", tmp_path / "checkpoints", step)
    found, _ = run._newest(tmp_path / "checkpoints", 3, Second(1, 2))
    assert found == tmp_path / "checkpoints" / "2"
    assert (tmp_path / "checkpoints" / "4").exists(), "the first rank removes it"


@long_on_a_cpu
def test_a_start_that_is_drawn_is_the_same_where_a_sharded_model_is_written(
    tmp_path: Path, inputs: dict[str, Path], device: str
) -> None:
    """What is written is the change since that start."""
    both = {"method": "pissa", "micro_batch": 1, "device": device}
    alone, _ = train(tmp_path / "alone", inputs, ranks=1, **both)
    found, _ = train(tmp_path / "shared", inputs, ranks=2, shard="fsdp", **both)
    assert found == pytest.approx(alone, rel=1e-5 if device == "cpu" else 1e-3)
    [one], [other] = (
        [*map(load_file, (tmp_path / n).joinpath("output").rglob("*.safetensors"))] for n in ("alone", "shared")
    )
    for name in (n for n in one if "lora_A" in n):
        pair = [each[name.replace("lora_A", "lora_B")] @ each[name] for each in (one, other)]
        torch.testing.assert_close(*pair, rtol=1e-2, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("method", ["16bit", "bf16"])
def test_a_model_sharded_in_16_bits_learns_what_one_rank_does(
    tmp_path: Path, inputs: dict[str, Path], method: str
) -> None:
    alone, _ = train(tmp_path / "alone", inputs, method=method, micro_batch=1)
    found, facts = train(tmp_path / "shared", inputs, method=method, ranks=2, micro_batch=1, shard="fsdp")
    assert facts["speed"].get("fused_adapters", 0) == (14 if method == "bf16" and arithmetic.cpu_has_bf16() else 0)
    assert found == pytest.approx(alone, rel=3e-2)
    assert found[-1] < 0.9 * found[0], "or nothing was learned"


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_compiled_layers_of_a_sharded_model_compute_what_others_do(
    tmp_path: Path, inputs: dict[str, Path], checkpointing: str
) -> None:
    shared = {"method": "16bit", "ranks": 2, "micro_batch": 1, "shard": "fsdp"}
    plain, _ = train(tmp_path / "plain", inputs, compile="never", **shared)
    runtime = {"compile": "always", "activation_checkpointing": checkpointing}
    found, facts = train(tmp_path / "compiled", inputs, **shared, **runtime)
    assert facts["speed"]["compiled_layers"] == 2
    assert found == pytest.approx(plain, rel=1e-2)


@pytest.mark.full
@pytest.mark.parametrize("shard", ["fsdp", "zero2", "zero3"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_sharded_model_goes_on_where_one_rank_was_stopped_and_back(
    tmp_path: Path, inputs: dict[str, Path], method: str, shard: str
) -> None:
    needs(shard)
    alone, _ = train(tmp_path / "alone", inputs, method=method, micro_batch=1)
    with pytest.raises(SystemExit):
        train(tmp_path / "shared", inputs, warn_after(3), method=method, micro_batch=1)
    with pytest.raises(SystemExit):
        train(tmp_path / "shared", inputs, warn_after(8), method=method, ranks=2, micro_batch=1, shard=shard)
    found, facts = train(tmp_path / "shared", inputs, method=method, ranks=2, micro_batch=1, shard=shard)
    assert (facts["ranks"], facts["shard"]) == (2, shard)
    assert facts["resumed_at_step"] >= 8
    assert found == pytest.approx(alone, rel=1e-5)
    norms = figures(tmp_path / "alone", "grad_norm")
    assert figures(tmp_path / "shared", "grad_norm") == pytest.approx(norms, rel=1e-3)
    assert_same_weights(tmp_path / "shared", tmp_path / "alone")


@pytest.mark.full
@pytest.mark.parametrize("begun", ["zero2", "zero3"])
def test_what_deepspeed_began_goes_on_in_another_way_and_on_one_rank(
    tmp_path: Path, inputs: dict[str, Path], begun: str, capfd: pytest.CaptureFixture[str]
) -> None:
    needs(begun)
    alone, _ = train(tmp_path / "alone", inputs, micro_batch=1)
    with pytest.raises(SystemExit):
        train(tmp_path / "shared", inputs, warn_after(3), ranks=2, micro_batch=1, shard=begun)
    with pytest.raises(SystemExit):
        train(tmp_path / "shared", inputs, warn_after(8), ranks=2, micro_batch=1, shard="fsdp")
    found, facts = train(tmp_path / "shared", inputs, micro_batch=1)
    assert facts["resumed_at_step"] >= 8
    assert found == pytest.approx(alone, rel=1e-5)
    assert_same_weights(tmp_path / "shared", tmp_path / "alone")
    said = "".join(capfd.readouterr()).lower()
    assert "memory plan" in said
    assert "deepspeed" not in said


@pytest.mark.parametrize("shard", ["zero2", "zero3"])
def test_deepspeed_that_is_not_installed_is_told_with_the_extra_before_anything_is_read(
    tmp_path: Path, inputs: dict[str, Path], shard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    broken = {**inputs, "model": tmp_path / "none"}
    with pytest.raises(UserError, match=rf"shard is {shard}, which needs DeepSpeed: pip install 'regrow\[deepspeed\]'"):
        train(tmp_path, broken, ranks=2, shard=shard)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantize": "nf4"}, "train.quantize and sharded ranks"),
        ({"ema": 0.9}, "train.ema and sharded ranks"),
        ({"evaluate_every": 5, "keep": "best"}, "train.keep: best and sharded ranks"),
        ({"method": "full", "full": {"lisa": {}}}, "train.full.lisa and sharded ranks"),
        ({"lora": {"restart_every": 5}}, "train.lora.restart_every and sharded ranks"),
        ({"precision": "fp8"}, "train.precision: fp8 and sharded ranks"),
        ({"objective": "kto"}, "train.objective: kto and sharded ranks"),
        ({"optimizer": "adafactor", "ema": 0.9}, "train.ema, train.optimizer: adafactor and sharded ranks"),
    ],
)
def test_what_sharded_ranks_cannot_train_is_refused_before_anything_is_read(
    tmp_path: Path, inputs: dict[str, Path], config: dict[str, Any], said: str
) -> None:
    work = Work(tmp_path / "work", Runtime(device="cpu", ranks=2, shard="fsdp"))
    path = inputs["plan"] / "plan.json"
    kind = "unpaired_preference" if config.get("objective") == "kto" else "conversation"
    path.write_text(json.dumps({**json.loads(path.read_text()), "kind": kind}))
    with pytest.raises(UserError, match=f"{said} do not go together yet: set the runtime's shard to none"):
        broken = {**inputs, "model": tmp_path / "none"}
        STAGE.run(TrainConfig.model_validate(config), broken, tmp_path / "output", work)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"precision": "fp16"}, r"fp16 and the runtime's shard zero2 do not go together: set .* to bf16"),
        ({"evaluate_every": 5}, r"evaluate_every and the runtime's shard zero2 do not go together yet: set shard to"),
    ],
)
def test_what_is_not_for_deepspeed(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        checks.refuse_sharded(TrainConfig.model_validate(config), "zero2")


@long_on_a_cpu
@pytest.mark.parametrize("method", ["bf16", "16bit"])
def test_sharded_ranks_find_the_held_out_loss_that_one_finds(tmp_path: Path, device: str, method: str) -> None:
    """Of three sequences, so that a rank has one less; in the middle and at the end. What is written right after a look
    is whole, and not what the look had gathered in 16 bits."""
    rows = tiny.documents(43)
    inputs = {
        "model": tiny.llama(tmp_path / "model"),
        **tiny.plan(tmp_path, rows, global_batch=8, packed=False, heldout=3),
    }
    looks = {}
    for name, ranks in (("alone", {"ranks": 1}), ("shared", {"ranks": 2, "shard": "fsdp"})):
        runtime = Runtime.model_validate({"device": device, "micro_batch": 1, **ranks})
        settings = {**CONFIG, **ADAPTERS[method], "method": "lora" if "lora" in ADAPTERS[method] else "full"}
        config = TrainConfig.model_validate({**settings, "epochs": 2, "evaluate_every": 4, "patience": 9})
        (tmp_path / name / "output").mkdir(parents=True)
        work = Work(tmp_path / name / "work", runtime)
        facts = STAGE.run(config, inputs, tmp_path / name / "output", work)
        looks[name] = facts["heldout"]["looks"]
    alone, shared = looks["alone"], looks["shared"]
    assert [look["step"] for look in shared] == [look["step"] for look in alone] == [4, 8, 10]
    assert [look["loss"] for look in shared] == pytest.approx([look["loss"] for look in alone], rel=1e-2)
    assert shared[-1]["loss"] < 0.9 * shared[0]["loss"], "or nothing was learned"
    weights = [load_file(next((tmp_path / name / "output").rglob("*.safetensors"))) for name in ("alone", "shared")]
    assert {name: weight.dtype for name, weight in weights[1].items()} == {n: w.dtype for n, w in weights[0].items()}
    exact = [weight for weight in weights[1].values() if weight.dtype == torch.float32]
    assert not exact or any((weight != weight.bfloat16().float()).any() for weight in exact)


@pytest.mark.full
def test_what_one_rank_refuses_is_told_once_and_ends_all(tmp_path: Path, inputs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"^the model cannot be loaded"):
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "config.json").write_text("{}")
        train(tmp_path, {**inputs, "model": tmp_path / "broken"}, ranks=2)


def test_a_rank_that_the_driver_holds_is_told_unless_another_says_what_is_wrong() -> None:
    done = {"event": "done", "facts": {}}
    for last in ([done, done], [{"event": "out_of_memory"}, {}]):
        with pytest.raises(
            RankFailed, match=r"rank 1 has not ended 60 seconds after SIGKILL: its GPU's driver holds it"
        ):
            _judge(last, [0, None], [1])
    with pytest.raises(UserError, match="no such key"):
        _judge([{"event": "refused", "message": "no such key"}, {}], [1, None], [1])


def test_what_is_gathered_in_float32_is_trained_in_it(tmp_path: Path) -> None:
    """Of models of which transformers holds some weights in float32; a bfloat16 weight would lose small updates."""
    made: Any = AutoModelForCausalLM.from_pretrained(tiny.llama(tmp_path, dtype="bfloat16"))
    made._keep_in_fp32_modules = ["norm"]
    speed.hold(made, TrainConfig.model_validate({"method": "full", "precision": "bf16"}), "fsdp")
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    assert not adamw.is_split(made)


@long_on_a_cpu
def test_the_rank_that_was_killed_is_the_one_that_is_named(
    tmp_path: Path, inputs: dict[str, Path], device: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """And not one that it left behind, which knows only that the other is gone, or waits for it in a kernel."""
    killed = []

    def tell(done: float, total: float | None = None, unit: str = "", **metrics: Any) -> None:
        if "loss" in metrics and not killed:
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            ranks = [int(pid) for pid in children if b"stages.train.ranks" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            killed.append(max(ranks))
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(RankFailed, match=r"^rank 1 ended with SIGKILL$"):
        train(tmp_path, inputs, tell, ranks=2, micro_batch=4, device=device)
    assert device == "cpu" or "Traceback" not in "".join(capfd.readouterr())


def test_more_ranks_than_sequences_a_step_are_refused(tmp_path: Path, inputs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="9 ranks, but a step has only 8 sequences"):
        train(tmp_path, inputs, ranks=9)


@pytest.mark.gpu
@needs_two_gpus
@pytest.mark.parametrize("shard", ["none", "fsdp", "zero2", "zero3"])
@pytest.mark.parametrize("method", ["lora", "full", "16bit", "bf16"])
def test_two_gpus_compute_what_one_does_and_one_goes_on_where_they_stopped(
    tmp_path: Path, inputs: dict[str, Path], method: str, shard: str
) -> None:
    needs(shard)
    alone, _ = train(tmp_path / "alone", inputs, method=method, device="cuda", ranks=1, micro_batch=1)
    together, facts = train(tmp_path / "together", inputs, method=method, device="cuda", ranks=2, shard=shard)
    assert (facts["ranks"], facts["shard"]) == (2, shard)
    near = 3e-2 if method in ("16bit", "bf16") else 1e-3
    assert together == pytest.approx(alone, rel=near)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "shared", inputs, warn_after(4), method=method, device="cuda", ranks=2, shard=shard)
    assert stopped.value.code == 75
    found, facts = train(tmp_path / "shared", inputs, method=method, device="cuda", ranks=1)
    assert 4 <= facts["resumed_at_step"] < 18 == len(found)
    assert found == pytest.approx(alone, rel=near)


@pytest.mark.gpu
@needs_two_gpus
def test_no_rank_ends_while_another_still_gathers_from_it(tmp_path: Path) -> None:
    """Which takes a while with half a billion weights, when a training is suspended and when it is done."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    model = tiny.llama(tmp_path / "model", dtype="bfloat16", initializer_range=0.02, **sizes, **heads)
    inputs = {"model": model, **tiny.plan(tmp_path, tiny.documents(43), global_batch=8, packed=False)}
    runtime = {"device": "cuda", "ranks": 2, "shard": "fsdp"}
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "shared", inputs, warn_after(4), method="16bit", **runtime)
    assert stopped.value.code == 75
    found, facts = train(tmp_path / "shared", inputs, method="16bit", **runtime)
    assert 4 <= facts["resumed_at_step"] < 18 == len(found)
