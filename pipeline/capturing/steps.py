"""The steps of a capture as functions that a caller may decorate."""

from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class StepDecorator(Protocol):
    """A decorator for the steps of a capture, for example one that runs them as tasks of a scheduler."""

    def __call__(self, step: Callable[P, R], /) -> Callable[P, R]:
        """The function to call instead of the step."""
        ...


def undecorated(step: Callable[P, R], /) -> Callable[P, R]:
    """The decorator that changes nothing."""
    return step
