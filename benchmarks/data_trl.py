"""TRL's preparation: `python data_trl.py ROWS MODEL OUTPUT LENGTH MASKED`.

`SFTTrainer` prepares when it is made: it renders and tokenizes the rows, marks what trains (asked for with `MASKED`
yes), cuts them to `LENGTH` and packs them. Prints what came out as JSON; what it refuses goes to stderr.
"""

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    """Prepare, and count what came out."""
    rows, model, output, length, masked = sys.argv[1:]
    os.environ.update(HF_DATASETS_CACHE=f"{output}/cache", TOKENIZERS_PARALLELISM="true")

    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    started = time.perf_counter()
    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=load_dataset("json", data_files=rows, split="train"),
        args=SFTConfig(
            output_dir=output,
            max_length=int(length),
            packing=True,
            assistant_only_loss=masked == "yes",
            dataset_num_proc=2,
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
        ),
    )
    seconds = time.perf_counter() - started
    then, used = time.perf_counter(), time.process_time()
    packed = trainer.train_dataset
    tokens = sum(sum(map(len, batch["input_ids"])) for batch in packed.iter(1000))
    size = sum(Path(file["filename"]).stat().st_size for file in packed.cache_files)
    counting = {"counting": time.perf_counter() - then, "counting_cpu": time.process_time() - used}
    told = {"tokens": tokens, "bytes": size, "rows": len(packed), "seconds": seconds, **counting}
    print(json.dumps({**told, "columns": packed.column_names}))


if __name__ == "__main__":
    main()
