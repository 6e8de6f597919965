"""Runs a stage's function in a child process group of its own: `python -m stages.child JOB EVENTS_FD`.

Why a child: a stage may import torch, fork workers, print a library's noise or be cancelled, and none of that may
touch the process that orchestrates. The child is a small launcher and a worker forked from it:

    parent ──spawns──> launcher (new session, gets SIGTERM when the parent's thread dies) ──forks──> worker

The launcher kills the whole group when the parent is gone, also after `kill -9`, so no orphan keeps a GPU. What the
stage tells travels back as JSON lines on a pipe; whatever it prints goes to the log.
"""

import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

GRACE_SECONDS = 30.0
"""Between SIGTERM and SIGKILL when a run is cancelled: time enough to save a checkpoint."""

STACKS = signal.SIGUSR1
"""Makes the processes of a stage print where they stand."""
STACKS_SECONDS = 3.0
"""What they get to do so, before a stage that hangs is ended."""

SUSPENDED = 75
"""Exit code of a stage that saved its state on SIGTERM (EX_TEMPFAIL: try again)."""

ALONE = {"PYTHONSAFEPATH": "1"}
"""Environment of whatever is started with `python -m`: it finds no modules in the user's working folder, where a file
may be called like one of Python's own, and whose text is in no key."""

CHILD_ENVIRONMENT = {
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "true",
    # Pydantic would look for plug-ins through all that is installed, in every process.
    "PYDANTIC_DISABLE_PLUGINS": "__all__",
    # OpenMP's threads spin while they wait, which on a busy machine starves the thread they wait for: five times
    # slower was seen with two other jobs on two cores.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
}
"""Defaults for the child's environment; what the user has set wins."""

FIXED_ENVIRONMENT = {
    **ALONE,
    # Some libraries write what they iterate over a set: the same bytes in every process.
    "PYTHONHASHSEED": "0",
    "PYTHONUNBUFFERED": "1",
}
"""What the child's environment has whatever the user has set."""

NOT_PASSED_ON = "ACCELERATE_"
"""How variables begin that the child does not get: with them Accelerate changes the precision, the device and the
optimizer's steps behind the back of the recipe, and no key knows."""

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Task:
    """One call of a stage function, with local folders only."""

    name: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    output: str
    work: str
    where: Mapping[str, Any] = field(default_factory=dict)


class ChildFailed(RuntimeError):
    """The stage's code failed; the message is the last of its traceback, the log holds the rest."""


class ChildRefused(ValueError):
    """The stage refused its input with a UserError; the message is for the user as it stands."""


class Suspended(RuntimeError):
    """The run was stopped (by SIGTERM, say) and can be continued: from what the stage saved, or from its start."""


ON_SIGTERM = "stopped on SIGTERM; what was finished is kept"
"""Of a run whose stage had nothing more to save."""


Event = dict[str, Any]


