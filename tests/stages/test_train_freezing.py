"""What trains: Spectrum by its formula, LISA's draws, and noise on embeddings that packing does not change."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from stages.errors import UserError
from stages.train import Full, Lisa, TrainConfig, freezing, heldout, neftune
from tests.stages import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("model"), num_hidden_layers=4)


def test_signal_to_noise_is_the_formula() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 60) * 0.1 + 3 * torch.outer(torch.randn(40), torch.randn(60)) / 10
    values = np.linalg.svd(weight.numpy(), compute_uv=False)
    sigma = (np.quantile(values, 0.75) - np.quantile(values, 0.25)) / 1.349
    bound = sigma * (1 + math.sqrt(40 / 60))
    expected = values[values > bound].sum() / values[values <= bound].sum() / values.max()
    assert freezing.signal_to_noise(weight) == pytest.approx(expected, rel=1e-4)
    assert freezing.signal_to_noise(torch.stack([weight, weight])) == pytest.approx(expected, rel=1e-4)


def test_spectrum_picks_the_layers_with_most_signal_of_each_kind(folder: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(folder)
    freezing.freeze(network, Full(spectrum=0.5, freeze=("lm_head",)))
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert "model.embed_tokens.weight" in trained and "lm_head.weight" not in trained
    assert not [name for name in trained if "norm" in name]
    for kind in ("self_attn.q_proj", "mlp.down_proj"):
        names = [f"model.layers.{i}.{kind}.weight" for i in range(4)]
        by_signal = sorted(names, key=lambda n: -freezing.signal_to_noise(network.get_parameter(n).detach()))
        assert trained & set(names) == set(by_signal[:2])


def test_nothing_left_to_train_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="no weight is left to train"):
        freezing.freeze(AutoModelForCausalLM.from_pretrained(folder), Full(freeze=("model", "lm_head")))


def test_lisa_draws_anew_and_forgets_what_rests(folder: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(network.parameters())
    lisa = freezing.LayerSampling(network, Lisa(layers=2, every=3), 0, optimizer)
    draws = [lisa.drawn(step) for step in range(60)]
    assert all(len(drawn) == 2 for drawn in draws)
    assert [draws[3 * i] for i in range(20)] == [draws[3 * i + 2] for i in range(20)]
    assert set().union(*draws) == {0, 1, 2, 3}
    ids = torch.arange(5, 20)[None]
    for step in range(6):
        lisa.before(step)
        network(ids, labels=ids).loss.backward()
        for number, layer in enumerate(network.model.layers):
            assert all((p.grad is not None) == (number in draws[step]) for p in layer.parameters())
        optimizer.step()
        optimizer.zero_grad()
        lisa.after(step + 1)
        assert all(p.requires_grad for p in network.parameters())
        held = {
            n for n, layer in enumerate(network.model.layers) if any(p in optimizer.state for p in layer.parameters())
        }
        assert held <= draws[step + 1]
    with pytest.raises(UserError, match="layers is 5, but the model has 4"):
        freezing.LayerSampling(network, Lisa(layers=5), 0, optimizer)


@pytest.mark.parametrize(
    ("config_name", "sizes"),
    [
        ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
        ("GPTBigCodeConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
        ("GPTNeoXConfig", {}),
        ("GPTNeoConfig", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    ],
)
def test_noise_comes_where_a_model_hands_its_token_ids_on_by_position(
    tmp_path: Path, config_name: str, sizes: dict[str, Any]
) -> None:
    network: Any = AutoModelForCausalLM.from_pretrained(tiny.save(tmp_path, config_name, **sizes))
    neftune.add_noise(network, 5.0)
    ids, boundaries = torch.arange(5, 29)[None], torch.tensor([0, 4, 24], dtype=torch.int32)
    one, other = (network.train()(input_ids=ids, cu_seq_lens_q=boundaries).logits for _ in range(2))
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("config_name", "sizes"), [("LlamaConfig", {}), ("ModernBertDecoderConfig", {"cls_token_id": 1, "sep_token_id": 2})]
)
def test_noise_has_the_papers_size_for_every_document(tmp_path: Path, config_name: str, sizes: dict[str, Any]) -> None:
    network: Any = AutoModelForCausalLM.from_pretrained(tiny.save(tmp_path, config_name, **sizes))
    clean = network.get_input_embeddings().weight.detach().clone()
    neftune.add_noise(network, 5.0)
    lengths = [4, 60]
    ids = torch.arange(64)[None] % 60
    seen = []
    network.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    boundaries = torch.tensor([0, 4, 64], dtype=torch.int32)
    network.train()
    for _ in range(20):
        network(input_ids=ids, cu_seq_lens_q=boundaries)
    noise = torch.stack([found[0] - clean[ids[0]] for found in seen])
    parts = torch.split(noise, lengths, dim=1)
    for part, length in zip(parts, lengths, strict=True):
        bound = 5.0 / math.sqrt(length * clean.shape[1])
        assert 0.95 * bound < part.abs().max() <= bound * (1 + 1e-5)
        assert float(part.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    network.eval()
    network(input_ids=ids, cu_seq_lens_q=boundaries)
    assert torch.equal(seen[-1][0], clean[ids[0]])


def test_noise_of_a_document_of_two_thousand_million_numbers_has_a_size() -> None:
    lengths = neftune.document_lengths(torch.tensor([0, 262_144], dtype=torch.int32), 262_144)
    assert neftune.noise_size(5.0, lengths, 8192)[0].item() == pytest.approx(5.0 / math.sqrt(2.0**31))


@settings(max_examples=30)
@given(losses=st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0]), min_size=1, max_size=12), patience=st.integers(1, 4))
def test_patience_counts_looks_since_the_best(losses: list[float], patience: int) -> None:
    config = TrainConfig.model_validate({"evaluate_every": 1, "patience": patience, "keep": "best"})
    layer = torch.nn.Linear(1, 1, bias=False)
    given = iter(losses)
    looks = heldout.Looks(layer, config, None, 1, len(losses), lambda: next(given), None, lambda step, loss: None)
    done = 0
    for step in range(1, len(losses) + 1):
        torch.nn.init.constant_(layer.weight, step)
        looks.after(step)
        done = step
        if looks.stop:
            break
    best = losses.index(min(losses[:done]))
    stops = next((n for n in range(len(losses)) if n - losses.index(min(losses[: n + 1])) >= patience), None)
    assert done == (stops + 1 if stops is not None else len(losses))
    looks.finish()
    assert layer.weight.item() == best + 1


@pytest.mark.parametrize(
    ("losses", "best", "written", "stopped"),
    [
        ([math.nan, 2.0, 1.0, 3.0], 3, 3, False),
        ([math.nan, math.inf, math.nan], 2, 2, False),
        ([3.0, math.nan, 2.0], 3, 3, False),
        ([1.0, math.nan, math.nan], 1, 1, True),
        ([math.nan, math.nan, math.nan], 1, 3, True),
    ],
)
def test_a_loss_that_is_no_number_is_never_the_best(
    losses: list[float], best: int, written: int, stopped: bool
) -> None:
    config = TrainConfig.model_validate({"evaluate_every": 1, "patience": 2, "keep": "best"})
    layer = torch.nn.Linear(1, 1, bias=False)
    given = iter(losses)
    looks = heldout.Looks(layer, config, None, 1, len(losses), lambda: next(given), None, lambda step, loss: None)
    for step in range(1, len(losses) + 1):
        torch.nn.init.constant_(layer.weight, step)
        looks.after(step)
    assert (looks.record["best_step"], looks.record["written_step"], looks.stop) == (best, written, stopped)
    looks.finish()
    assert layer.weight.item() == written
