"""Whether a training was slower than the last one of its recipe, so that a regression shows in the run that has it."""

from stages.stage import Facts
from stages.store import Store

NOTICED = 0.9
"""Share of the last run's speed below which it is said."""


def last_facts(store: Store, recipe: str) -> Facts | None:
    """What the last training of a recipe recorded."""
    ref = store.read_ref(f"{recipe}/last")
    train = ref.document["stages"].get("train") if ref else None
    found = store.find("train", train["key"]) if train else None
    return found.facts if found else None


def slower(before: Facts | None, now: Facts) -> str | None:
    """What to say of a training that was slower than `before`, on as many of the same devices; in model FLOPs a second,
    which compare whatever the model, the lengths of rows and what trains."""
    if before is None or any(before.get(name) != now.get(name) for name in ("device_name", "ranks")):
        return None
    was, is_now = before.get("model_flops_per_second"), now.get("model_flops_per_second")
    if not was or not is_now or is_now >= NOTICED * was:  # trainings on completions have none
        return None
    return (
        f"slower than the last training of this recipe by {1 - is_now / was:.0%}: {is_now / 1e12:.3g} TFLOP/s "
        f"({now['tokens_per_second']:,.0f} tokens/s), before {was / 1e12:.3g} ({before['tokens_per_second']:,.0f})"
    )
