"""Files that are there whole or not at all, that are named by what is in them, and that say who is writing them."""

import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

SIDE_FOLDER = "_softlabel"
"""Beside the shards; Delta's vacuum spares folders whose name starts with an underscore."""

WRITING = "writing"
"""Folder, in the side folder, of shards in the making."""


def content_hash(path: Path) -> str:
    """128-bit BLAKE2b of a file's bytes, as 32 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def publish(content: bytes, path: Path, *, replace: bool = True) -> None:
    """Write a file under its final name at once, so that it survives a power cut whole.

    Raises:
        FileExistsError: if it must not be replaced and is there; of several at once, one succeeds.
        OSError: if it can't be written; then nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        if replace:
            rename(temporary, path)
        else:
            _sync(temporary)
            path.hardlink_to(temporary)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def rename(source: Path, target: Path) -> None:
    """Move a finished file to its final name, durably: the bytes first, then the name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _sync(source)
    source.replace(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def gate(table: str, *, alone: bool = False) -> Iterator[float]:
    """Writers hold this together while their files are neither theirs alone nor the table's yet; maintenance, alone.

    It is a lock of the file system's, gone with the process that held it. Where the file system has none, or does not
    show it to other machines, everybody walks through, and the grace period is what protects a writer.

    Returns:
        The time by the clock that stamps this file system's files, in seconds.
    """
    folder = Path(table, SIDE_FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "maintenance.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        os.utime(descriptor)
        yield os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)


def start_writing(table: str, suffix: str) -> tuple[Path, BinaryIO]:
    """A new file of this process's own, marked as being written for as long as what is returned with it is open.

    Raises:
        OSError: if it can't be made.
    """
    folder = Path(table, SIDE_FOLDER, WRITING)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_machine()}-{uuid.uuid4().hex}{suffix}"
    with gate(table):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
    return path, os.fdopen(descriptor, "rb")


def writer_of(path: Path) -> bool | None:
    """Whether whoever makes a file in the writing folder is alive; None if that can't be told from this machine."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True  # it has just got its final name
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False if path.name.startswith(f"{_machine()}-") else None


@cache
def _machine() -> str:
    """The running kernel: what sees one another's locks, in whichever container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = f"{uuid.getnode():x}"
    return hashlib.blake2b(boot.encode(), digest_size=4).hexdigest()
