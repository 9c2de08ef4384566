"""Allow one process per output, and make temporary folders that are deleted even if their process is killed."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import lock_descriptor

from softlabel.storage.errors import TrainingError
from softlabel.storage.lock import ForeignFileError, HeldError, held, opened, require_free
from softlabel.storage.places import durable


@contextmanager
def lock_output(output: Path) -> Iterator[None]:
    """Lock an output folder, so that only this process writes to it.

    Where no lock can be made (read-only, or no locks on this file system), the block runs without one.

    Args:
        output: the folder; its lock file is next to it.

    Raises:
        TrainingError: if another process holds the lock, or the lock's name is taken by something else.
    """
    with ExitStack() as stack:
        with _explained(output):
            durable.make_folder(output.parent)
            stack.enter_context(held(_lock_of(output)))
        yield


def require_unlocked(output: Path) -> None:
    """Refuse an output folder that another process has locked; nothing is written.

    Raises:
        TrainingError: as ``lock_output`` does.
    """
    with _explained(output):
        require_free(_lock_of(output))


def _lock_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.softlabel.lock")


@contextmanager
def _explained(output: Path) -> Iterator[None]:
    """Turn errors about an output's lock into those that users see."""
    try:
        yield
    except HeldError as error:
        raise TrainingError(
            "another process is already training this student",
            expected="one process at a time for each output",
            found=str(error) or "a process that has just started",
            where=output,
            do="wait for it to finish (the same command then finds the finished student), or choose another output",
        ) from None
    except ForeignFileError as error:
        raise TrainingError(
            "training did not start: softlabel can't tell whether another process is already training this student",
            expected="softlabel's own lock file, or no file",
            found=error.strerror,
            where=_lock_of(output),
            do="move that file away, or choose another output",
        ) from None
    except OSError:  # no lock can be made here
        pass


_PREFIX = "softlabel-"
_LOCK = "in-use"
"""Name of a file in each folder that stays locked as long as the folder's process lives."""


@contextmanager
def scratch(parent: Path | None = None) -> Iterator[Path]:
    """A temporary folder for this block. Folders of killed processes are deleted first.

    Args:
        parent: where to make it, for what is to be renamed to a place there; the system's temporary folder by default.
    """
    _delete_abandoned(parent or Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent) as folder:
        descriptor = opened(Path(folder, "new"))
        try:
            with suppress(OSError):  # a file system without locks: other processes then never delete the folder
                lock_descriptor(descriptor, blocking=False)
            Path(folder, "new").rename(Path(folder, _LOCK))  # the name appears only once the file is locked
            yield Path(folder)
        finally:
            os.close(descriptor)


def _delete_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # it has no lock file, or was just deleted
            if _is_ours(folder):
                _delete_unused(folder)


def _is_ours(folder: Path) -> bool:
    """Whether only this user can access it, as mkdtemp ensures: other users can make folders with such names, too."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _delete_unused(folder: Path) -> None:
    descriptor = opened(folder / _LOCK, create=False)
    try:
        if lock_descriptor(descriptor, blocking=False):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)
