"""The command line answers before anything heavy is loaded."""

import subprocess
import sys

HEAVY = ("jinja2", "numpy", "prefect", "pyarrow", "torch", "transformers")


def test_the_command_line_loads_nothing_heavy() -> None:
    asked = f"import sys, flows.cli; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
