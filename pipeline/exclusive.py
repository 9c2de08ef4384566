"""One process at a time at a place, and temporary folders that are gone with their job or when the next one begins."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import lock_descriptor

from softlabel.storage.errors import TrainingError
from softlabel.storage.lock import ForeignFileError, HeldError, held, opened


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
                "another process is already training this student",
                expected="one process at a time for each output",
                found=str(error) or "a process that has just started",
                where=place,
                do="wait for it to finish (the same command then finds the finished student), or choose another output",
            ) from None
        except ForeignFileError as error:
            raise TrainingError(
                "training did not start: softlabel can't tell whether another process is already training this student",
                expected="softlabel's own lock file, or no file",
                found=error.strerror,
                where=path,
                do="move that file away, or choose another output",
            ) from None
        except OSError:
            pass
        yield


_PREFIX = "softlabel-"
_LOCK = "in-use"
"""File that is locked for as long as the process lives whose folder it is in."""


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for as long as the block runs. Those whose process was killed are deleted first."""
    _delete_abandoned()
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder:
        descriptor = opened(Path(folder, "new"))
        try:
            with suppress(OSError):  # a file system without locks: nobody will take the folder for abandoned
                lock_descriptor(descriptor, blocking=False)
            Path(folder, "new").rename(Path(folder, _LOCK))  # whoever finds it finds it locked
            yield Path(folder)
        finally:
            os.close(descriptor)


def _delete_abandoned() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # without a lock, or just deleted
            if _is_ours(folder):
                _delete_unused(folder)


def _is_ours(folder: Path) -> bool:
    """Whether it is this user's, whom alone mkdtemp lets in: anybody may make what looks like one of these."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _delete_unused(folder: Path) -> None:
    descriptor = opened(folder / _LOCK, create=False)
    try:
        if lock_descriptor(descriptor, blocking=False):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)
