"""Locks on files, which end with the process that holds them; the only place that knows how.

A lock's name can be guessed, so something else may have it: a link to a file of somebody else's, another name of one,
a pipe. Nothing is created, written or deleted through any of these.
"""

import errno
import os
import platform
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import lock_descriptor

from softlabel.storage.identity import user

_MARK = b"softlabel: "
"""What a lock that says its holder begins with."""
_SECONDS_TO_END = 2.0
_SECONDS_BETWEEN_LOOKS = 0.05
_SPECIAL = (errno.ELOOP, errno.EISDIR, errno.ENXIO)
"""What the system says of a link, a folder and a socket."""


class HeldError(Exception):
    """Another process holds the lock; the message is who that is, as far as it is known."""


class ForeignFileError(OSError):
    """Something that is no lock of softlabel's has a lock's name."""


def opened(path: Path, *, create: bool = True) -> int:
    """A descriptor of a lock's file, which the caller locks and closes.

    Raises:
        ForeignFileError: if something else than a file is there.
        OSError: if it can't be opened.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        try:
            descriptor = os.open(path, flags | os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
        except PermissionError:  # of another user, whom it keeps out, and us, all the same
            descriptor = os.open(path, flags | os.O_RDONLY)
    except OSError as error:
        if error.errno in _SPECIAL:
            raise _foreign(path, "a link, a folder or a socket") from None
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise _foreign(path, "a pipe or a device")


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a lock that nobody else holds, and say so in its file, which is deleted in the end.

    Raises:
        HeldError: if another process, or another block of this one, holds it.
        ForeignFileError: if its file is none of softlabel's.
        OSError: if the file can't be written, or its file system has no locks.
    """
    descriptor = _held(path)
    try:
        yield
    finally:
        with suppress(OSError):
            if _is_still_there(path, descriptor):
                path.unlink()
        os.close(descriptor)


def _held(path: Path) -> int:
    # A process that was just killed has its locks until the system is done with it: we wait for a moment.
    until = time.monotonic() + _SECONDS_TO_END
    while True:
        descriptor = opened(path)
        try:
            _require_ours(path, descriptor)
            if not lock_descriptor(descriptor, blocking=False):
                if time.monotonic() > until:
                    raise HeldError(os.pread(descriptor, 500, len(_MARK)).decode(errors="replace"))
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            elif _is_still_there(path, descriptor):
                _sign(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _require_ours(path: Path, descriptor: int) -> None:
    if os.fstat(descriptor).st_nlink > 1:
        raise _foreign(path, "a file that also has another name (a hard link)")
    if os.pread(descriptor, len(_MARK), 0) not in (b"", _MARK):
        raise _foreign(path, "a file that softlabel did not write")


def _is_still_there(path: Path, descriptor: int) -> bool:
    """Whether it has not been deleted, by who held it before, after it was opened here."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    holder = f"process {os.getpid()} of {user()} on {platform.node()}, since {now}"
    with suppress(OSError):  # a full disk, or another user's file: it is held all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _MARK + holder.encode(), 0)


def _foreign(path: Path, found: str) -> ForeignFileError:
    return ForeignFileError(errno.EEXIST, f"{found} has the name of softlabel's lock file", str(path))
