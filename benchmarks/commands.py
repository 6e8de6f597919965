"""How long the command line takes, as whole processes: `python -m benchmarks.commands [RECIPE]`.

Run the recipe once before, so that there is nothing to do. Prints the median and the range of `RUNS` runs of
`regrow plan`, of `regrow run` with nothing to do, and of importing the command line; and checks that neither torch nor
Prefect is imported.
"""

import statistics
import subprocess
import sys
import time

RUNS = 7


def timed(command: list[str]) -> tuple[float, float, float]:
    """Minimum, median and maximum wall seconds of a command; it must exit with 0."""
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    return min(seconds), statistics.median(seconds), max(seconds)


def main() -> None:
    """Print the table."""
    recipe = sys.argv[1] if len(sys.argv) > 1 else "configs/quickstart.yaml"
    regrow = [sys.executable, "-m", "flows.cli"]
    imported = "import sys, flows.cli; sys.exit(bool({'torch', 'prefect', 'transformers'} & set(sys.modules)))"
    for name, command, bar in (
        ("import flows.cli", [sys.executable, "-c", imported], None),
        ("regrow plan", [*regrow, "plan", recipe, "--check"], 1.0),
        ("regrow run, nothing to do", [*regrow, "run", recipe], 2.0),
    ):
        low, middle, high = timed(command)
        told = "" if bar is None else f"  (bar {bar:.0f} s)"
        print(f"{name:<28} {middle:6.2f} s  [{low:.2f}, {high:.2f}]{told}")


if __name__ == "__main__":
    main()