def run_in_child(
    module: str,
    tasks: Sequence[Task],
    runtime: Mapping[str, Any],
    on_event: Callable[[Event], None],
    on_line: Callable[[str], None],
    should_stop: Callable[[], str] = lambda: "",
    silence: float | None = None,
    grace: float = GRACE_SECONDS,
) -> None:
    """Run tasks of the stage declared in `module`, one after another in one child; return when all are done.

    `on_event` gets `{"event": "tell", "done", "total", "unit", "metrics"}` while a task runs and
    `{"event": "task", "name", "facts"}` after each. `on_line` gets each printed line. The child's whole group is
    ended before this returns, however it returns: by SIGTERM, and `grace` seconds later by SIGKILL. `should_stop` is
    asked all the time and tells why it should, or nothing. A stage that tells
    and prints nothing for `silence` seconds hangs: its stacks are printed, and it is ended. Must stay in the thread
    that called it: the death signal is bound to that thread. Raises ChildRefused, ChildFailed, Suspended,
    and BadBlob for what a streamed input lacks.
    """
    reads, writes = os.pipe()
    job = json.dumps({"module": module, "runtime": dict(runtime), "tasks": [asdict(t) for t in tasks]})
    theirs = {name: value for name, value in os.environ.items() if not name.startswith(NOT_PASSED_ON)}
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.child", str(os.getpid()), str(writes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(writes,),
        start_new_session=True,
        env={**CHILD_ENVIRONMENT, **theirs, **FIXED_ENVIRONMENT},
    )
    os.close(writes)
    assert process.stdin is not None and process.stdout is not None
    last: Event = {}
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(job.encode())
            process.stdin.close()
        streams = {reads: b"", process.stdout.fileno(): b""}
        selector = selectors.DefaultSelector()
        for stream in streams:
            selector.register(stream, selectors.EVENT_READ)
        heard, hangs = time.monotonic(), False
        while streams:
            # Once the launcher has gone only what is in the pipes counts: a stray grandchild may hold them open.
            gone = process.poll() is not None
            ready_streams = selector.select(timeout=0 if gone else 1.0)
            if gone and not ready_streams:
                break
            waited = time.monotonic() - heard
            if hangs and waited > STACKS_SECONDS:
                _kill_group(process)
                raise ChildFailed(
                    f"{module.rpartition('.')[2]} gave no sign of life for {silence:g} s and was ended; where it "
                    "stood is in the log above. The next run goes on from the last checkpoint; if it only was slow, "
                    "set REGROW_SILENCE_SECONDS higher"
                )
            elif silence is not None and not ready_streams and waited > silence and not hangs:
                hangs, heard = True, time.monotonic()
                os.killpg(process.pid, STACKS)
            for ready, _ in ready_streams:
                chunk = os.read(ready.fd, 65536)
                *lines, streams[ready.fd] = (streams[ready.fd] + chunk).split(b"\n")
                for line in lines:
                    if ready.fd == reads:
                        last = json.loads(line)
                        on_event(last)
                    else:
                        on_line(line.decode(errors="replace"))
                if not chunk:
                    selector.unregister(ready.fd)
                    del streams[ready.fd]
            if ready_streams and not hangs:
                heard = time.monotonic()  # now, because the parent may have been busy with what it heard
            if why := should_stop():
                raise Suspended(why)
        code = process.wait()
    except BaseException as stop:
        # A SIGTERM reaches this process as an exception of whoever handles it, and stops the stage too: if the stage
        # saved its state meanwhile, it is suspended, not broken. Ctrl-C stays what it is.
        _end_group(process, grace)
        if process.returncode == SUSPENDED and not isinstance(stop, KeyboardInterrupt | Suspended):
            raise Suspended("saved its state and stopped on SIGTERM") from stop
        raise
    finally:
        os.close(reads)
        process.stdout.close()
        _end_group(process, grace)
    if code == 0:
        return
    if last.get("event") == "refused":
        raise ChildRefused(last["message"])
    if last.get("event") == "damaged":
        from stages.views import BadBlob

        raise BadBlob(last["reasons"])
    if code == SUSPENDED:
        raise Suspended("saved its state and stopped on SIGTERM")
    raise ChildFailed(last.get("message") or f"the process of {module} ended with {_ending(code)}")


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _end_group(process: "subprocess.Popen[bytes]", grace: float) -> None:
    """SIGTERM the group, give it its grace, then SIGKILL; also reaps."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    _kill_group(process)


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# ---- inside the child -------------------------------------------------------------------------------------------


def _launch(parent: int, events: int) -> NoReturn:
    """Fork the worker, wait for it, and take the group down when the parent is gone."""
    worker = 0

    def on_term(*_: object) -> None:
        # With the parent alive this is a polite stop, and the worker got the same signal with the group.
        if os.getppid() != parent:
            os.killpg(0, signal.SIGKILL)

    signal.signal(signal.SIGTERM, on_term)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(STACKS, signal.SIG_IGN)
    die_with_parent(signal.SIGTERM)
    if os.getppid() != parent:  # it died before the signal was armed
        os.killpg(0, signal.SIGKILL)
    launcher = os.getpid()
    worker = os.fork()
    if worker == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        dump_stacks_on_signal()
        die_with_parent(signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(1)
        _work(events)
    os.close(events)
    sys.stdin.close()
    code = os.waitstatus_to_exitcode(_wait(worker, parent))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(launcher, -code)
        signal.pause()
    sys.exit(code)


def dump_stacks_on_signal() -> None:
    """Have `STACKS` print where every thread stands."""
    faulthandler.register(STACKS, all_threads=True)


def die_with_parent(number: signal.Signals) -> None:
    """Ask the kernel for a signal when the parent's thread ends. Linux alone can; see `_wait` for others."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)


