"""The one error type that is meant for a person."""


class UserError(ValueError):
    """Bad input, told in one line: the place, what was expected, and how to mend it. Shown without a traceback."""
