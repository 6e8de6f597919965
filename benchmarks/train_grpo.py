"""What reinforcement learning teaches, and in which time: `python -m benchmarks.train_grpo [RECIPE] [KEY=VALUE …]`.

Runs a recipe's stages up to merge in a store of their own, then asks the model before and after training the held-out
questions of its first task (greedy answers, exact match). Prints the reward and the length of completions over the
steps, both accuracies with their 95 % intervals, and the seconds that training took.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from flows.execute import execute
from flows.recipe import load
from flows.run import Run, start
from stages import evals, generation
from stages.evals import Options
from stages.intervals import wilson
from stages.runtime import from_environment
from stages.store import open_store

POINTS = 20
"""Rows of the curve."""


def accuracy(run: Run, model: Path) -> str:
    """Of a model on the held-out rows."""
    name, task = next(iter(run.loaded.recipe.evaluate.tasks.items()))
    data = run.store.view(run.artifacts["fetch"].tree.folder("data")) / task.source
    lines = [line for path in sorted(data.rglob("*.jsonl")) for line in path.read_text().splitlines()]
    options = Options(question=task.question, answer=task.answer)
    exact = evals.load("exact_match")
    examples = exact.examples([(f"row {i}", json.loads(line)) for i, line in enumerate(lines)], options)
    loaded = generation.load(model, "bf16", "auto")
    prompts = [loaded.prompt(example.question) for example in examples]
    answers = generation.generate(loaded, prompts, task.max_new_tokens, (), 128, lambda _: None)
    right = int(sum(exact.score(example, answer, options) for example, answer in zip(examples, answers, strict=True)))
    share = wilson(right, len(examples))
    return f"{name}: {right}/{len(examples)} = {share.value:.1%} [{share.low:.1%}, {share.high:.1%}]"


def main() -> None:
    recipe = sys.argv[1] if len(sys.argv) > 1 else "configs/grpo.yaml"
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(REGROW_STORE=f"{folder}/store", REGROW_CACHE=f"{folder}/cache")
        runtime = from_environment()
        run = start(load(Path(recipe), sys.argv[2:]), runtime, open_store(runtime.store, runtime.cache))
        for stage in ("fetch", "convert", "tokenize", "pack"):
            execute(run, stage)
        base = run.store.view(run.artifacts["fetch"].tree.folder("model"))
        print("before", accuracy(run, base), flush=True)
        began = time.perf_counter()
        trained = execute(run, "train").artifact
        print(f"train stage: {time.perf_counter() - began:.0f} s", flush=True)
        lines = (run.store.view(trained.tree) / "metrics.jsonl").read_text().splitlines()
        every = max(1, len(lines) // POINTS)
        for first in range(0, len(lines), every):
            some = [json.loads(line) for line in lines[first : first + every]]
            means = {
                name: sum(each[name] for each in some) / len(some)
                for name in ("reward", "completion_length", "equal_groups", "clip_fraction", "vllm_difference")
                if name in some[0]
            }
            shown = "  ".join(f"{name} {mean:.3f}" for name, mean in means.items())
            print(f"steps {first + 1:4}-{first + len(some):4}  {shown}", flush=True)
        print(json.dumps(dict(trained.facts)), flush=True)
        merged = run.store.view(execute(run, "merge").artifact.tree)
        print("after ", accuracy(run, merged), flush=True)


if __name__ == "__main__":
    main()
