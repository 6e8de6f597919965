"""When a training saves, and when it stops: decided after every step, on rank 0 for all ranks.

After the last step, which may be that of early stopping, nothing is saved: going on from there would take another.
"""

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stages.train.checkpoints import Saver
from stages.train.training import Training

GO_ON, SAVE, SAVE_AND_STOP, STOP = range(4)


class Saving(TrainerCallback):  # type: ignore[misc]
    """Saves by the clock, and when somebody asked for a stop."""

    def __init__(self, training: Training, saver: Saver, is_in_trouble: Callable[[], bool]) -> None:
        self.training, self.saver, self.is_in_trouble = training, saver, is_in_trouble
        self.saved = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        last = state.global_step >= state.max_steps or control.should_training_stop
        decision = self.training.group.agree(self._decide(last))
        if decision in (SAVE, SAVE_AND_STOP):
            control.should_save = True
            self.saved = time.monotonic()
        control.should_training_stop |= decision in (SAVE_AND_STOP, STOP)
        return control

    def _decide(self, last: bool) -> int:
        runtime = self.training.work.runtime
        if self.is_in_trouble():
            return STOP
        if last:
            return GO_ON
        if self.training.stopping.asked:
            # A checkpoint that cannot be written before the end would only cost the time to hand back the machine.
            return SAVE_AND_STOP if self.saver.seconds < runtime.grace_seconds else STOP
        return SAVE if time.monotonic() - self.saved >= runtime.save_seconds else GO_ON
