"""What a span of a row is: where its text came from, whose turn it stands in, and whether it may train."""

ORIGIN_TEMPLATE = 0
"""Text that the chat template wrote: headers, separators, default system prompts."""
ORIGIN_CONTENT = 1
"""Text that came from the data."""
ORIGIN_END = 2
"""Template text that ends a turn, e.g. `<|im_end|>`: it trains wherever its turn trains."""

TRAIN_UNSET, TRAIN_NO, TRAIN_YES = 0, 1, 2
"""A turn's or part's own flag from the data; unset leaves the choice to `pack.train_on`."""

ROLES = ("", "system", "user", "assistant", "tool", "text")
"""The roles there are; spans hold their places in this list. `text` is raw text, "" is text that belongs to no turn."""

NO_TURN = 65535
"""The turn of text that belongs to none."""


def kind_of(origin: int, role: str, train: int) -> int:
    """What a span is, as one byte: `origin | train << 2 | role << 4` (role: its place in ROLES)."""
    return origin | train << 2 | ROLES.index(role) << 4
