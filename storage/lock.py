"""File locks that are released when the process that holds them ends.

The path of a lock file is predictable, so something else may be there: a symbolic or hard link to another file, or a
pipe. Nothing is created, written or deleted through any of these.
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
"""The first bytes of a lock file that names its holder."""
_SECONDS_TO_END = 2.0
_SECONDS_BETWEEN_LOOKS = 0.05
_SPECIAL = (errno.ELOOP, errno.EISDIR, errno.ENXIO)
"""Error codes for a link, a folder and a socket."""


class HeldError(Exception):
    """Another process holds the lock; the message describes that process, as far as it is known."""


class ForeignFileError(OSError):
    """Something other than a softlabel lock file is at the path of a lock."""


def opened(path: Path, *, create: bool = True) -> int:
    """Open a lock file; the caller locks and closes the returned descriptor.

    Raises:
        ForeignFileError: if something other than a regular file is there.
        OSError: if it can't be opened.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        try:
            descriptor = os.open(path, flags | os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
        except PermissionError:  # another user owns it; a lock on it works without write access
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
    """Hold an exclusive lock for a block; its file names the holder, and is deleted afterwards.

    Raises:
        HeldError: if another process, or another block of this one, holds it.
        ForeignFileError: if the file there is not a softlabel lock file.
        OSError: if the file can't be written, or its file system has no locks.
    """
    descriptor = _acquire(path)
    try:
        yield
    finally:
        with suppress(OSError):
            if _is_still_there(path, descriptor):
                path.unlink()
        os.close(descriptor)


def require_free(path: Path) -> None:
    """Raise what ``held`` would raise at once; nothing is written.

    Raises:
        HeldError: if another process holds the lock.
        ForeignFileError: if the file there is not a softlabel lock file.
    """
    try:
        descriptor = opened(path, create=False)
    except FileNotFoundError:
        return
    try:
        _require_ours(path, descriptor)
        if not lock_descriptor(descriptor, blocking=False):
            raise HeldError(_holder(descriptor))
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    return os.pread(descriptor, 500, len(_MARK)).decode(errors="replace")


def _acquire(path: Path) -> int:
    # A killed process keeps its locks until the system has cleaned up, so we retry for a moment.
    until = time.monotonic() + _SECONDS_TO_END
    while True:
        descriptor = opened(path)
        try:
            _require_ours(path, descriptor)
            if not lock_descriptor(descriptor, blocking=False):
                if time.monotonic() > until:
                    raise HeldError(_holder(descriptor))
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
    """Whether the path still leads to the opened file; the previous holder may have deleted it."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    holder = f"process {os.getpid()} of {user()} on {platform.node()}, since {now}"
    with suppress(OSError):  # a full disk, or another user's file: the lock is held anyway
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _MARK + holder.encode(), 0)


def _foreign(path: Path, found: str) -> ForeignFileError:
    return ForeignFileError(errno.EEXIST, f"{found} has the name of softlabel's lock file", str(path))
