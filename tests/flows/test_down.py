"""`regrow down` while a run trains: the run saves its state, nothing is left, and the next one trains on."""

import pytest

from tests.flows.raised import eventually
from tests.flows.victim import Victim, kill

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]


def test_down_lets_a_run_save_its_state(victim: Victim) -> None:
    victim.trains(victim.send())
    raised = victim.raised
    parts = [raised.part(name) for name in ("keeper", "server", "worker-cpu", "worker-gpu-0")]
    raised.regrow("down", "--home", str(raised.home))
    assert not [part for part in parts if part.alive]
    assert not victim.processes(), "the command returns when all has ended"
    raised.up()
    assert victim.goes_on()["resumed_at_step"] > 0


def test_down_ends_a_run_that_outlived_all_that_started_it(victim: Victim) -> None:
    victim.trains(victim.send())
    raised = victim.raised
    kill(*(raised.part(name) for name in ("keeper", "worker-cpu", "worker-gpu-0", "server")))
    assert victim.stage_processes(), "the run lives on"
    assert "nothing" not in raised.regrow("down", "--home", str(raised.home))
    eventually(victim.processes, lambda found: not found)
    raised.up()
    assert victim.goes_on()["resumed_at_step"] > 0
