"""What the log lines of the current work are about: its table, shard, student and so on."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

_about: ContextVar[Mapping[str, str | int]] = ContextVar("about", default={})  # noqa: B039 - it is never changed


@contextmanager
def about(**fields: str | int | None) -> Iterator[None]:
    """Say what log lines within the block are about, in addition to what is around it; None says nothing."""
    token = _about.set({**_about.get(), **{name: value for name, value in fields.items() if value is not None}})
    try:
        yield
    finally:
        _about.reset(token)


def now_about() -> Mapping[str, str | int]:
    """What log lines are about at the moment."""
    return _about.get()
