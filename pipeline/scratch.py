"""Temporary folders for a job's own files: gone with the job, and if it is killed, when the next one begins."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import lock_descriptor

from storage.lock import opened

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
