"""Several processes, one training: `python -m stages.train.ranks EVENTS_FD`, one a rank, started by `launch`.

Every rank computes its hand of each step's bins (`packing.plan.deal`) and sees one device. What they share is small: a
sum of gradients and losses, and the decisions of rank 0 (save now, stop now), which all take at the same step. The
ranks live in the process group of the stage's worker and die with it, also after `kill -9`; when one of them fails the
others are ended, and the error that is told is the first one that says something.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import uuid4

from stages.child import SUSPENDED, die_with_parent, dump_stacks_on_signal
from stages.errors import UserError
from stages.views import BadBlob

if TYPE_CHECKING:
    import torch

BUCKET = 2**24
"""Numbers of gradient that are summed over ranks at once."""
LAST_WORDS = 3.0
"""Seconds that the other ranks get to say what went wrong, once one has failed."""
LEAVING = 10.0
"""Seconds that a rank gets to leave by itself, once it is let go."""
LET_GO = 3
"""Its exit code then."""
LETTING_GO = 60.0
"""Seconds that a killed rank gets to end."""

Event = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """The ranks of a training as one of them sees them; alone by default."""

    rank: int = 0
    size: int = 1
    control: Any = None
    """A process group over CPUs, for decisions."""

    def agree(self, value: int) -> int:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        told = torch.tensor(value)
        dist.broadcast(told, src=0, group=self.control)
        return int(told)

    def sum(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """The sum over ranks, in place."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def meet(self) -> None:
        """Wait until every rank, and its device, is done with what was asked of it so far.

        Before a rank may end: its kernels are ended with its process, and another rank that still gathers from it would
        wait for ever, in a kernel that not even SIGKILL ends.
        """
        if self.size > 1:
            import torch
            import torch.distributed as dist

            if dist.get_backend() == "nccl":
                torch.cuda.synchronize()
            dist.barrier(group=self.control)

    def sum_gradients(self, parameters: Iterable["torch.nn.Parameter"]) -> None:
        """Replace every trained parameter's gradient by the sum over ranks; one that a rank lacks counts as zeros.

        In the parameters' order and in buckets, after the last micro-batch: a rank may use other parameters than the
        next one (experts), which gradient hooks would have to guess at.
        """
        import torch

        if self.size == 1:
            return
        bucket: list[torch.Tensor] = []
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
            if bucket and (
                bucket[0].dtype != parameter.grad.dtype
                or sum(map(torch.numel, bucket)) + parameter.grad.numel() > BUCKET
            ):
                self._sum_bucket(bucket)
                bucket = []
            bucket.append(parameter.grad)
        if bucket:
            self._sum_bucket(bucket)

    def _sum_bucket(self, gradients: list["torch.Tensor"]) -> None:
        import torch

        flat = self.sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


class RankFailed(RuntimeError):
    """A rank ended without saying why, or with an error of the program."""


def launch(
    job: Mapping[str, Any], ranks: int, devices: Sequence[str], on_event: Callable[[Event], None], stopping: "Stopping"
) -> Event:
    """Run `job` on so many ranks; return rank 0's last event, `{"event": "done", …}` or what ended the attempt.

    `devices` names each rank's CUDA device, or is empty. `on_event` gets rank 0's progress. A SIGTERM to this process
    is handed on. Raises UserError and BadBlob as a rank raised them, SystemExit(75) when the ranks saved their state
    and stopped, RankFailed for all else.
    """
    rendezvous = Path(job["work"]) / f"rendezvous-{uuid4().hex}"
    processes, pipes = [], {}
    try:
        with _sigterm_waits():
            for rank in range(ranks):
                reads, writes = os.pipe()
                place = {"CUDA_VISIBLE_DEVICES": devices[rank]} if devices else {}
                process = subprocess.Popen(
                    [sys.executable, "-m", "stages.train.ranks", str(writes)],
                    stdin=subprocess.PIPE,
                    pass_fds=(writes,),
                    env={"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": _threads(ranks), **os.environ, **place},
                )
                os.close(writes)
                processes.append(process)
                pipes[reads] = rank
                assert process.stdin is not None
                share = {"rank": rank, "ranks": ranks, "rendezvous": str(rendezvous), "parent": os.getpid()}
                process.stdin.write(json.dumps({**job, **share}).encode() + b"\n")
                process.stdin.flush()  # and open as long as the rank is wanted (`_leave_when_let_go`)
        last = _follow(processes, pipes, on_event, stopping)
    finally:
        codes = _end(processes)
        rendezvous.unlink(missing_ok=True)
    held = [rank for rank, process in enumerate(processes) if process.returncode is None]
    return _judge(last, codes, held)


@contextmanager
def _sigterm_waits() -> Iterator[None]:
    """Processes that are started meanwhile inherit that SIGTERM waits until they listen (`_main`): it would end them
    while Python starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(processes: Sequence["subprocess.Popen[bytes]"]) -> list[int | None]:
    """Let go of what is left, then kill it. Returns every rank's exit code, None for one that was ended here."""
    running = [process.poll() is None for process in processes]
    for process in processes:
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
    _wait(processes, LEAVING)
    for process in processes:
        process.kill()
    _wait(processes, LETTING_GO)
    ours = (None, LET_GO, -signal.SIGKILL)
    return [
        None if was_running and process.returncode in ours else process.returncode
        for process, was_running in zip(processes, running, strict=True)
    ]


def _wait(processes: Sequence["subprocess.Popen[bytes]"], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))


