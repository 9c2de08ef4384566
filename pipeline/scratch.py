"""Temporary folders for a job's own files: gone with the job, and if it is killed, when the next one begins."""

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "softlabel-"
_LOCK = "in-use"
"""File that is locked for as long as the process lives whose folder it is in."""


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for as long as the block runs. Those whose process was killed are deleted first."""
    _delete_abandoned()
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder, Path(folder, "new").open("w") as lock:
        with suppress(OSError):  # a file system without locks: nobody will take the folder for abandoned
            fcntl.flock(lock, fcntl.LOCK_EX)
        Path(lock.name).rename(Path(folder, _LOCK))  # whoever finds it finds it locked
        yield Path(folder)


def _delete_abandoned() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError), path.open("r+") as lock:  # in use, another user's, or just deleted
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)