def _wait(worker: int, parent: int) -> int:
    """The worker's exit status; where the kernel does not tell of the parent's death, look for it every second."""
    if sys.platform == "linux":
        return os.waitpid(worker, 0)[1]
    while True:
        ended, status = os.waitpid(worker, os.WNOHANG)
        if ended:
            return status
        if os.getppid() != parent:
            os.killpg(0, signal.SIGKILL)
        time.sleep(1.0)


def _work(events: int) -> NoReturn:
    """Read the job from stdin, call the stage function for every task, report on the pipe."""
    pipe = os.fdopen(events, "w", buffering=1)

    def send(event: Event) -> None:
        pipe.write(json.dumps(event) + "\n")
        pipe.flush()

    code = 1
    try:
        job = json.loads(sys.stdin.read())
        # Imported here, in the forked worker: the launcher stays small.
        from stages.objects import full_disk_told
        from stages.runtime import Runtime
        from stages.stage import Stage, Work
        from stages.streams import Streams

        stage: Stage[Any] = importlib.import_module(job["module"]).STAGE
        config_type = stage.part or stage.config
        runtime = Runtime.model_validate(job["runtime"])
        if not runtime.allow_code:  # which may want anything
            sys.meta_path.insert(0, _Without(stage.without))
        for task in (Task(**t) for t in job["tasks"]):
            show = Streams(Path(task.work), runtime).show
            work = Work(Path(task.work), runtime, task.where, _tell(send), show)
            inputs = {name: Path(path) for name, path in task.inputs.items()}
            config = config_type.model_validate(task.config)
            with full_disk_told(work.folder):
                facts = stage.run(config, inputs, Path(task.output), work)
            send({"event": "task", "name": task.name, "facts": facts})
        code = 0
    except BaseException as error:
        code = _report(error, send)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Threads and atexit hooks of libraries must not decide the exit code or hang the end.
        os._exit(code)


class _Without:
    """Finds no module of some names."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name in self._names:
            raise ModuleNotFoundError(f"this stage does without {name}", name=name)


def _report(error: BaseException, send: Callable[[Event], None]) -> int:
    """Tell the parent how the stage ended; return the exit code."""
    from stages.errors import UserError
    from stages.views import BadBlob

    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, UserError):
        send({"event": "refused", "message": str(error)})
        return 2
    if isinstance(error, BadBlob):
        send({"event": "damaged", "reasons": error.reasons})
        return 1
    traceback.print_exc()
    send({"event": "failed", "message": f"{type(error).__name__}: {error}"})
    return 1


def _tell(send: Callable[[Event], None]) -> Callable[..., None]:
    """The stage's `tell`: at most ten plain progress events a second; those with metrics always go."""
    latest = 0.0

    def tell(done: float, total: float | None = None, unit: str = "", **metrics: Any) -> None:
        nonlocal latest
        now = time.monotonic()
        if metrics or now - latest >= 0.1 or done == total:
            latest = now
            send({"event": "tell", "done": done, "total": total, "unit": unit, "metrics": metrics})

    return tell


if __name__ == "__main__":
    _launch(int(sys.argv[1]), int(sys.argv[2]))
