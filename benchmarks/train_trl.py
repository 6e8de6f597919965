"""Speed of TRL's SFTTrainer on the same input: `python -m benchmarks.train_trl 8b lora --rows 2`.

Its best settings: packing bfd, Liger's kernels beside TRL's own loss head, bfloat16, fused AdamW, and a variable-length
attention kernel handed to it: torch's, or the one that our own side takes (`--attention regrow`: flash-attn's if it
is installed, or our own on Hopper); or SDPA, where it falls without flash-attn.
"""

import argparse
import tempfile
import time
from typing import Any

from benchmarks import train_input

EVERY = 5
"""Steps between two logs, at which TRL waits for the device: a rate is that of so many steps, without the first."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape")
    parser.add_argument("method", choices=["full", "lora"])
    parser.add_argument("--attention", default="torch", choices=["torch", "regrow", "sdpa"])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--global-batch", type=int, default=4)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no-liger", action="store_true")
    parser.add_argument("--nf4", action="store_true")
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--sequence", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=15)
    given = parser.parse_args()

    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    from packing.attention import implementation

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = (given.steps + 1) * given.global_batch * given.sequence
    rows, starts = train_input.documents(given.shape, tokens, given.sequence, given.share)
    data = Dataset.from_list(
        [{"input_ids": row, "labels": [-100] * start + row[start:]} for row, start in zip(rows, starts, strict=True)]
    )
    kernels = {"torch": implementation(device, kernel="torch"), "regrow": implementation(device), "sdpa": "sdpa"}
    attention = kernels[given.attention]
    model = train_input.model(given.shape, device, attn_implementation=attention)
    if given.nf4:
        train_input.to_nf4(model)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
    )

    ends: list[float] = []
    sizes: list[int] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                ends.append(time.perf_counter())
                sizes.append(int(logs["num_tokens"]))

    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.SFTConfig(
            output_dir=folder,
            max_length=given.sequence,
            packing=True,
            per_device_train_batch_size=given.rows,
            gradient_accumulation_steps=given.global_batch // given.rows,
            max_steps=given.steps,
            learning_rate=2e-4,
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            gradient_checkpointing=given.checkpointing,
            torch_compile=given.compile,
            use_liger_kernel=device == "cuda" and not given.no_liger,
            optim="adamw_torch_fused",
            logging_steps=EVERY,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_num_workers=1,
        )
        trainer = trl.SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
            if given.method == "lora"
            else None,
            callbacks=[Watch()],
        )
        trainer.train()
    rates = sorted((sizes[i] - sizes[i - 1]) / (ends[i] - ends[i - 1]) for i in range(1, len(ends)))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    settings = [f"attention {attention}", f"rows {given.rows} x {given.global_batch // given.rows}"]
    settings += [name for name in ("checkpointing", "compile", "no_liger", "nf4") if getattr(given, name)]
    print(
        f"TRL  {given.shape} {given.method} {', '.join(settings)} share {given.share}: "
        f"{rates[len(rates) // 2]:,.0f} tok/s [{rates[0]:,.0f}-{rates[-1]:,.0f}], peak {peak:.1f} GiB, {where}",
        flush=True,
    )


if __name__ == "__main__":
    main()
