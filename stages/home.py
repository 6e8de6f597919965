"""`~` in a path: a shell's word, and no shell reads a recipe's, a file's or a quoted variable's."""

from pathlib import Path

from stages.errors import UserError


def expanded(path: str | Path, place: str) -> Path:
    """The path with its `~` or `~NAME` as that user's home folder; as it is where nobody is called so and it exists.

    Raises UserError where neither is; `place` is what named it, for the message.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:  # nobody is called so
        if Path(path).exists():
            return Path(path)
        raise UserError(f"{place}: {path}: there is no such home folder; write the path out") from None
