"""Progress reports of long work, for a progress bar, a log or a Prefect artifact."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Lock


@dataclass(frozen=True)
class Progress:
    """How far a stage has come. Rate and remaining time follow from the times at which reports arrive."""

    stage: str
    done: int
    total: int | None
    """None while it is not known."""
    unit: str
    details: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, "Progress"] = field(default_factory=dict)
    """Progress of each worker, if there are several."""


Watch = Callable[[Progress], None]


def unwatched(progress: Progress) -> None:
    """Ignore the progress."""


class CombinedProgress:
    """Combined progress of one stage whose pieces several workers do at once; details are means over the finished part.

    Args:
        start: the stage before anything is done.
        watch: called with the stage's progress whenever a worker reports.
    """

    def __init__(self, start: Progress, watch: Watch) -> None:
        self._start, self._watch = start, watch
        self._parts: dict[str, Progress] = {}
        self._lock = Lock()

    @contextmanager
    def piece(self, worker: str) -> Iterator[Watch]:
        """Callback for the progress of a worker's next piece; if the block fails, the piece counts as not done."""
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
