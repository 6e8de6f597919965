"""A LoRA layer's parts alone, compiled, on a GPU: `python -m benchmarks.train_lora 8b 16384`.

Milliseconds of a forward and backward pass of what an attention makes of its input (q, k and v) and of the feed-forward
layer, the median of `REPEATS`, with the fused operations and with PEFT's own layers.
"""

import argparse
import statistics
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks import train_input
from stages.train import lora_attention, lora_linear, lora_mlp

REPEATS = 20
TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


class Projections(nn.Module):
    """What an attention does with its input."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, keys = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, keys, bias=False) for _ in range(2))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)


def seconds(layer: Any, x: Tensor) -> float:
    """The median of a forward and a backward pass."""
    run: Any = torch.compile(layer)
    found: list[float] = []
    event: Any = torch.cuda.Event
    for _ in range(REPEATS + 3):
        begin, end = (event(enable_timing=True) for _ in range(2))
        begin.record()
        outs = run(x)
        outs = outs if isinstance(outs, tuple) else (outs,)
        torch.autograd.backward(outs, [each.detach() for each in outs])
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / 1000)
        x.grad = None
        layer.zero_grad()
    return statistics.median(found[3:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape")
    parser.add_argument("rows", type=int, nargs="+")
    parser.add_argument("--peft", action="store_true", help="PEFT's own layers")
    given = parser.parse_args()
    config = train_input.config(given.shape)
    torch.manual_seed(0)
    with torch.device("cuda"):
        net = nn.ModuleList([Projections(config), LlamaMLP(config)]).bfloat16()
        settings = LoraConfig(r=16, target_modules=TARGETS, init_lora_weights=False)
        model: Any = get_peft_model(net, settings, autocast_adapter_dtype=False).bfloat16()
    if not given.peft:
        lora_linear.quicken(model)
        assert (lora_mlp.quicken(model), lora_attention.quicken(model)) == (1, 1)
    where = torch.cuda.get_device_name()
    for rows in given.rows:
        x = torch.randn(1, rows, config.hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for name, layer in zip(("q, k, v", "feed-forward"), model.get_base_model(), strict=True):
            print(f"{given.shape} {rows} rows, {name}: {1000 * seconds(layer, x):.3f} ms, {where}", flush=True)


if __name__ == "__main__":
    main()
