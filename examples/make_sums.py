"""Makes the sums that recipes learn to judge, each with held-out rows beside it:

    terse.jsonl     a terse answer preferred to a chatty one
    judged.jsonl    one answer: good where it is terse, bad where it is chatty
    steps.jsonl     three numbers added in two steps, some of which are wrong

Run: `python examples/make_sums.py`.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CHATTY = (
    "Sure! Let me work that out for you. {a} plus {b} makes {sum}.",
    "The answer to your question is {sum}, I hope that this helps you!",
    "Great question! If we add {a} and {b} together, we get {sum}.",
    "To find it, add {b} to {a}. The result of that is {sum}. Anything else?",
)
ROWS, HELD_OUT = 128, 32


def terse(draw: random.Random) -> Iterator[dict[str, Any]]:
    """Preference rows, no sum twice."""
    for a, b in draw.sample([(a, b) for a in range(10, 60) for b in range(10, 60)], ROWS + HELD_OUT):
        chatty = draw.choice(CHATTY).format(a=a, b=b, sum=a + b)
        yield {"prompt": f"What is {a} + {b}?", "chosen": str(a + b), "rejected": chatty}


def judged(draw: random.Random) -> Iterator[dict[str, Any]]:
    """Rows with one answer and its label; `answer` is what a good one says."""
    for row in terse(draw):
        good = draw.random() < 0.5
        answer = row["chosen"] if good else row["rejected"]
        yield {"prompt": row["prompt"], "completion": answer, "label": good, "answer": row["chosen"]}


def steps(draw: random.Random) -> Iterator[dict[str, Any]]:
    """Solutions in steps, each judged by itself: is what it says true."""
    for _ in range(ROWS + HELD_OUT):
        a, b, c = (draw.randrange(1, 10) for _ in range(3))
        right = [draw.random() < 0.6 for _ in range(2)]
        first = a + b if right[0] else a + b + draw.choice((-2, -1, 1, 2, 10))
        second = first + c if right[1] else first + c + draw.choice((-2, -1, 1, 2, 10))
        said = [f"{a} + {b} = {first}", f"{first} + {c} = {second}"]
        yield {"prompt": f"What is {a} + {b} + {c}?", "completions": said, "labels": right}


MADE: dict[str, Callable[[random.Random], Iterator[dict[str, Any]]]] = {
    "terse": terse,
    "judged": judged,
    "steps": steps,
}

if __name__ == "__main__":
    for name, rows in MADE.items():
        made = [json.dumps(row) for row in rows(random.Random(1))]
        for end, lines in (("", made[:ROWS]), ("-heldout", made[ROWS:])):
            Path(__file__).with_name(f"{name}{end}.jsonl").write_text("\n".join(lines) + "\n")