def _threads(ranks: int) -> str:
    return str(max(1, len(os.sched_getaffinity(0)) // ranks)) if sys.platform == "linux" else "1"


@dataclass
class Stopping:
    """Whether somebody asked for a stop (SIGTERM)."""

    asked: bool = False

    def ask(self, *_: object) -> None:
        """A signal handler."""
        self.asked = True


def _follow(
    processes: Sequence["subprocess.Popen[bytes]"],
    pipes: Mapping[int, int],
    on_event: Callable[[Event], None],
    stopping: Stopping,
) -> list[Event]:
    """Every rank's last event, once all have ended or one has failed."""
    last: list[Event] = [{} for _ in processes]
    selector = selectors.DefaultSelector()
    rests = dict.fromkeys(pipes, b"")
    for pipe in pipes:
        selector.register(pipe, selectors.EVENT_READ)
    handed_on, deadline = False, float("inf")
    while rests and time.monotonic() < deadline:
        for ready, _ in selector.select(timeout=0.2):
            chunk = os.read(ready.fd, 65536)
            *lines, rests[ready.fd] = (rests[ready.fd] + chunk).split(b"\n")
            for line in lines:
                rank = pipes[ready.fd]
                last[rank] = json.loads(line)
                if rank == 0 and last[rank]["event"] == "tell":
                    on_event(last[rank])
            if not chunk:
                selector.unregister(ready.fd)
                os.close(ready.fd)
                del rests[ready.fd]
        if stopping.asked and not handed_on:
            handed_on = True
            for process in processes:
                process.send_signal(signal.SIGTERM)
        if deadline == float("inf") and any(process.poll() not in (None, 0, SUSPENDED) for process in processes):
            deadline = time.monotonic() + LAST_WORDS
    for pipe in rests:
        os.close(pipe)
    return last


def _judge(last: Sequence[Event], codes: Sequence[int | None], held: Sequence[int] = ()) -> Event:
    """What ended the attempt, from every rank's last event and exit code, None for one that had to be killed, and the
    ranks that are `held`: not even that ended them."""
    found = {event["event"]: event for event in reversed(last) if event}
    if "refused" in found:
        raise UserError(found["refused"]["message"])
    if "damaged" in found:
        raise BadBlob(found["damaged"]["reasons"])
    if held:
        raise RankFailed(
            f"rank {held[0]} has not ended {LETTING_GO:.0f} seconds after SIGKILL: its GPU's driver holds it. Reset "
            "the GPU or restart the machine; the next run goes on from the last checkpoint"
        )
    for kind in ("out_of_memory", "upset"):
        if kind in found:
            return found[kind]
    if all(code == 0 for code in codes):
        return last[0]
    if all(code in (0, SUSPENDED) for code in codes):
        raise SystemExit(SUSPENDED)
    # One that was killed said nothing; what the others say then is that it is gone.
    told = [f"rank {rank}: {event['message']}" for rank, event in enumerate(last) if event.get("event") == "failed"]
    ended = {rank: code for rank, code in enumerate(codes) if code}
    killed = [f"rank {rank} ended with {_ending(code)}" for rank, code in ended.items() if code < 0]
    left = [f"rank {rank} ended with {_ending(code)}" for rank, code in ended.items()]
    raise RankFailed((killed or told or left or ["a rank had nothing more to say and did not end"])[0])


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


# ---- inside a rank ----------------------------------------------------------------------------------------------


def join(rank: int, ranks: int, rendezvous: str, device: str, patience: float | None) -> Group:
    """Enter the group of all ranks. Waits for the others, `patience` seconds at most."""
    import torch
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.set_device(0)
    timeout = None if patience is None else timedelta(seconds=patience)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=ranks,
        timeout=timeout,
        device_id=torch.device("cuda", 0) if device == "cuda" else None,
    )
    control = dist.new_group(timeout=timeout, backend="gloo") if device == "cuda" else dist.group.WORLD
    return Group(rank, ranks, control)


def _leave_when_let_go() -> NoReturn:
    """End this process once the launcher has closed its end of stdin.

    A rank whose kernel waits for another one that failed or was killed would keep its GPU for a while, even after
    SIGKILL. NCCL's abort ends the kernel at once, from a thread that does not wait for it.
    """
    while os.read(sys.stdin.fileno(), 1):  # not `sys.stdin.read`, whose lock a forked worker would wait for
        pass
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what the main thread says of it is no news
    c10d = sys.modules.get("torch.distributed.distributed_c10d")
    with suppress(Exception):  # in whatever state it meets the groups, this process ends
        if c10d is not None and c10d.is_initialized() and c10d.get_backend() == "nccl":
            # torch's public `ProcessGroup.abort` ends one group; DeepSpeed makes others.
            c10d._abort_process_group()
    os._exit(LET_GO)


def _main(events: int) -> NoReturn:
    dump_stacks_on_signal()
    stopping = Stopping()  # from the first moment to the last: a warning may come when all is done
    signal.signal(signal.SIGTERM, stopping.ask)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    pipe = os.fdopen(events, "w", buffering=1)

    def send(event: Event) -> None:
        pipe.write(json.dumps(event) + "\n")
        pipe.flush()

    code = 1
    try:
        job = json.loads(sys.stdin.readline())
        Thread(target=_leave_when_let_go, daemon=True).start()
        die_with_parent(signal.SIGKILL)
        if os.getppid() != job["parent"]:
            os._exit(1)
        from stages.train.supervise import run_rank

        last = run_rank(job, send, stopping)
        send(last)
        code = 0 if last["event"] == "done" else 1
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except UserError as error:
        send({"event": "refused", "message": str(error)})
    except BadBlob as error:
        send({"event": "damaged", "reasons": error.reasons})
    except BaseException as error:
        import traceback

        traceback.print_exc()
        send({"event": "failed", "message": f"{type(error).__name__}: {error}"})
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _main(int(sys.argv[1]))
