"""Completions written while a step trains: by the weights of one batch ago, never while the server is told new ones."""

import inspect
import threading

import pytest
from trl.generation.vllm_generation import VLLMGeneration

from stages.objectives import options_of
from stages.objectives.grpo import VllmChoice
from stages.train.ahead import Ahead, Prompts


class Server:
    """Writes down by which weights it completed which prompts, and holds each batch back until it is let go."""

    def __init__(self) -> None:
        self.weights = -1
        self.writing = threading.Lock()
        self.let_go = threading.Semaphore(0)
        self.failing: Prompts | None = None

    def sync_weights(self) -> None:
        assert self.writing.acquire(blocking=False), "told new weights in the middle of a batch"
        self.weights += 1
        self.writing.release()

    def generate(
        self, prompts: Prompts, images: None, num_generations: int, profiler: object = None
    ) -> list[tuple[int, int]]:
        with self.writing:
            assert self.let_go.acquire(timeout=60)
            if prompts == self.failing:
                raise ConnectionError("the server is gone")
            return [(prompt[0], self.weights) for prompt in prompts]


def test_a_batch_is_by_the_weights_of_one_step_ago_and_the_last_step_asks_for_none() -> None:
    server, batches = Server(), [[[step]] * 2 for step in range(5)]
    to_come = iter(batches[1:])
    ahead = Ahead(server, lambda: next(to_come, None))
    given = []
    for batch in batches:
        server.let_go.release()  # the first batch, or the one that was asked for before
        ahead.sync_weights()
        given.append(ahead.generate(batch, None, 2))
    assert given == [[(step, max(0, step - 1))] * 2 for step in range(5)]
    assert server.weights == 4
    assert not server.writing.locked()


def test_the_step_trains_while_the_next_batch_is_written() -> None:
    server = Server()
    ahead = Ahead(server, lambda: [[1]])
    server.let_go.release()
    ahead.sync_weights()
    assert ahead.generate([[0]], None, 1) == [(0, 0)]  # comes back although the next one is held back
    server.let_go.release()
    ahead.sync_weights()
    assert ahead.generate([[1]], None, 1) == [(1, 0)]


def test_other_prompts_than_those_written_ahead_are_an_error() -> None:
    """Or they would be written twice, and nobody would hear that nothing is ahead."""
    server = Server()
    ahead = Ahead(server, lambda: [[1]])
    server.let_go.release(2)
    ahead.sync_weights()
    ahead.generate([[0]], None, 1)
    ahead.sync_weights()
    with pytest.raises(RuntimeError, match="other prompts"):
        ahead.generate([[7]], None, 1)


def test_what_fails_while_a_step_trains_is_raised_at_the_next() -> None:
    server = Server()
    server.failing = [[1]]
    ahead = Ahead(server, lambda: [[1]])
    server.let_go.release(2)
    ahead.sync_weights()
    ahead.generate([[0]], None, 1)
    ahead.sync_weights()
    with pytest.raises(ConnectionError, match="is gone"):
        ahead.generate([[1]], None, 1)


def test_trl_asks_what_is_answered() -> None:
    """Its generation is replaced by one with these two methods, so they must be the ones that its trainers call."""
    for name in ("sync_weights", "generate"):
        theirs = inspect.signature(getattr(VLLMGeneration, name)).parameters
        assert list(theirs) == list(inspect.signature(getattr(Ahead, name)).parameters)


def test_it_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="mode: server"):
        VllmChoice(asynchronous=True)
    asked = {"vllm": {"mode": "server", "asynchronous": True}}
    short = {"reward": "length", "options": {"most": 5}}
    rewards = {"rewards": {"short": short, "right": {"reward": "exact_match"}}}
    for objective in ("grpo", "gdpo"):
        options_of(objective, {**asked, **rewards})
    with pytest.raises(ValueError, match="rloo does not correct"):
        options_of("rloo", {**asked, **rewards})
    with pytest.raises(ValueError, match="turn by turn"):
        options_of("grpo", {**asked, "environment": {"name": "configs/calculator.py"}})
