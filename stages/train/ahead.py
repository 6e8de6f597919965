"""Asynchronous rollouts: while a step trains, vLLM's server writes the completions of the next one.

Those are then by the weights of one batch ago, never older. TRL's loss weighs every token by how much more probable the
weights of now make it than those that wrote it (`vllm_importance_sampling_mode: token_truncate`, at most three times).
That corrects for both: for the older weights, and for what vLLM computes differently.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

Prompts = list[list[int]]
"""Token ids; each prompt as often as it is to be completed."""


class Generation(Protocol):
    """What TRL's trainers ask of `trl.generation.vllm_generation.VLLMGeneration`."""

    def sync_weights(self) -> None: ...

    def generate(self, prompts: Prompts, images: Any, num_generations: int, profiler: Any = None) -> Any: ...


class Ahead:
    """A generation that is asked for the following batch as soon as it has given one.

    `following` gives the prompts after those that were asked last, or None at the end. Nothing is written while the
    server is told new weights. What went wrong in writing ahead is raised where its completions are asked for.
    """

    def __init__(self, generation: Generation, following: Callable[[], Prompts | None]) -> None:
        self.generation, self.following = generation, following
        self._prompts: Prompts | None = None
        self._written: Future[Any] | None = None

    def sync_weights(self) -> None:
        """Tell the server the weights of now, once it has written all with those before."""
        if self._written:
            self._written.exception()  # waits; raised where the completions are asked for
        self.generation.sync_weights()

    def generate(self, prompts: Prompts, images: Any, num_generations: int, profiler: Any = None) -> Any:
        """The completions of `prompts`: written ahead, or now where a training begins."""
        if self._written is None:
            given = self.generation.generate(prompts, images, num_generations, profiler)
        elif self._prompts == prompts:
            given = self._written.result()
        else:
            raise RuntimeError("completions were written ahead for other prompts than those that are asked for")
        self._prompts, self._written = self.following(), None
        if ahead := self._prompts:
            self._written = in_background(lambda: self.generation.generate(ahead, None, num_generations))
        return given


def in_background(work: Callable[[], Any]) -> Future[Any]:
    """Run in a thread that no process waits for when it ends: a stopped training needs no more completions."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="rollouts").start()
    return future
