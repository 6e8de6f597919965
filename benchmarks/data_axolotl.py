"""Axolotl's `preprocess`, in Axolotl's own environment: `python data_axolotl.py ROWS MODEL OUTPUT LENGTH`.

The command itself, as `axolotl preprocess CONFIG` runs it, without the download of the model. Prints what came out.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ.update(AXOLOTL_DO_NOT_TRACK="1", AXOLOTL_IS_PREPROCESS="1", AXOLOTL_DATASET_NUM_PROC="2")


def main() -> None:
    """Prepare, and count what came out."""
    rows, model, output, length = sys.argv[1:]
    Path(output).mkdir(parents=True, exist_ok=True)
    config = {
        "base_model": model,
        "tokenizer_type": "AutoTokenizer",
        "datasets": [{"path": rows, "ds_type": "json", "type": "chat_template", "roles_to_train": ["assistant"]}],
        "chat_template": "tokenizer_default",
        "eot_tokens": ["<|im_end|>"],
        "dataset_prepared_path": f"{output}/prepared",
        "dataset_num_proc": 2,
        "output_dir": f"{output}/out",
        "sequence_len": int(length),
        "sample_packing": True,
        "pad_to_sequence_len": True,
        "attn_implementation": "flash_attention_2",
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "learning_rate": 1e-4,
        "optimizer": "adamw_torch",
        "val_set_size": 0,
        "bf16": False,
    }
    path = Path(output) / "config.yaml"
    path.write_text(json.dumps(config))
    sys.argv = sys.argv[:1]

    from axolotl.cli.preprocess import do_cli

    started = time.perf_counter()
    do_cli(str(path), download=False)
    seconds = time.perf_counter() - started

    then, used = time.perf_counter(), time.process_time()
    from datasets import load_from_disk

    (prepared,) = (folder for folder in Path(output, "prepared").iterdir() if folder.is_dir())
    made = load_from_disk(str(prepared))
    tokens = sum(sum(map(len, batch["input_ids"])) for batch in made.iter(1000))
    trained = sum(sum(label != -100 for row in batch["labels"] for label in row) for batch in made.iter(1000))
    size = sum(file.stat().st_size for file in prepared.rglob("*") if file.is_file())
    counting = {"counting": time.perf_counter() - then, "counting_cpu": time.process_time() - used}
    told = {"tokens": tokens, "trained": trained, "bytes": size, "rows": len(made), "seconds": seconds, **counting}
    print(json.dumps({**told, "columns": made.column_names}))


if __name__ == "__main__":
    main()
