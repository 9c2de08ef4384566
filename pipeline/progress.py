"""What long work tells whoever is watching: a terminal's bar, a log, a Prefect artifact."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """How far a stage is. The rate and the time left follow from when each was reported."""

    stage: str
    done: int
    total: int | None
    """None as long as nobody knows."""
    unit: str
    details: Mapping[str, float] = field(default_factory=dict)


Watch = Callable[[Progress], None]


def unwatched(progress: Progress) -> None:
    """Tell nobody."""
