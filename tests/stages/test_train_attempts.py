"""Checkpoints of an attempt at training, and what the next attempt goes on from."""

from pathlib import Path

from stages.train.checkpoints import KEPT, Saver, newest
from stages.train.run import Attempt
from stages.train.supervise import _smaller, _without


def write(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "weights").write_text("whole")


def save(folder: Path, *steps: int) -> Path:
    saver = Saver(folder / "checkpoints", folder / "aside")
    for step in steps:
        saver.save(step, write, beside=False)
        (saved,) = saver.finished()
        assert saved.path is not None and saved.path.is_dir(), "what is reported as saved is there"
    return folder / "checkpoints"


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir())


def test_the_newest_stay(tmp_path: Path) -> None:
    folder = save(tmp_path, 10, 20, 30, 100)
    assert KEPT == 2 and steps_in(folder) == [30, 100]
    assert newest(folder) == (folder / "100", [])


def test_damaged_ones_of_later_steps_do_not_push_out_what_is_saved_now(tmp_path: Path) -> None:
    folder = save(tmp_path, 80, 100)
    for step in (80, 100):
        (folder / str(step) / "weights").write_text("short")
    found, skipped = newest(folder)
    assert found is None and len(skipped) == 2
    save(tmp_path, 10)
    assert newest(folder) == (folder / "10", [])
    save(tmp_path, 20, 30)
    assert steps_in(folder) == [20, 30]


def test_running_out_of_memory_after_a_rollback_goes_on_from_what_was_saved_since(tmp_path: Path) -> None:
    folder = save(tmp_path, 90, 110)
    rolled = _without(Attempt("cpu", 4, "none", 1000), {"position": 100, "message": "a spike in step 101"})
    assert newest(folder, rolled.below) == (folder / "90", []) and steps_in(folder) == [90]
    save(tmp_path, 800, 900)
    event = {"message": "step 950", "plan": "a plan", "micro_batch": 4, "recompute": "none", "least": 1}
    again = _smaller(rolled, event)
    assert again.left_out == (100,) and again.micro_batch < 4
    assert newest(folder, again.below) == (folder / "900", [])
