"""The learning rate of every step, as a share of the recipe's.

Counted so that no step has a learning rate of zero: the warmup's zero lies before the first step, and the end of a
fall after the last.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.train import TrainConfig


def steps_in(share: float, steps: int) -> int:
    """That many times `steps`, rounded up. As floats 0.07 * 100 is a little over 7, which is not 8 steps."""
    return math.ceil(share * steps * (1 - 1e-12))


def steps_of(share_or_steps: float, total: int) -> int:
    """A number of steps: below 1 a share of `total`, rounded up, else steps."""
    return steps_in(share_or_steps, total) if share_or_steps < 1 else int(share_or_steps)


def unreached(config: "TrainConfig", total: int) -> str | None:
    """What to tell about a schedule whose warmup, and in wsd its fall, do not fit into the steps, so that none has the
    recipe's learning rate, or whose restarts follow one another faster than they warm up; None where they do."""
    restarts, ramp = config.lora.restart_every, config.lora.restart_warmup
    if restarts is not None and restarts < min(ramp, total):
        return (
            f"after a restart no step has more than {100 * restarts / ramp:.0f} % of its learning rate: "
            f"lora.restart_warmup is {ramp}, and it restarts every {restarts} steps"
        )
    warmup = steps_of(config.warmup, total)
    fall = steps_of(config.decay, total) if config.schedule == "wsd" and config.decay != 1 else 0
    if warmup < 2 or warmup + fall <= total:
        return None
    share = multiplier(config, total)
    most = max(share(min(step, total) - 1) for step in (warmup - 1, warmup))
    falls = f" and a fall over {fall:,}" if fall else ""
    return (
        f"no step has the whole train.learning_rate, the most is {100 * most:.0f} % of it: a warmup over {warmup:,} "
        f"steps{falls} does not fit into {total:,}"
    )


def multiplier(config: "TrainConfig", total: int) -> Callable[[int], float]:
    """From a step's number (0 to `total` - 1) to its share of the learning rate, for torch's LambdaLR.

    The warmup is (s + 1) / warmup. After it, with p rising from 0 to 1: cosine is (1 + cos(pi p)) / 2, linear 1 - p,
    inverse_sqrt 1 / sqrt(1 + s / warmup) (the warmup's length is its time scale), wsd 1 until its last steps, then as
    linear. `floor` lifts all but constant and inverse_sqrt: floor + (1 - floor) x. After a restart (ReLoRA)
    all is multiplied by a ramp of its own.
    """
    warmup = max(1, steps_of(config.warmup, total))  # of one step is of none: it begins at the highest
    ends = total + 1
    decay = total if config.decay == 1 else min(steps_of(config.decay, total), total)

    restarts, ramp = config.lora.restart_every, config.lora.restart_warmup

    def share(step: int) -> float:
        now = step + 1
        if now < warmup:
            return now / warmup
        since = now - warmup
        match config.schedule:
            case "constant":
                return 1.0
            case "inverse_sqrt":
                scale = warmup if config.warmup else 10_000
                return 1.0 / math.sqrt((since + scale) / scale)
            case "linear":
                falling = max(0.0, (ends - now) / max(1, ends - warmup))
            case "wsd":
                falling = min(1.0, (ends - now) / (decay + 1))
            case "cosine":
                falling = max(0.0, 0.5 * (1.0 + math.cos(math.pi * since / max(1, ends - warmup))))
        return config.floor + (1 - config.floor) * falling if config.floor else falling

    def ramped(step: int) -> float:
        if restarts is None or step < restarts or ramp == 0:
            return share(step)
        return share(step) * min(1.0, (step % restarts + 1) / ramp)

    return ramped
