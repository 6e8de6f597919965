"""A stage for the tests of the child process: what it does is said in its config."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from stages import own_code
from stages.errors import UserError
from stages.formats import Format
from stages.stage import Facts, Stage, StageConfig, Work


class ToyConfig(StageConfig):
    """What to do."""

    does: str = "write"


def run(config: ToyConfig, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    print("a library's noise")
    work.tell(1, 2, "items", pid=os.getpid())
    match config.does:
        case "write":
            (output / "out.txt").write_text("made")
        case "refuse":
            raise UserError("rows.jsonl:3: no `text` field; expected one")
        case "fill":
            raise OSError(errno.ENOSPC, "No space left on device")
        case "compute":
            from accelerate import Accelerator

            return {"seed": hash("a set's order"), "precision": Accelerator(cpu=True).mixed_precision}
        case "import":
            import tokenize

            return {"tokenize": tokenize.__file__}
        case "import beside":
            own_code.load("from helper import shorten", "format", "FORMAT", Format, "a format")
        case "fail":
            raise RuntimeError("broken inside")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            work.tell(1, 2, "items", grandchild=child.pid)
            time.sleep(600)
        case "orphan":
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            (output / "out.txt").write_text("made")
    return {"rows": 2}


STAGE = Stage("toy", artifact="toys", version=1, config=ToyConfig, run=run, module="toy_stage")
