"""See README.md beside."""


def selective_state_update(*_: object, **__: object) -> None:
    raise NotImplementedError("for generation")
