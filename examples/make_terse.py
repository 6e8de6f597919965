"""Makes `terse.jsonl` and `terse-heldout.jsonl`: sums with a terse answer preferred to a chatty one.

Run: `python examples/make_terse.py`.
"""

import json
import random
from pathlib import Path

CHATTY = (
    "Sure! Let me work that out for you. {a} plus {b} makes {sum}.",
    "The answer to your question is {sum}, I hope that this helps you!",
    "Great question! If we add {a} and {b} together, we get {sum}.",
    "To find it, add {b} to {a}. The result of that is {sum}. Anything else?",
)


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Preference rows, no sum twice."""
    draw = random.Random(seed)
    pairs = draw.sample([(a, b) for a in range(10, 60) for b in range(10, 60)], count)
    made = []
    for a, b in pairs:
        chatty = draw.choice(CHATTY).format(a=a, b=b, sum=a + b)
        made.append({"prompt": f"What is {a} + {b}?", "chosen": str(a + b), "rejected": chatty})
    return made


if __name__ == "__main__":
    made = [json.dumps(row) for row in rows(160, seed=1)]
    for name, lines in (("terse", made[:128]), ("terse-heldout", made[128:])):
        Path(__file__).with_name(f"{name}.jsonl").write_text("\n".join(lines) + "\n")
