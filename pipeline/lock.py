"""One process at a time: a lock on a file beside a place, which ends with the process that holds it."""

import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from storage.errors import TrainingError
from storage.provenance import user

_SECONDS_TO_END = 2.0
_SECONDS_BETWEEN_LOOKS = 0.05


@contextmanager
def alone(place: Path) -> Iterator[None]:
    """Be the only process at work on a place; where nothing can be written or locked, whoever works finds that out.

    Raises:
        TrainingError: if another process is at work there.
    """
    path = place.with_name(f"{place.name}.lock")
    descriptor = _hold(path, place)
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                path.unlink()
            os.close(descriptor)


def _hold(path: Path, place: Path) -> int | None:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            _lock(descriptor)
        except BlockingIOError:
            holder = os.pread(descriptor, 500, 0).decode()
            os.close(descriptor)
            raise _taken(holder, place) from None
        except OSError:  # a file system without locks
            pass
        if _is_still_there(path, descriptor):
            now = datetime.now(UTC).isoformat(timespec="seconds")
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} of {user()} on {platform.node()}, since {now}".encode(), 0)
            return descriptor
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Take it; waiting for a moment, since a process that was just killed has it until the system is done with that."""
    until = time.monotonic() + _SECONDS_TO_END
    while time.monotonic() < until:
        with suppress(BlockingIOError):
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_still_there(path: Path, descriptor: int) -> bool:
    """Whether it has not been deleted, by who held it before, after it was opened here."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _taken(holder: str, place: Path) -> TrainingError:
    return TrainingError(
        "another process trains this student",
        expected="one process at a time for each output",
        found=holder or "one that has just begun",
        where=place,
        do="let it finish: the same command then finds the student; or choose another output",
    )
