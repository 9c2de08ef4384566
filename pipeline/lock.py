"""One process at a time: a lock beside the place that it works on, which ends with it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from storage.errors import TrainingError
from storage.lock import ForeignFileError, HeldError, held


@contextmanager
def alone(place: Path) -> Iterator[None]:
    """Be the only process at work on a place; where nothing can be written or locked, whoever works finds that out.

    Raises:
        TrainingError: if another process is at work there, or something else has the lock's name.
    """
    path = place.with_name(f".{place.name}.softlabel.lock")
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(path))
        except HeldError as error:
            raise TrainingError(
                "another process trains this student",
                expected="one process at a time for each output",
                found=str(error) or "one that has just begun",
                where=place,
                do="let it finish: the same command then finds the student; or choose another output",
            ) from None
        except ForeignFileError as error:
            raise TrainingError(
                "whether another process trains this student can't be told, and none has been started",
                expected="softlabel's own lock, or nothing",
                found=error.strerror,
                where=path,
                do="move it away, or choose another output",
            ) from None
        except OSError:
            pass
        yield
