"""What long work tells whoever is watching: a terminal's bar, a log, a Prefect artifact."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Lock


@dataclass(frozen=True)
class Progress:
    """How far a stage is. The rate and the time left follow from when each was reported."""

    stage: str
    done: int
    total: int | None
    """None as long as nobody knows."""
    unit: str
    details: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, "Progress"] = field(default_factory=dict)
    """What each worker has done of it, if several are at it."""


Watch = Callable[[Progress], None]


def unwatched(progress: Progress) -> None:
    """Tell nobody."""


class Together:
    """One stage made of many pieces of work, which several workers do at once; details are means over what is done.

    Args:
        start: the stage before anything is done.
        watch: told of the whole whenever a piece is heard of.
    """

    def __init__(self, start: Progress, watch: Watch) -> None:
        self._start, self._watch = start, watch
        self._parts: dict[str, Progress] = {}
        self._lock = Lock()

    @contextmanager
    def piece(self, worker: str) -> Iterator[Watch]:
        """Whom a worker tells of its next piece; if the block fails, nothing of the piece is done."""
        before = self._parts.get(worker)

        def watch(progress: Progress) -> None:
            with self._lock:
                self._parts[worker] = self._sum([progress] if before is None else [before, progress])
                parts = dict(sorted(self._parts.items())) if len(self._parts) > 1 else {}
                self._watch(replace(self._sum(self._parts.values()), total=self._start.total, parts=parts))

        try:
            yield watch
        except BaseException:
            with self._lock:
                self._parts.pop(worker, None)
                self._parts |= {} if before is None else {worker: before}
            raise

    def _sum(self, pieces: Collection[Progress]) -> Progress:
        details = {}
        for name in dict.fromkeys(name for piece in pieces for name in piece.details):
            known = [piece for piece in pieces if name in piece.details]
            weight = sum(piece.done for piece in known)
            details[name] = sum(piece.details[name] * piece.done for piece in known) / max(weight, 1)
        return replace(self._start, done=sum(piece.done for piece in pieces), total=None, details=details)
